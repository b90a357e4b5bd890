"""The context of a run: device, precision, kernels, processes."""
import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

import kernels
from rundir.errors import USAGE, Failure
from training.distributed import Ranks

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
AMP = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": torch.float32}


@dataclass(frozen=True)
class RunContext:
    """Device, precision (a key of AMP), kernels ("triton" or "reference"), processes, and whether networks are compiled."""
    device: torch.device
    precision: str
    kernels: str = "reference"
    ranks: Ranks = Ranks()
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return AMP[self.precision]

    @cached_property
    def autocast(self) -> torch.autocast:
        """To enter around forward passes, again and again."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        """fp16 gradients need scaling; the other types have fp32's range."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def describe(self) -> dict:
        return {"device": str(self.device), "amp": self.precision, "kernels": self.kernels, "processes": self.ranks.size,
                "compile": self.compiled}

    def compile(self, net, captured: bool = False):
        """`net` as a step is to call it.  captured: inside of a CUDA graph, so that it needs none of its own."""
        if not self.compiled:
            return net
        print("compiling a network with torch.compile: the first step takes a minute or more", flush=True)
        on_gpu = self.device.type == "cuda"
        return torch.compile(net, mode="reduce-overhead" if on_gpu and not captured else None)

    def memory(self) -> str:
        """What this process has taken of the GPU's memory at the most, CUDA graphs included, and how much the GPU has."""
        taken, total = torch.cuda.max_memory_reserved(self.device), torch.cuda.mem_get_info(self.device)[1]
        return f"{taken / 2**30:.1f} of {total / 2**30:.1f} GiB"

    def peak_memory_mb(self):
        return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1) if self.device.type == "cuda" else None


def setup_context(device: str, amp: str | None, seed: int, kernels_choice: str = "auto", deterministic: bool = False,
                    compiled: bool = False) -> RunContext:
    """Seed the weights' initialisation and choose device, precision and kernels; the data have generators of their own.

    Under torchrun each process has a GPU of its own, or all share the CPU.
    deterministic: the same bits every time on one machine and one set of versions, at some cost on a GPU.
    """
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # one more launch for each new tensor
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    ranks = Ranks.of_environment()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1 and device != "cpu":
        if device != "cuda":
            raise Failure(USAGE, f"every process needs a GPU of its own (--device {device})", "leave out --device")
        device = f"cuda:{ranks.local}"
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        if (device.index or 0) >= torch.cuda.device_count():
            fewer = ", or fewer processes per machine" if ranks.size > 1 else ""
            raise Failure(USAGE, f"no such GPU here (--device {device})", f"use --device cpu{fewer}, or check the driver")
        device = torch.device("cuda", device.index or 0)  # CUDA takes no device without a number
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = amp != "off"  # which would keep 10 of fp32's 23 bits in every convolution
    kernels.choose(kernels_choice)
    fused = kernels.use_triton(torch.empty(0, device=device))
    if kernels_choice == "triton" and not fused:
        raise Failure(USAGE, f"Triton needs a GPU (--kernels triton, --device {device})",
                      "use --kernels auto, or set TRITON_INTERPRET=1 to run it in Python")
    usual = "fp16" if device.type == "cuda" else "off"
    return RunContext(device, amp or usual, "triton" if fused else "reference", ranks, compiled)


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, rather than give it to the kernel, which would hand out pages anew and
    fill them with zeros.  Any other C library does as it always does."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def set_threads(count: int) -> None:
    """Compute on the CPU with so many threads: in another number of parts, sums come to other bits."""
    if count != (now := torch.get_num_threads()):
        print(f"{count} threads, as the run began with, and not {now}, which would come to other bits")
        torch.set_num_threads(count)


def global_batch_size(each: int, data, context: RunContext) -> int:
    """Images per step, where every process takes `each` of them; says so where there are several."""
    processes, images = context.ranks.size, len(data.train.labels)
    together = each * processes
    if together > images:
        share = f"{processes} times {each}" if processes > 1 else each
        raise Failure(USAGE, f"--batch-size is larger than the training set ({share} of {images} images)", "choose a smaller one")
    if processes > 1:
        if each % 2:
            raise Failure(USAGE, f"an odd --batch-size parts pairs of images to mix ({each} in each of {processes} processes)",
                          "choose an even one")
        print(f"{processes} processes with --batch-size {each}: {together} images a step")
    return together


def micro_batches(rows: range, count: int) -> list[range]:
    """`rows` of a batch in `count` micro-batches of one size, in whole pairs, which may be mixed."""
    each = len(rows) // count
    if each * count != len(rows) or (each % 2 and count > 1):
        raise Failure(USAGE, f"a batch cannot be cut into so many micro-batches (--grad-accum {count} of {len(rows)} images)",
                      "choose one that leaves equal parts of an even number of images")
    return [rows[first:first + each] for first in range(0, len(rows), each)]
