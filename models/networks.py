"""Networks by name, with random weights.

Three kinds of names (`names()` lists them):
- the CIFAR networks of the published distillation tables (CRD, Tian et al. 2020, arXiv 1910.10699, and its followers), the
  same layer for layer: their ResNets have 1x1 convolutions as shortcuts, their MobileNetV2 has half the width;
- `v2_pico` and `v2_tiny`, EfficientNetV2 (Tan and Le 2021, arXiv 2104.00298) in miniature, student and teacher of the demo;
- torchvision's classifiers.  `vgg13` and `mobilenet_v2` mean the CIFAR networks; torchvision's are `torchvision/vgg13` and
  `torchvision/mobilenet_v2`.  The prefix is allowed before every torchvision name.

Every network maps float images (N, 3, H, W) to logits (N, C); images of another size than its own it resizes first, on their
device, so that a 224-pixel teacher and a 32-pixel student can be given the same batch.  Adding a network is one function and
one line in `NETWORKS` of models/cifar_networks.py.
"""
import difflib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.cifar_networks import NETWORKS
from rundir.errors import USAGE, Failure, first_line

PREFIX = "torchvision/"


def torchvision_name(name: str) -> str | None:
    """torchvision's own name for the network that `name` means here; None where it means one of ours or nothing."""
    short = name.removeprefix(PREFIX)
    return short if name not in NETWORKS and short in torchvision.models.list_models(module=torchvision.models) else None


def is_torchvision(name: str) -> bool:
    """Whether `name` is a torchvision classifier, which has ImageNet weights; `vgg13` and `mobilenet_v2` are not."""
    return torchvision_name(name) is not None


def names() -> list[str]:
    """Every name that `build` accepts, each network once: ours, then torchvision's."""
    theirs = torchvision.models.list_models(module=torchvision.models)
    return [*NETWORKS, *(PREFIX + name if name in NETWORKS else name for name in theirs)]


def natural_size(name: str) -> int:
    """The side in pixels of the images that a network was designed for."""
    theirs = torchvision_name(name)
    return torchvision.models.get_model_weights(theirs).DEFAULT.transforms.keywords["crop_size"] if theirs else 32


def resize(image_size: int, net, inputs):
    """Forward pre-hook: bilinear to `image_size`, keeping dtype and memory format; nothing where the size is right."""
    images, = inputs
    if images.shape[-2:] == (image_size, image_size):
        return None
    return F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False, antialias=False)


def on_meta(net, image_size: int):
    """The logits of one image in eval mode, in shape only: no arithmetic, no random number, nothing left changed."""
    training = [module for module in net.modules() if module.training]
    tensors = {name: tensor.to("meta") for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    net.eval()
    try:
        with torch.no_grad():
            return torch.func.functional_call(net, tensors, torch.empty(1, 3, image_size, image_size, device="meta"))
    finally:
        for module in training:
            module.training = True


def _build_torchvision(name: str, num_classes: int, image_size: int) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads would make training mode return a tuple; the ImageNet weights expect inputs rescaled by the network.
        options: dict[str, Any] = {"aux_logits": False, "init_weights": True, "transform_input": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    else:
        options = {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def build(name: str, num_classes: int, image_size: int = 32) -> nn.Module:
    """The network `name` with random weights in channels_last and a head of `num_classes`, for images of `image_size` pixels.

    Images of another size are resized as they come in.  Failure USAGE: no such name, or one that cannot work at that size.
    """
    theirs = torchvision_name(name)
    if theirs is None and name not in NETWORKS:
        close = difflib.get_close_matches(name, names())
        question = f"did you mean {' or '.join(close)}? " if close else ""
        command = 'python -c "import models; print(*models.names())"'
        raise Failure(USAGE, f"unknown model ({name})", f"{question}all names: {command}")
    try:
        net = _build_torchvision(theirs, num_classes, image_size) if theirs else NETWORKS[name](num_classes)
        for module in net.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = False  # in place, training copies what the backward pass needs
        net.register_forward_pre_hook(partial(resize, image_size))
        on_meta(net, image_size)
    except (RuntimeError, ValueError, AssertionError) as failure:  # what layers raise for sizes they cannot take
        raise Failure(USAGE, f"{name} cannot work on images of {image_size}x{image_size} ({first_line(failure)})",
                      f"use --image-size {natural_size(name)}") from failure
    return net.to(memory_format=torch.channels_last)


def parameters(net) -> int:
    """The number of trainable numbers, as published: buffers are not counted."""
    return sum(parameter.numel() for parameter in net.parameters())


def flops(net, image_size: int) -> int:
    """Floating-point operations of one image in eval mode, 2 per multiply-add, of matrix products and convolutions.

    Traced without arithmetic: on real tensors the counter misses the fused attention that torch uses in eval mode.
    """
    with FlopCounterMode(display=False) as counter:
        on_meta(net, image_size)
    return counter.get_total_flops()
