"""Weights: initialisation from checkpoints, torchvision or timm, loading and saving of trained networks, inference."""
import re
import ssl
import sys
from collections import OrderedDict
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from models import foreign, timm_networks
from models.networks import build, centre_crop, check_name, has_weights, natural_size, parameters, resize, torchvision_name
from models.timm_networks import is_timm
from rundir import checkpoint
from rundir.errors import CHECKPOINT, DATA, USAGE, Failure
from rundir.files import digest

# Required keys of a weights file; the scripts store more.
METADATA = ("model", "classes", "image_size", "mean", "std", "dataset", "state_dict")


def initialise(net, name: str, *, pretrained: bool = False, init=None) -> str | None:
    """Load weights into `net`: from the file `init`, or torchvision's or timm's if `pretrained`.

    init: weights of this or another project, see models.foreign; its SHA-256 is returned.  All tensors must match, except for
    those of the head, which are left out with another number of classes; ImageNet weights are always loaded without.
    Failure DATA: weights missing, damaged, not downloadable, or of another network; USAGE: no ImageNet weights for this
    network or size.
    """
    head, sha256 = _head_keys(net), None
    if init is not None:
        content, sha256 = checkpoint.read_tensors(init, DATA)
        state = finite(foreign.tensors(content, init, DATA), init, DATA)
        if _load_state(net, state) and (mismatch := _load_state(net, state, head)):
            raise Failure(DATA, f"these weights are not a {name} ({init}: {mismatch})", "name the weights of the same network")
    elif pretrained:
        if short_name := torchvision_name(name):
            weights = _imagenet_weights(short_name)
        elif has_weights(name):
            weights = timm_networks.weights(net, name)
        else:
            raise Failure(USAGE, f"there are no ImageNet weights of {name}", "use --no-pretrained, or --init PATH")
        if mismatch := _load_state(net, weights, head):
            raise Failure(USAGE, f"the ImageNet weights of {name} do not fit this image size ({mismatch})",
                          f"use --image-size {natural_size(name)}, or --no-pretrained")
    return sha256


def _head_keys(net) -> frozenset[str]:
    """The state_dict keys of the head: of the last linear or convolutional layer, or of those that timm names."""
    *_, last = (name for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
    heads = getattr(net, "pretrained_cfg", {}).get("classifier") or last
    return frozenset(key for key in net.state_dict() for head in ([heads] if isinstance(heads, str) else heads)
                     if key.startswith(f"{head}."))


def _load_state(net, weights, skip=frozenset()) -> str | None:
    """Copy `weights`, or a part of them, into `net`, except for the keys `skip`; returns the first mismatch."""
    if not weights:
        return "no weights in it"
    mismatches = (_load_part(net, part, skip) for part in foreign.parts(weights))
    first = next(mismatches)
    return first if first and all(mismatches) else None


def _load_part(net, weights, skip) -> str | None:
    """`_load_state` of the whole `weights`, by name or else by order."""
    if not (mismatch := _load_by_name(net, weights, skip)):
        return None
    renamed, why = foreign.in_order(net, weights, skip)
    if why is None:
        return _load_by_name(net, renamed, skip)
    return mismatch if weights.keys() & net.state_dict().keys() else why


def _classes_of(net, weights) -> int | None:
    """The number of classes of `weights`; None if they do not fit `net` even without the head, or have none."""
    head = _head_keys(net)
    for part in foreign.parts(weights):
        if not _load_part(net, part, head):
            layer = (foreign.in_order(net, part, head)[0] or part).get(max(head))  # its weight, after its bias
            return None if layer is None else len(layer)
    return None


def _load_by_name(net, weights, skip) -> str | None:
    state: OrderedDict = OrderedDict()
    ours = net.state_dict()
    # The attribute _metadata has the layer versions by which torch and torchvision convert older layouts.  A plain dict lacks it,
    # and MNASNet requires one for the whole network.
    state._metadata = getattr(weights, "_metadata", None) or {"": {"version": net._version}}  # type: ignore[attr-defined]
    for key, tensor in weights.items():
        # torchvision's files contain auxiliary heads, which are not built here, and older layer names of DenseNets.
        if key in ours and ours[key].is_floating_point() and not tensor.is_floating_point():
            return f"{key} is of type {str(tensor.dtype).removeprefix('torch.')}"
        if key not in skip and not key.startswith(("aux1.", "aux2.", "AuxLogits.")):
            state[re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)] = tensor
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
    except RuntimeError as failure:
        return str(failure).splitlines()[1].strip().rstrip(".")
    missing = [key for key in missing if key not in skip]
    if missing:
        return f"{missing[0]} is missing"
    return f"{unexpected[0]} is unexpected" if unexpected else None


def _imagenet_weights(name: str):
    """torchvision's ImageNet state_dict from torch.hub's cache or a download, verified by the SHA-256 in the file name."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.exists() and not digest(path).startswith(path.stem.rpartition("-")[2]):  # torch.hub does not verify cached files
        raise Failure(DATA, f"damaged ImageNet weights of {name} ({path}: wrong SHA-256)", "delete the file to download it again")
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=sys.stderr.isatty(), check_hash=True,
                                                  weights_only=True)
    except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError, RuntimeError) as failure:
        raise Failure(DATA, f"cannot download the ImageNet weights of {name} ({url}: {failure})",
                      f"copy the file to {path.parent}, or start from --init PATH, or --no-pretrained") from failure


def normalise(images, mean, std):
    """Images uint8 (N, H, W, 3) -> (x / 255 - mean) / std, float32 (N, 3, H, W) in channels_last, as by ToTensor and Normalize.

    mean, std: three numbers, or tensors on the images' device, which saves a copy.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 (N, H, W, 3), not {images.dtype} {tuple(images.shape)}")
    mean, std = (torch.as_tensor(values, dtype=torch.float32, device=images.device).view(3, 1, 1) for values in (mean, std))
    scaled = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    return scaled.div_(255).sub_(mean).div_(std)


def _renormalisation(mean, std, own_mean, own_std):
    """Forward pre-hook from images normalised by mean and std to those normalised by own_mean and own_std; None for the same."""
    if (tuple(mean), tuple(std)) == (tuple(own_mean), tuple(own_std)):
        return None
    mean, std, own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std, own_mean, own_std))
    exact = scale, shift = std / own_std, (mean - own_mean) / own_std

    def hook(net, inputs):
        nonlocal scale, shift
        images, = inputs
        if scale.device != images.device or scale.dtype != images.dtype:
            scale, shift = (part.to(images.device, images.dtype) for part in exact)
        return torch.addcmul(shift, images, scale)  # one pass over the batch
    return hook


def save(path, net, **info) -> None:
    """Save the weights of `net` for `load`.  info: the entries of METADATA, in plain types."""
    checkpoint.write(path, **info | {"kind": "weights", "state_dict": checkpoint.on_cpu(net.state_dict())})


class _Tracer(fx.Tracer):
    """Tracer that treats every module without children as a leaf, also one with data-dependent control flow."""

    def is_leaf_module(self, module, qualified_name: str) -> bool:
        return super().is_leaf_module(module, qualified_name) or not list(module.children())


def fold(net, image_size: int):
    """`net`, in eval mode, with BatchNorm folded into convolutions by PyTorch's fuse pass, for inference only.

    The logits change by at most 1e-5 of the largest.  A network that cannot be traced is returned unchanged.
    """
    try:
        traced = fx.GraphModule(net, _Tracer().trace(net))
    except Exception:  # forward may raise anything for the proxies of the tracer
        return net
    folded = fuse(traced, no_trace=True)
    folded.register_forward_pre_hook(partial(resize, image_size))  # hooks are not traced
    return folded.eval()


def read_teacher(path, network: str | None = None) -> dict:
    """The content of a best.pt, as from `read`, or of another project's weights, without the metadata that models.complete adds.

    network: its name; None: that of the best.pt, or guessed from the tensors.
    Failure CHECKPOINT: as in `read`, or weights of another or an unknown network.
    """
    missing = "train a teacher first: python train_teacher.py, or name one with --teacher-checkpoint"
    if network:
        check_name(network)
    content, sha256 = checkpoint.read_tensors(path, missing=missing)
    if checkpoint.is_own(content):
        content = read(path, missing)
        if network not in (None, content["model"]):
            raise Failure(CHECKPOINT, f"these weights are not a {network} ({path}: {content['model']})", "leave out --teacher")
        finite(content["state_dict"], path, CHECKPOINT)
        return content
    state = foreign.tensors(content, path)
    network = network or foreign.network_of(state, path)
    inputs = timm_networks.inputs(network) if is_timm(network) else {}
    imported = {"model": network, "state_dict": state, "test_acc1": None, "amp": "off", "imported": True, "sha256": sha256,
                "classes": foreign.class_names(content, path)}
    finite(imported["state_dict"], path, CHECKPOINT)
    return inputs | imported | {"path": path}


def finite(weights, path, code: int):
    """`weights`; Failure `code` if one of them is not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise Failure(code, f"weights that are not finite ({path}: {name})", "name another file")
    return weights


def read(path, missing: str = "check the path") -> dict:
    """The verified content of a best.pt: the entries of METADATA and more, its "path" and "sha256".

    Failure CHECKPOINT: damaged, not the weights of a network, or no such file, for which `missing` is the remedy.
    """
    content = {"amp": "bf16"} | checkpoint.read(path, missing) | {"path": path}  # the coarsest, for older files without it
    lacking = [key for key in METADATA if key not in content]
    if content.get("kind") != "weights" or lacking:
        reason = f"{lacking[0]} is missing" if lacking else f"its kind is {content.get('kind')}"
        raise Failure(CHECKPOINT, f"not the weights of a network ({path}: {reason})", "name a run's best.pt")
    return content


def load(source, device="cpu", dtype=torch.float32, *, folded: bool = False, inputs=None) -> nn.Module:
    """The trained network of a best.pt, in eval mode and frozen.

    `net.info`: the metadata of the file.  `net.size`: the number of parameters before folding.
    source: the path, or the result of `read`.
    dtype: of convolutions and linear layers; autocast's type saves casting the weights in every call.
    folded: fold BatchNorm into convolutions, which saves time and kernel launches.
    inputs: mean and std by which its inputs will be normalised, where they are not those of the metadata.
    Failure CHECKPOINT: as in `read`, and weights that do not match the network of their metadata; USAGE: no timm.
    """
    info = dict(source) if isinstance(source, dict) else read(source)
    if is_timm(info["model"]):
        timm_networks.package(info["model"])
    weights, path, _ = map(info.pop, ("state_dict", "path", "sha256"))
    info.setdefault("stored_size", info["image_size"])  # older files have none
    try:
        with torch.random.fork_rng(devices=()):  # keeps a student's random weights independent of the teacher
            net = build(info["model"], len(info["classes"]), info["image_size"], try_size=bool(info.get("imported")))
    except Failure as failure:
        raise Failure(CHECKPOINT, f"cannot build the network of a checkpoint ({path}: {info['model']})",
                      "use the version of this project that wrote it") from failure
    if mismatch := _load_state(net, weights):
        theirs = _classes_of(net, weights) if info.get("imported") else None
        if theirs not in (None, len(info["classes"])):
            raise Failure(CHECKPOINT, f"the teacher has {theirs} classes, the data {len(info['classes'])} ({path})",
                          "choose the --dataset or --data-dir of its training, or fine-tune it first: python train_teacher.py "
                          f"--model {info['model']} --init {path}")
        remedy = ("name the network that was saved with --teacher, and its --teacher-image-size" if info.get("imported") else
                  "restore the file from a copy or make it again")
        raise Failure(CHECKPOINT, f"these weights are not a {info['model']} ({path}: {mismatch})", remedy)
    size = parameters(net)
    if folded:
        net = fold(net.eval(), info["image_size"])
    if inputs and (changed := _renormalisation(inputs[0], inputs[1], info["mean"], info["std"])):
        net.register_forward_pre_hook(changed, prepend=True)
    net.info, net.size = info, size  # type: ignore[assignment]  # attributes of any type are allowed
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def predict(net, images, batch_size: int = 256):
    """Class probabilities, float32 (N, C) on the CPU, of images uint8 (N, H, W, 3), by a network from `load`."""
    device = next(net.parameters()).device
    mean, std = net.info["mean"], net.info["std"]
    return torch.cat([net(centre_crop(net, normalise(batch.to(device), mean, std))).float().softmax(1).cpu()
                      for batch in torch.as_tensor(images).split(batch_size)])
