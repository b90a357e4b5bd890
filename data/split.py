"""A split, and a data set before the validation split is drawn."""
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Split(NamedTuple):
    """Images uint8 (N, H, W, 3), contiguous, and their labels int64 (N,)."""
    images: torch.Tensor
    labels: torch.Tensor

    def take(self, chosen: torch.Tensor) -> "Split":
        """The rows selected by the mask `chosen`, bool (N,)."""
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Source:
    """A data set as stored on disk; data.datasets.load draws or computes the fields that are None.

    notes: lines for the user.  unreadable: path and reason of each file that was skipped.
    """
    train: Split
    test: Split | None
    classes: list[str]
    mean_and_std: tuple[tuple, tuple] | None = None
    val_size: int | None = None
    val: Split | None = None
    notes: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
