"""A split, and a data set before the validation split is drawn."""
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Split(NamedTuple):
    """N labelled images: all of `stored`, uint8 (M, H, W, 3), or those at `rows`, int64 (N,).  labels: int64 (N,).

    Splits of one data set share `stored`, and so do the runs on one machine where it is a mapped file.
    """
    stored: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor | None = None

    def take(self, chosen: torch.Tensor) -> "Split":
        """The images selected by the mask `chosen`, bool (N,)."""
        rows = torch.arange(len(chosen)) if self.rows is None else self.rows
        return Split(self.stored, self.labels[chosen], rows[chosen])

    def part(self, chosen) -> torch.Tensor:
        """The images at `chosen`, a slice or an index tensor, uint8 (n, H, W, 3)."""
        return self.stored[chosen if self.rows is None else self.rows[chosen]]

    @property
    def images(self) -> torch.Tensor:
        """All N images, uint8 (N, H, W, 3): a copy if they are not all of `stored`."""
        return self.part(slice(None))


@dataclass(frozen=True)
class Source:
    """A data set as stored on disk; data.datasets.load draws or computes the fields that are None.

    notes: lines for the user.  unreadable: path and reason of each file that was skipped.
    names: of the training images, with their class; splits are drawn by them, so that images that are added later hardly change
    the splits, and the layout does not.
    """
    train: Split
    test: Split | None
    classes: list[str]
    mean_and_std: tuple[tuple, tuple] | None = None
    val_size: int | None = None
    val: Split | None = None
    notes: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    names: list[str] | None = None
