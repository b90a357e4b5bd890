"""The Triton kernels, a file each.  Here: whether they run, or their CPU paths in plain PyTorch ("reference")."""
import os

import torch

CHOICES = ("auto", "triton", "reference")
_choice = "auto"


def choose(name: str) -> None:
    """Set, once per process, what every op uses: "triton", "reference", or "auto", which is Triton for CUDA tensors."""
    global _choice
    if name not in CHOICES:
        raise ValueError(f"kernels must be one of {CHOICES}, not {name!r}")
    _choice = name


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors; it reads this when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the fused kernel handles this tensor; the CPU path handles the others."""
    return _choice != "reference" and (tensor.is_cuda or _choice == "triton" and interpreted())
