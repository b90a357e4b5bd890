"""Labels of a batch of Mixup or CutMix images."""
from typing import NamedTuple

import torch


class Targets(NamedTuple):
    """The soft label `lam * onehot(label) + (1 - lam) * onehot(other)` of every row; unmixed: `other == label` and `lam == 1`.

    label, other: int64 (N,).  lam: float32 (N,), in [0, 1].
    """
    label: torch.Tensor
    other: torch.Tensor
    lam: torch.Tensor

    @classmethod
    def unmixed(cls, label: torch.Tensor) -> "Targets":
        return cls(label, label, torch.ones(label.shape, device=label.device))

    @property
    def dominant(self) -> torch.Tensor:
        """int64 (N,): the label with the larger share, `label` where both are half."""
        return torch.where(self.lam >= 0.5, self.label, self.other)
