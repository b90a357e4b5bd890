"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): what a block computes inside is not kept for the backward pass,
but computed again there, from the block's input.

    recompute(net, "efficientnet_v2_s")      from here on, where `net` is trained

Losses, gradients and running statistics are those without it: a block draws the same random numbers again, and its BatchNorms
do not count a batch twice.  Names of weights do not change.
"""
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from rundir.errors import USAGE, Failure


def blocks(net, in_chain: bool = False) -> list[nn.Module]:
    """The links of all chains in `net` that are made of several layers: residual, inverted or transformer blocks, conv-norm-act.

    A chain is an nn.Sequential; a link that is itself a chain of such links is taken apart.  No block contains another one.
    in_chain: whether `net` is such a link.
    """
    parts = list(net.children())
    chain = isinstance(net, nn.Sequential) and type(net).forward is nn.Sequential.forward
    if in_chain and parts and not (chain and any(list(part.children()) for part in parts)):
        return [net]
    return [block for part in parts for block in blocks(part, chain)]


def recompute(net, name: str) -> None:
    """Checkpoint the blocks of `net`, which is called `name`.  Failure USAGE: it has none."""
    found = blocks(net)
    if not found:
        raise Failure(USAGE, f"no part of {name} can be computed again (--grad-checkpoint): it is not a chain of blocks",
                      "leave the flag out; --grad-accum needs less memory, too")
    for block in found:
        # An attribute of the block, not a module around it, so that state_dict has the same keys; a deep copy gets its own.
        block.forward = partial(forward, block)


def forward(block, *inputs):
    """What the class of `block` computes; in training it is checkpointed."""
    plain = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return plain(*inputs)
    return checkpoint(plain, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), uncounted(block)))


@contextmanager
def uncounted(block):
    """In here the BatchNorms of `block` normalise by the batch, as before, but leave running statistics and counters alone.

    A momentum of 0 gives back the statistics bit for bit.  Without any, fewer tensors would be saved than the first time.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, counter
