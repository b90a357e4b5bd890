"""How fast a step could be at most: its arithmetic, its traffic and its launches, over what the hardware was measured to do."""
import time
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.table import synchronize

SIDE = 2048  # of the square matrices whose product measures the rate of arithmetic
COPIED = 2**26  # bytes
REPEATS = 10


class Work(NamedTuple):
    """Of one step: floating-point operations of matrix products and convolutions, 2 per multiply-add; bytes that its operations
    read and write, each by itself; operations that launch something."""
    flops: int
    nbytes: int
    launches: int


class Rates(NamedTuple):
    """A device in one precision, measured: FLOP/s of a matrix product, bytes/s read and written by a copy, seconds a launch."""
    flops: float
    nbytes: float
    launch: float

    def bounds_ms(self, work: Work) -> tuple[float, float, float]:
        """Milliseconds that the arithmetic, the traffic and the launches of a step take at these rates."""
        return 1000 * work.flops / self.flops, 1000 * work.nbytes / self.nbytes, 1000 * work.launches * self.launch


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.nbytes = self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            there = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
            self.nbytes += sum(tensor.nbytes for tensor in there.values())
            self.launches += 1
        return result


def work(step) -> Work:
    """What a call of `step` does."""
    with Counter() as counter, FlopCounterMode(display=False) as flops:
        step()
    return Work(flops.get_total_flops(), counter.nbytes, counter.launches)


def seconds(function, device) -> float:
    """Of one call, at best."""
    function()
    found = []
    for _ in range(REPEATS):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


def rates(device, dtype: torch.dtype) -> Rates:
    left, right = torch.randn(2, SIDE, SIDE, device=device).to(dtype)
    source, target = torch.zeros(2, COPIED // 4, device=device)
    one = torch.zeros(1, device=device)

    def launches():
        for _ in range(1000):
            one.add_(1.0)

    return Rates(2 * SIDE**3 / seconds(lambda: left @ right, device), 2 * COPIED / seconds(lambda: target.copy_(source), device),
                 seconds(launches, device) / 1000)
