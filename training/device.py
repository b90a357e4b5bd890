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
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        """Enabled for FP16 alone; BF16 has FP32's range."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def describe(self) -> dict:
        return {"device": str(self.device), "amp": self.precision, "kernels": self.kernels, "processes": self.ranks.size,
                "compile": self.compiled}

    def compile(self, net, captured: bool = False):
        """`net`, compiled where --compile says so.  captured: inside a CUDA graph, so that torch.compile makes none."""
        if not self.compiled:
            return net
        print("compiling a network with torch.compile: the first step takes a minute or more", flush=True)
        own_graphs = self.device.type == "cuda" and not captured
        if own_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # until the first mark, each network would overwrite the others' outputs
        return torch.compile(net, mode="reduce-overhead" if own_graphs else None)


def setup_context(device: str, amp: str | None, seed: int, kernels_choice: str = "auto", deterministic: bool = False,
                  compiled: bool = False) -> RunContext:
    """Seed the global generator and choose device, precision and kernels.  Under torchrun each process has its own GPU.

    deterministic: bitwise reproducible on one machine with one set of versions; slower on a GPU.
    """
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # saves a launch for each new tensor
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is initialised
    ranks = Ranks.of_environment()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1 and device != "cpu":
        if device != "cuda":
            raise Failure(USAGE, f"every process needs its own GPU (--device {device})", "leave out --device")
        device = f"cuda:{ranks.local}"
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        if (device.index or 0) >= torch.cuda.device_count():
            fewer = ", or fewer processes per machine" if ranks.size > 1 else ""
            raise Failure(USAGE, f"no such GPU here (--device {device})", f"use --device cpu{fewer}, or check the driver")
        device = torch.device("cuda", device.index or 0)  # torch.cuda.set_device needs an index
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = amp != "off"  # TF32 keeps 10 of FP32's 23 mantissa bits
    kernels.choose(kernels_choice)
    fused = kernels.use_triton(torch.empty(0, device=device))
    if kernels_choice == "triton" and not fused:
        raise Failure(USAGE, f"Triton needs a GPU (--kernels triton, --device {device})",
                      "use --kernels auto, or set TRITON_INTERPRET=1 to run it in Python")
    amp = amp or ("fp16" if device.type == "cuda" else "off")
    return RunContext(device, amp, "triton" if fused else "reference", ranks, compiled)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step: new pages from the kernel would be zeroed again.  No-op without glibc."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def set_threads(count: int) -> None:
    """Set the number of CPU threads, on which the last bits of sums depend."""
    if count != (now := torch.get_num_threads()):
        print(f"using {count} threads, as the run began with, instead of {now}: the results stay bitwise the same")
        torch.set_num_threads(count)


def global_batch_size(each: int, data, context: RunContext) -> int:
    """Images per step over all processes, with `each` per process; prints it where there are several."""
    processes, images = context.ranks.size, len(data.train.labels)
    total = each * processes
    if total > images:
        print(data)  # what was left out may be why
        share = f"{processes} times {each}" if processes > 1 else each
        raise Failure(USAGE, f"--batch-size is larger than the training set ({share} of {images} images)", "choose a smaller one")
    if processes > 1:
        if each % 2:
            raise Failure(USAGE, f"an odd --batch-size splits a pair of mixed images ({each} in each of {processes} processes)",
                          "choose an even one")
        print(f"{processes} processes with --batch-size {each}: {total} images a step")
    return total


def micro_batches(rows: range, count: int) -> list[range]:
    """`rows` of a batch in `count` micro-batches of equal and, as neighbours may be mixed, even size."""
    each = len(rows) // count
    if each * count != len(rows) or (each % 2 and count > 1):
        raise Failure(USAGE, f"a batch cannot be split into so many micro-batches (--grad-accum {count} of {len(rows)} images)",
                      "choose one that leaves micro-batches of equal and even size")
    return [rows[first:first + each] for first in range(0, len(rows), each)]
