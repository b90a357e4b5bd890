"""Distributed data parallelism under torchrun: each rank's rows of a batch, collectives, and DDP.

Every rank holds all images and makes its slice of the batch that one process would make.  DDP averages the gradients; BatchNorm
normalises by the slice.  Without torchrun a process is rank 0 of 1, and collectives return their input.
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
    """The rank of this process, its rank on its machine, and the world size; a context manager around the process group."""

    def __init__(self, rank: int = 0, local: int = 0, size: int = 1):
        self.rank, self.local, self.size = rank, local, size

    @classmethod
    def of_environment(cls) -> "Ranks":
        """From torchrun's variables; redirects stdout of all ranks but 0 to /dev/null."""
        ranks = cls(*(int(os.environ.get(*variable)) for variable in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))))
        if not ranks.is_main:
            sys.stdout = open(os.devnull, "w")
        return ranks

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes files."""
        return self.rank == 0

    def __enter__(self):
        if self.size > 1:
            gpu = torch.cuda.is_initialized()
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=TIMEOUT)
            self.slow_group = dist.new_group(backend="gloo", timeout=SLOW_TIMEOUT)
            self.barrier()  # a rank that exits while another connects makes PyTorch's C++ print to stderr
        return self

    def __exit__(self, kind, failure, trace):
        if self.size > 1 and failure is None:  # after a failure it could hang: torchrun ends the other ranks
            dist.destroy_process_group()

    def rows(self, each: int) -> range:
        return range(self.rank * each, (self.rank + 1) * each)

    def share(self, count: int) -> range:
        """This rank's part of `count` rows, without padding or repetition."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place, bitwise the same on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.sum(tensor).div_(self.size) if self.size > 1 else tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor)
        return gathered

    def broadcast(self, function):
        """The result of `function()`, called on rank 0 only."""
        result = [function() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(result)
        return result[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.all_reduce(torch.zeros(()), group=self.slow_group)

    @contextmanager
    def local_main_first(self):
        """Runs the block on local rank 0 of each machine first, so that the others find its downloads and caches."""
        if self.local:
            self.barrier()
        yield
        if not self.local:
            self.barrier()

    def data_parallel(self, net, seed: int, shape: tuple):
        """`net` under DDP; seeds each rank's dropout differently.  shape: of one input of `net`."""
        if self.size == 1:
            return net
        if not self.is_main:
            torch.manual_seed(seed + self.rank)
        with warnings.catch_warnings():  # the argument was renamed; older versions have the old name alone
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(net, broadcast_buffers=False)
        # DDP rebuilds its buckets after the first backward, which changes the order of sums: a resumed run would differ in the
        # last bits.  A dummy backward, in eval mode so that no statistics change, rebuilds them now.
        net.eval()
        model(next(net.parameters()).new_zeros(1, *shape)).sum().backward()
        net.zero_grad()
        return model
