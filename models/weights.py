"""Weights of networks: from files of ours, from torchvision, and trained networks in use."""
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

from models.networks import build, natural_size, parameters, resize, torchvision_name
from rundir import checkpoint
from rundir.errors import CHECKPOINT, DATA, USAGE, Failure
from rundir.files import digest

# What a file of weights must hold for `load` to use it; the scripts store more.
CARD = ("model", "classes", "image_size", "mean", "std", "dataset", "state_dict")


def initialise(net, name: str, *, pretrained: bool = False, init=None) -> str | None:
    """Give `net`, just built as `name`, the weights in the file `init` or else, if `pretrained`, ImageNet's, all but the head.

    `init` is a best.pt of ours or a bare state_dict; returns its SHA-256.  The head stays random; all else must fit exactly.
    Failure DATA: weights missing, damaged, not to be downloaded, or another network's; USAGE: no ImageNet weights for this
    network or size.
    """
    head, sha256 = _head(net), None
    if init is not None:
        content, sha256 = checkpoint.read_tensors(init, DATA)
        if isinstance(content, dict) and "state_dict" in content:
            content = content["state_dict"]
        if misfit := _fill(net, content, head):
            raise Failure(DATA, f"these weights are not a {name} ({init}: {misfit})", "name the weights of the same network")
    elif pretrained:
        theirs = torchvision_name(name)
        if theirs is None:
            raise Failure(USAGE, f"there are no ImageNet weights of {name}", "use --no-pretrained, or --init PATH")
        if misfit := _fill(net, _imagenet_weights(theirs), head):
            raise Failure(USAGE, f"the ImageNet weights of {name} do not fit this image size ({misfit})",
                          f"use --image-size {natural_size(name)}, or --no-pretrained")
    return sha256


def _head(net) -> frozenset[str]:
    """The state_dict keys of the layer that makes the logits: in every network here the last one that has such weights."""
    name, layer = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    return frozenset(f"{name}.{key}" for key in layer.state_dict())


def _fill(net, weights, without=frozenset()) -> str | None:
    """Copy `weights` into `net`, all but the keys `without`; on a misfit, what is wrong with the first key that does not fit."""
    if not isinstance(weights, dict) or not weights or not all(isinstance(key, str) for key in weights):
        return "no weights in it"
    state: OrderedDict = OrderedDict()
    # Layer versions travel as an attribute; by them, or their absence, torch and torchvision read older layouts of single layers.
    # A plain dict has lost them; MNASNet alone insists on one, for the whole network.
    state._metadata = getattr(weights, "_metadata", None) or {"": {"version": net._version}}  # type: ignore[attr-defined]
    for key, tensor in weights.items():
        # Files of torchvision hold training-time heads that we do not build, and DenseNets name their layers in an older way.
        if key not in without and not key.startswith(("aux1.", "aux2.", "AuxLogits.")):
            state[re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)] = tensor
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
    except RuntimeError as failure:
        return str(failure).splitlines()[1].strip().rstrip(".")
    missing = [key for key in missing if key not in without]
    if missing:
        return f"{missing[0]} is missing"
    return f"{unexpected[0]} is unexpected" if unexpected else None


def _imagenet_weights(name: str):
    """torchvision's ImageNet state_dict from torch.hub's cache or the network, checked by the SHA-256 in its file name."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    folder = Path(torch.hub.get_dir(), "checkpoints")
    path = folder / url.rpartition("/")[2]
    prefix = path.stem.rpartition("-")[2]
    if path.exists():  # torch.hub itself never looks at a cached file again
        if not digest(path).startswith(prefix):
            raise Failure(DATA, f"damaged ImageNet weights of {name} ({path}: wrong SHA-256)",
                          "delete the file to download it again")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=sys.stderr.isatty())
        except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError, RuntimeError) as failure:
            raise Failure(DATA, f"cannot download the ImageNet weights of {name} ({url}: {failure})",
                          f"copy the file to {folder}, or start from --init PATH, or --no-pretrained") from failure
    return torch.load(path, map_location="cpu", weights_only=True)


def normalise(images, mean, std):
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) channels_last: (x / 255 - mean) / std, as ToTensor and Normalize do.

    `mean` and `std` are three numbers each, or tensors of them on the images' device, which saves copying them.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 (N, H, W, 3), not {images.dtype} {tuple(images.shape)}")
    mean, std = (torch.as_tensor(numbers, dtype=torch.float32, device=images.device).view(3, 1, 1) for numbers in (mean, std))
    scaled = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    return scaled.div_(255).sub_(mean).div_(std)


def save(path, net, **info) -> None:
    """Write what `load` reads: the weights of `net` and, in plain types, all that `CARD` asks for, as a loaded `info` has it."""
    checkpoint.write(path, **info | {"kind": "weights", "state_dict": checkpoint.on_cpu(net.state_dict())})


class _Tracer(fx.Tracer):
    """Looks into no layer without parts, also where its forward depends on its input."""

    def is_leaf_module(self, module, qualified_name: str) -> bool:
        return super().is_leaf_module(module, qualified_name) or not list(module.children())


def fold(net, image_size: int):
    """`net`, in eval mode, for inference alone: each BatchNorm behind a convolution becomes part of it, by PyTorch's own pass.

    The logits are the same to 1e-5 of the largest.  A network that cannot be traced is given back as it is.
    """
    try:
        traced = fx.GraphModule(net, _Tracer().trace(net))
    except Exception:  # tracing calls forward with stand-ins, on which it may do anything
        return net
    folded = fuse(traced, no_trace=True)
    folded.register_forward_pre_hook(partial(resize, image_size))  # hooks are not traced
    return folded.eval()


def read(path, missing: str = "check the path") -> dict:
    """A best.pt, every byte checked: what CARD names and more, its weights in "state_dict", its "path" and "sha256".

    Failure CHECKPOINT: damaged, not the weights of a network, or no such file, for which `missing` is the remedy.
    """
    content = {"amp": "bf16"} | checkpoint.read(path, missing) | {"path": path}  # older files state no precision: the coarsest
    lacking = [key for key in CARD if key not in content]
    if content.get("kind") != "weights" or lacking:
        reason = f"{lacking[0]} is missing" if lacking else f"its kind is {content.get('kind')}"
        raise Failure(CHECKPOINT, f"not the weights of a network ({path}: {reason})", "name a run's best.pt")
    return content


def load(source, device="cpu", dtype=torch.float32, *, folded: bool = False) -> nn.Module:
    """The trained network in a best.pt, in eval mode and frozen; `net.info` is what the file says of it, all but the weights.

    source: its path, or what `read` returned.
    dtype: in which convolutions and linear layers are held.  Under autocast it saves casting their weights at every call.
    folded: without the BatchNorms that can be folded into convolutions, which saves time and, on a GPU, launches.
    `net.size` is the number of its parameters, unfolded.
    Failure CHECKPOINT: as for `read`, and weights that are not those of the network that they name.
    """
    info = dict(source) if isinstance(source, dict) else read(source)
    weights, path, _ = map(info.pop, ("state_dict", "path", "sha256"))
    try:
        with torch.random.fork_rng(devices=()):  # a student's random weights must not depend on the teacher loaded before it
            net = build(info["model"], len(info["classes"]), info["image_size"])
    except Failure as failure:
        raise Failure(CHECKPOINT, f"cannot build the network of a checkpoint ({path}: {info['model']})",
                      "use the version of this project that wrote it") from failure
    if misfit := _fill(net, weights):
        raise Failure(CHECKPOINT, f"these weights are not a {info['model']} ({path}: {misfit})",
                      "restore the file from a copy or make it again")
    size = parameters(net)
    if folded:
        net = fold(net.eval(), info["image_size"])
    net.info, net.size = info, size  # type: ignore[assignment]  # a Module takes any attribute
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def predict(net, images, batch_size: int = 256):
    """Class probabilities, float32 (N, C) on the CPU, of uint8 images (N, H, W, 3), for a network that `load` returned."""
    device = next(net.parameters()).device
    return torch.cat([net(normalise(batch.to(device), net.info["mean"], net.info["std"])).float().softmax(1).cpu()
                      for batch in torch.as_tensor(images).split(batch_size)])
