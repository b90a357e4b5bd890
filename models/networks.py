"""Construction of networks by name, with random weights.

Four kinds of names (`names()` lists them):
- the CIFAR networks of the published distillation tables (CRD, Tian et al. 2020, arXiv 1910.10699; DKD, Zhao et al. 2022,
  arXiv 2203.08679), layer for layer: the ResNets have 1x1 convolutions as shortcuts, MobileNetV2 has half the width.  The tables'
  ResNet18, ResNet50, ShuffleV1 and ShuffleV2 are `cifar_resnet18`, `cifar_resnet50`, `shufflenet_v1` and `shufflenet_v2`;
- `v2_pico` and `v2_tiny`, small EfficientNetV2s (Tan and Le 2021, arXiv 2104.00298), student and teacher of the demo;
- torchvision's classifiers, with an optional prefix: `torchvision/vgg13` and `torchvision/mobilenet_v2` need it, and VGG-11, 16
  and 19, because `vgg13` and `mobilenet_v2` are the CIFAR networks;
- timm's, with their prefix: `timm/convnext_atto`.  timm is an optional package.

Every network maps float images (N, 3, H, W) to logits (N, C).  It resizes its input to its own image size on the device, so a
224-pixel teacher and a 32-pixel student can share a batch.  To add a network: one function and one line in `NETWORKS` of
models/cifar_networks.py.
"""
import difflib
import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from models import timm_networks
from models.cifar_networks import NETWORKS
from models.timm_networks import is_timm
from rundir.errors import USAGE, Failure, first_line

PREFIX = "torchvision/"


def torchvision_name(name: str) -> str | None:
    """`name` without prefix if it is a torchvision classifier; None for a network of this project or an unknown name."""
    short = name.removeprefix(PREFIX)
    return short if name not in NETWORKS and short in torchvision.models.list_models(module=torchvision.models) else None


def has_weights(name: str) -> bool:
    """Whether torchvision or timm has trained weights of this network, as a rule of ImageNet."""
    return timm_networks.config(name).has_weights if is_timm(name) else torchvision_name(name) is not None


def names() -> list[str]:
    """The names that `build` accepts, one per network: CIFAR networks, then torchvision's, then timm's if it is installed."""
    return [*_names(), *timm_networks.names()]


def _names() -> list[str]:
    classifiers = torchvision.models.list_models(module=torchvision.models)
    return [*NETWORKS, *(PREFIX + name if name in NETWORKS else name for name in classifiers)]


def _similar(name: str) -> list[str]:
    """Names that differ from `name` only by prefix, case and punctuation, or else similar ones; each with its kind."""
    def letters(name):
        return re.sub("[^a-z0-9]|^(torchvision/|cifar_)", "", name.lower())

    choices = sorted({letters(known) for known in _names()})
    found = [letters(name)] if letters(name) in choices else difflib.get_close_matches(letters(name), choices)
    return [f"{known} (torchvision, for {natural_size(known)} pixels)" if torchvision_name(known) else f"{known} (CIFAR network)"
            for known in _names() if letters(known) in found]


def check_name(name: str) -> None:
    """Failure USAGE: unknown name, or one of timm's without timm."""
    if is_timm(name):
        timm_networks.config(name)
    elif name not in NETWORKS and not torchvision_name(name):
        raise timm_networks.unknown(name, _similar(name), "import models; print(*models.names())")


def natural_size(name: str) -> int:
    """Image size in pixels of the published network."""
    if is_timm(name):
        return timm_networks.inputs(name)["image_size"]
    short_name = torchvision_name(name)
    return torchvision.models.get_model_weights(short_name).DEFAULT.transforms.keywords["crop_size"] if short_name else 32


def resize(image_size: int, net, inputs):
    """Forward pre-hook: bilinear resize to `image_size`, which keeps dtype and memory format."""
    images, = inputs
    if images.shape[-2:] == (image_size, image_size):
        return None
    return F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False, antialias=False)


def input_sizes(image_size: int | None, native: int, crop: str) -> dict[str, int]:
    """"image_size" and "stored_size" of a network that is trained on images of `native` pixels, by the flags."""
    image_size = image_size or native
    return {"image_size": image_size, "stored_size": max(image_size, native) if crop == "resized" else image_size}


def centre_crop(net, images):
    """Float images (N, 3, H, W) as `net` sees them outside of training, by its metadata `net.info`.

    Trained on windows of images of `stored_size` pixels, it sees the centre of `image_size`; else all, which it resizes.
    """
    info = getattr(net, "info", {})
    size, stored = info.get("image_size"), info.get("stored_size")
    if stored in (None, size):
        return images
    first, images = (stored - size) // 2, F.interpolate(images, (stored, stored), mode="bilinear", align_corners=False)
    return images[..., first:first + size, first:first + size]


def meta_forward(net, image_size: int):
    """Forward pass of one image in eval mode on the meta device; consumes no random numbers and leaves `net` unchanged."""
    training = [module for module in net.modules() if module.training]
    tensors = {name: tensor.to("meta") for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    net.eval()
    try:
        with torch.no_grad():
            return torch.func.functional_call(net, tensors, torch.empty(1, 3, image_size, image_size, device="meta"))
    finally:
        for module in training:
            module.training = True


class _LastPooling(TorchFunctionMode):
    """Records in `shape` the input of the last average pooling, as a module or a function; None without any."""

    shape = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.adaptive_avg_pool2d, torch.Tensor.mean):
            self.shape = args[0].shape
        return func(*args, **(kwargs or {}))


def describe(name: str, net, image_size: int) -> str:
    """One line: the parameters of `net`, and a note if its last feature map is 1x1 at this size, unless it is a CIFAR network."""
    text = f"{name}: {parameters(net) / 1e6:.2f} M parameters"
    if name not in NETWORKS:
        with _LastPooling() as pooling:
            meta_forward(net, image_size)
        if pooling.shape and pooling.shape[2:] == (1, 1):
            text += f"; its last feature map is 1x1 at {image_size} pixels (published for {natural_size(name)})"
    return text


def _new(name: str, num_classes: int, image_size: int) -> nn.Module:
    if is_timm(name):
        return timm_networks.create(name, num_classes, image_size)
    if name in NETWORKS:
        return NETWORKS[name](num_classes)
    options: dict[str, Any] = {}
    short_name = name.removeprefix(PREFIX)
    if short_name in ("googlenet", "inception_v3"):
        # With auxiliary heads, training mode returns a tuple; the ImageNet weights expect inputs rescaled by the network.
        options = {"aux_logits": False, "init_weights": True, "transform_input": True}
    elif short_name.startswith("vit_"):
        options = {"image_size": image_size}
    elif short_name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    return torchvision.models.get_model(short_name, weights=None, num_classes=num_classes, **options)


def build(name: str, num_classes: int, image_size: int = 32, *, try_size: bool = True) -> nn.Module:
    """The network `name` with random weights in channels_last, for images of `image_size` pixels; others are resized.

    try_size: by a forward pass on the meta device, which takes 0.05 s or more; not needed where it was trained at this size.
    Failure USAGE: unknown name, no timm, or a network that does not support this size.
    """
    check_name(name)
    try:
        net = _new(name, num_classes, image_size)
        for module in net.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = False  # autograd would copy the input
        net.register_forward_pre_hook(partial(resize, image_size))
        if try_size:
            meta_forward(net, image_size)
    except (RuntimeError, ValueError, AssertionError) as failure:  # raised by layers for unsupported sizes
        raise Failure(USAGE, f"{name} cannot work on images of {image_size}x{image_size} ({first_line(failure)})",
                      f"use --image-size {natural_size(name)}") from failure
    return net.to(memory_format=torch.channels_last)


def parameters(net) -> int:
    """The number of trainable parameters, without buffers."""
    return sum(parameter.numel() for parameter in net.parameters())


def flops(net, image_size: int) -> int:
    """FLOPs of matrix products and convolutions for one image in eval mode, 2 per multiply-add.

    Counted on the meta device: on real tensors the counter misses PyTorch's fused attention of eval mode.
    """
    with FlopCounterMode(display=False) as counter:
        meta_forward(net, image_size)
    return counter.get_total_flops()
