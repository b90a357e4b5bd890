"""The Triton kernels, a file each.  Here: the labels that they read, and whether they or their CPU paths ("reference") run."""
import os
from contextlib import nullcontext
from typing import NamedTuple

import torch

CHOICES = ("auto", "triton", "reference")
_choice = "auto"


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


def choose(name: str) -> None:
    """Set, once per process, what every op uses: "triton", "reference", or "auto", which is Triton for CUDA tensors."""
    global _choice
    if name not in CHOICES:
        raise ValueError(f"kernels must be one of {CHOICES}, not {name!r}")
    _choice = name


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors; it reads this when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(tensor: torch.Tensor):
    """A context in which kernels are launched on the GPU of `tensor`: Triton launches on the current one."""
    away = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if away else nullcontext()


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the fused kernel handles this tensor; the CPU path handles the others."""
    return _choice != "reference" and (tensor.is_cuda or _choice == "triton" and interpreted())
