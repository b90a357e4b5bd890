"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): activations inside a block are recomputed in the backward pass.

Losses, gradients, running statistics and parameter names stay the same: a block draws the same random numbers again.
"""
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from rundir.errors import USAGE, Failure


def blocks(net, in_chain: bool = False) -> list[nn.Module]:
    """The blocks of `net`: residual, inverted residual or transformer blocks, conv-norm-act.  No block contains another one.

    A block is a child, with children of its own, of an nn.Sequential; nested nn.Sequentials are split further.
    in_chain: whether `net` is a child of an nn.Sequential.
    """
    parts = list(net.children())
    chain = isinstance(net, nn.Sequential) and type(net).forward is nn.Sequential.forward
    if in_chain and parts and not (chain and any(list(part.children()) for part in parts)):
        return [net]
    return [block for part in parts for block in blocks(part, chain)]


def recompute(net, name: str) -> None:
    """Checkpoint the blocks of `net` in training.  name: for the error.  Failure USAGE: it has none."""
    found = blocks(net)
    if not found:
        raise Failure(USAGE, f"{name} has no blocks to checkpoint (--grad-checkpoint)",
                      "leave the flag out; --grad-accum saves memory, too")
    for block in found:
        # An attribute, not a wrapper module: the keys of state_dict stay.  A deep copy gets its own.
        block.forward = partial(forward, block)


def forward(block, *inputs):
    """The forward pass of the class of `block`, checkpointed in training."""
    plain = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return plain(*inputs)
    return checkpoint(plain, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), FrozenStatistics(block)))


class FrozenStatistics:
    """A context that disables updates of running statistics and counters in the BatchNorms of `block`; may be entered again.

    A momentum of 0 keeps the statistics bitwise.  Without running statistics other tensors would be saved than the first time.
    """

    def __init__(self, block):
        self.block = block

    def __enter__(self):
        norms = [module for module in self.block.modules() if isinstance(module, _BatchNorm)]
        self.before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *failure):
        for norm, momentum, counter in self.before:
            norm.momentum, norm.num_batches_tracked = momentum, counter
