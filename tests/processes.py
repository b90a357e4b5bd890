"""Calls a function in several processes that are one run, as under torchrun."""
import os
import traceback
from dataclasses import replace

import torch
import torture

from training import distributed
from training.device import Machine
from training.distributed import Ranks

ALONE = Machine(torch.device("cpu"), "off")


def be_a_rank(function, args, environment, answer):
    os.environ |= environment
    torch.set_num_threads(1)
    distributed.TIMEOUT = getattr(function, "timeout", distributed.TIMEOUT)
    try:
        with Ranks.of_environment() as ranks:
            function(replace(ALONE, ranks=ranks), *args)
        answer.send("")
    except BaseException:
        answer.send(traceback.format_exc())


def together(size, function, *args):
    """Call `function(machine, *args)` in `size` processes that are one run; fails with the traceback of the first that fails."""
    store, environments = torture.as_torchrun_does(size)
    pipes = []
    for environment in environments:
        here, there = torture.CONTEXT.Pipe()
        torture.CONTEXT.Process(target=be_a_rank, args=(function, args, environment, there), daemon=True).start()
        there.close()
        pipes.append(here)
    for rank, pipe in enumerate(pipes):
        assert pipe.poll(60), f"rank {rank} of {size} does not answer"
        trace = pipe.recv()
        assert not trace, f"rank {rank} of {size}: {trace}"
    del store  # which has to outlive them
