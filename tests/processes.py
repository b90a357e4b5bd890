"""Calls functions in several processes that are one run, as under torchrun."""
import os
import traceback
from dataclasses import replace
from functools import cache

import torch
import torture

from training import distributed
from training.device import RunContext
from training.distributed import Ranks

ALONE = RunContext(torch.device("cpu"), "off")


def be_a_rank(timeout, environment, calls):
    os.environ |= environment
    torch.set_num_threads(1)
    distributed.TIMEOUT = timeout
    with Ranks.of_environment() as ranks:
        while True:
            function, args = calls.recv()
            try:
                function(replace(ALONE, ranks=ranks), *args)
                calls.send("")
            except BaseException:
                calls.send(traceback.format_exc())


@cache
def group(size, timeout):
    """The pipes to `size` new processes, and the store where they find each other, which has to outlive them."""
    store, environments = torture.as_torchrun_does(size)
    pipes = []
    for environment in environments:
        here, there = torture.CONTEXT.Pipe()
        torture.CONTEXT.Process(target=be_a_rank, args=(timeout, environment, there), daemon=True).start()
        there.close()
        pipes.append(here)
    return pipes, store


def together(size, function, *args, timeout=distributed.TIMEOUT):
    """Call `function(context, *args)` in `size` processes that are one run; fails with the traceback of the first that fails."""
    pipes, _ = group(size, timeout)
    try:
        for pipe in pipes:
            pipe.send((function, args))
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(60), f"rank {rank} of {size} does not answer"
            trace = pipe.recv()
            assert not trace, f"rank {rank} of {size}: {trace}"
    except BaseException:
        group.cache_clear()  # some may still wait for the others
        raise
