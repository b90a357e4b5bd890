"""A data set as it is found, before it is split: images as uint8 tensors, their labels, the names of the classes."""
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Split(NamedTuple):
    """Images uint8 (N, H, W, 3), contiguous, and their labels int64 (N,)."""
    images: torch.Tensor
    labels: torch.Tensor

    def take(self, chosen: torch.Tensor) -> "Split":
        """The rows where `chosen`, bool (N,), in the order that they have."""
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Source:
    """A data set as it is found: no validation split yet. What is None, data.datasets's `load` makes."""
    train: Split
    test: Split | None
    classes: list[str]
    mean_and_std: tuple[tuple, tuple] | None = None
    val_size: int | None = None
