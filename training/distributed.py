"""Several processes on one run, started by torchrun: their rows of a batch, their sums and their decisions.

Every process holds all images on its device, so each makes its own slice of the batch that one process would have made.
DistributedDataParallel averages the gradients; BatchNorm normalises by the slice, not by the whole batch.  Alone, without
torchrun's variables in the environment, a process is rank 0 of 1, and every method gives back what it was given.
"""
import os
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=10)  # of a collective operation in a step
SLOW_TIMEOUT = timedelta(hours=6)  # while a process downloads or decodes images


class Ranks:
    """This process, `rank`, among the `size` of its run; `local` is its rank on its machine.  Use it in a `with`."""

    def __init__(self, rank: int = 0, local: int = 0, size: int = 1):
        self.rank, self.local, self.size = rank, local, size

    @classmethod
    def of_environment(cls) -> "Ranks":
        """From torchrun's variables; from here on only rank 0 prints to stdout."""
        ranks = cls(*(int(os.environ.get(*variable)) for variable in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))))
        if not ranks.is_main:
            sys.stdout = open(os.devnull, "w")
        return ranks

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0

    def __enter__(self):
        if self.size > 1:
            gpu = torch.cuda.is_initialized()
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=TIMEOUT)
            self.slow_group = dist.new_group(backend="gloo", timeout=SLOW_TIMEOUT)
            self.barrier()  # if one ended while another connects to it, PyTorch's C++ would write of it to stderr
        return self

    def __exit__(self, kind, failure, trace):
        if self.size > 1 and failure is None:  # else the others may never answer: ending this process ends them
            dist.destroy_process_group()

    def rows(self, each: int) -> range:
        """This process's rows of a batch of `each` rows per process."""
        return range(self.rank * each, (self.rank + 1) * each)

    def share(self, count: int) -> range:
        """This process's rows of `count`, split without padding or repetition."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over the processes, in place."""
        return self.sum(tensor).div_(self.size) if self.size > 1 else tensor

    def all_equal(self, numbers: torch.Tensor) -> bool:
        """Whether `numbers`, int64 (K,), are the same on all processes."""
        if self.size == 1:
            return True
        extremes = torch.stack([numbers, -numbers])
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        return torch.equal(extremes[0], -extremes[1])

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The `tensor` of every process, on the CPU and of one shape."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor)
        return gathered

    def broadcast(self, function):
        """What `function()` returns on rank 0, which alone calls it."""
        answer = [function() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(answer)
        return answer[0]

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(()), group=self.slow_group)

    @contextmanager
    def local_main_first(self):
        """The local rank 0 of each machine runs the block first: it downloads, unpacks and caches for the others."""
        if self.local:
            self.barrier()
        yield
        if not self.local:
            self.barrier()

    def data_parallel(self, net, seed: int, shape: tuple):
        """`net` under DDP, which averages gradients in backward; from here on each process has its own dropout.

        shape: of one input of `net`.
        """
        if self.size == 1:
            return net
        if not self.is_main:
            torch.manual_seed(seed + self.rank)
        with warnings.catch_warnings():  # of the flag's new name, which older versions do not have
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(net, broadcast_buffers=False)
        # After its first backward it groups the gradients anew, and in another group three numbers may add up to other bits: a
        # resumed run would differ.  In eval mode a rehearsal leaves no trace.
        net.eval()
        model(next(net.parameters()).new_zeros(1, *shape)).sum().backward()
        net.zero_grad()
        return model
