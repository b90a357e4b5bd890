"""Policies as tables: what each operation does, as far as that does not depend on the image.

torchvision itself fills the tables, on the CPU, so every device that reads them agrees with it byte for byte.  A policy is a list
of sub-policies, drawn uniformly; a sub-policy is a tuple of operations (name, probability, magnitude, signed), where a signed
magnitude is negated in half of the draws.

AutoAugment: Cubuk et al. 2018, arXiv 1805.09501.  RandAugment: Cubuk et al. 2019, arXiv 1909.13719; its operations are drawn one
by one, so its sub-policies are all pairs of them.  TrivialAugment: Müller and Hutter 2021, arXiv 2103.10158; its sub-policies are
all operations at all magnitudes, and those without a magnitude as often.
"""
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

# Private, but the only functions that hold torchvision's own lists of magnitudes and the arguments of each operation.
from torchvision.transforms.autoaugment import (
    AutoAugment,
    AutoAugmentPolicy,
    InterpolationMode,
    RandAugment,
    TrivialAugmentWide,
    _apply_op,
)

from kernels.augment_constants import AUTOCONTRAST, COLOR, CONTRAST, EQUALIZE, GEOMETRY, LOOKUP, NOTHING, SHARPNESS

# The kinds of operation, in the order in which a batch is sorted: SHARPNESS to CONTRAST blend the image with another one, from
# EQUALIZE on each value is looked up in a table of 256 per channel.
KIND_OF = {
    "Identity": NOTHING,
    "ShearX": GEOMETRY, "ShearY": GEOMETRY, "TranslateX": GEOMETRY, "TranslateY": GEOMETRY, "Rotate": GEOMETRY,
    "Sharpness": SHARPNESS, "Color": COLOR, "Contrast": CONTRAST, "Equalize": EQUALIZE, "AutoContrast": AUTOCONTRAST,
    "Brightness": LOOKUP, "Posterize": LOOKUP, "Solarize": LOOKUP, "Invert": LOOKUP,
}
IDENTITY = ("Identity", 0.0)


def _operation(space, name, probability, level):
    magnitudes, signed = space[name]
    return name, probability, float(magnitudes[level]) if magnitudes.ndim else 0.0, signed


def _autoaugment(policy: AutoAugmentPolicy, size: int) -> list:
    published = AutoAugment(policy)
    space = published._augmentation_space(10, (size, size))
    return [tuple(_operation(space, *entry) for entry in subpolicy) for subpolicy in published.policies]


def _randaugment(size: int) -> list:
    published = RandAugment()
    space = published._augmentation_space(published.num_magnitude_bins, (size, size))
    operations = [_operation(space, name, 1.0, published.magnitude) for name in space]
    return list(itertools.product(operations, repeat=published.num_ops))


def _trivialaugment(size: int) -> list:
    published = TrivialAugmentWide()
    levels = published.num_magnitude_bins
    space = published._augmentation_space(levels)
    return [(_operation(space, name, 1.0, level),) for name in space for level in range(levels)]


POLICIES: dict[str, Callable[[int], list]] = {
    "none": lambda size: [()],
    "autoaugment": functools.partial(_autoaugment, AutoAugmentPolicy.CIFAR10),
    "autoaugment-imagenet": functools.partial(_autoaugment, AutoAugmentPolicy.IMAGENET),
    "autoaugment-svhn": functools.partial(_autoaugment, AutoAugmentPolicy.SVHN),
    "randaugment": _randaugment,
    "trivialaugment": _trivialaugment,
}


class PolicyTables(NamedTuple):
    """A policy at one image size: S sub-policies of `slots` operations, and C codes, one per operation and signed magnitude."""
    codes: torch.Tensor  # int64 (S, slots, 2), where the sign bit is 0 (negative) and 1; code 0 does nothing
    thresholds: torch.Tensor  # int64 (S, slots); the operation is applied where a draw from [0, 2^32) is below
    kind: torch.Tensor  # int64 (C,)
    argument: torch.Tensor  # int64 (C,), the row of `lookups` or `maps`
    ratio: torch.Tensor  # float32 (C,), the weight of the image in a blend
    complement: torch.Tensor  # float32 (C,), and of the other one
    lookups: torch.Tensor  # uint8 (L, 256)
    maps: torch.Tensor  # int32 (G, size*size), the pixel that each pixel is from; size*size is fill, 0
    stretch: torch.Tensor  # float32 (256,), AutoContrast's factor by the range of a channel
    operations: list[tuple[str, float]]  # (name, signed magnitude) of each code

    def to(self, device) -> "PolicyTables":
        return PolicyTables._make(table.to(device) if isinstance(table, torch.Tensor) else table for table in self)


def build_tables(policy: str, size: int) -> PolicyTables:
    """The tables of one of `POLICIES` for RGB images of size x size pixels, on the CPU; ValueError for any other name."""
    if policy not in POLICIES:
        raise ValueError(f"unknown policy ({policy}). choose one of {', '.join(POLICIES)}")
    subpolicies = POLICIES[policy](size)
    longest = max(map(len, subpolicies))
    subpolicies = [(*subpolicy, *[(*IDENTITY, 0.0, False)] * (longest - len(subpolicy))) for subpolicy in subpolicies]
    by_sign = [[[(name, -magnitude if signed else magnitude), (name, magnitude)] for name, _, magnitude, signed in subpolicy]
               for subpolicy in subpolicies]
    used = [operation for subpolicy in by_sign for pair in subpolicy for operation in pair]
    operations = list(dict.fromkeys([IDENTITY, *used]))
    code_of = {operation: code for code, operation in enumerate(operations)}
    codes = [[[code_of[operation] for operation in pair] for pair in subpolicy] for subpolicy in by_sign]
    thresholds = [[int(probability * 2 ** 32) for _, probability, _, _ in subpolicy] for subpolicy in subpolicies]

    kinds = [KIND_OF[name] for name, _ in operations]
    rows = {table: [IDENTITY] + [operation for kind, operation in zip(kinds, operations) if kind == table]
            for table in (LOOKUP, GEOMETRY)}
    argument = [rows[kind].index(operation) if kind in rows else 0 for kind, operation in zip(kinds, operations)]

    def applied(kind, image):
        return torch.stack([_apply_op(image, *operation, InterpolationMode.NEAREST, None).flatten() for operation in rows[kind]])
    # An image whose values are its pixel numbers, from 1, shows when moved where each pixel is from; 0 is fill. float32 is exact.
    pixel_numbers = torch.arange(1, size * size + 1, dtype=torch.float32).view(1, size, size)
    source = applied(GEOMETRY, pixel_numbers).int() - 1

    ratio = [1.0 + magnitude for _, magnitude in operations]
    stretch = 255 / torch.arange(256, dtype=torch.float32)
    stretch[0] = 1  # a flat channel stays as it is
    shape = len(subpolicies), len(subpolicies[0])
    return PolicyTables(
        codes=torch.tensor(codes, dtype=torch.int64).view(*shape, 2),
        thresholds=torch.tensor(thresholds, dtype=torch.int64).view(shape),
        kind=torch.tensor(kinds),
        argument=torch.tensor(argument),
        ratio=torch.tensor(ratio),
        complement=torch.tensor([1.0 - weight for weight in ratio]),
        lookups=applied(LOOKUP, torch.arange(256, dtype=torch.uint8).view(1, 1, 256)),
        maps=torch.where(source < 0, size * size, source),
        stretch=stretch,
        operations=operations)
