"""About how much memory a run needs, found before it starts: a step is gone through on tensors that have a shape and no numbers.

    Estimate.of(update, machine, rows=128, image_size=32).total      bytes
    report(args, update, machine, rows=128, image_size=32)           one line, and a warning where it may not fit

Counted are tensors.  cuDNN's workspaces, memory that the allocator cannot use, and CUDA itself (about half a GiB) are not; nor is
the copy of the last checkpoint that is being written, which is in the memory of the host.
"""
import os
import sys
import weakref
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from training.errors import first_line
from training.machine import Machine
from training.recompute import blocks

GIB = 2**30
USABLE = 0.9  # the share of the memory that an estimate may take to fit: the rest is for what it leaves out
# What autocast on CUDA computes in 16 bits, and in fp32; what it does not name takes the wider type of its inputs, as everywhere.
NARROW = {torch.conv1d, torch.conv2d, torch.conv3d, F.linear, torch.matmul, torch.Tensor.matmul, torch.bmm, torch.baddbmm,
          torch.einsum, F.scaled_dot_product_attention, F.multi_head_attention_forward}
WIDE = {F.layer_norm, F.softmax}


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are made in here: `now` alive, `peak` at most.  known: tensors from before."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Autocast(TorchFunctionMode):
    """torch.autocast for tensors without numbers, which have none of their own; each weight is cast once in a forward pass."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.casts = dtype, {}

    def cast(self, value):
        if not (isinstance(value, torch.Tensor) and value.dtype == torch.float32):
            return value
        if not (value.is_leaf and value.requires_grad) or self.casts is None:
            return value.to(self.dtype)
        if id(value) not in self.casts:
            self.casts[id(value)] = value.to(self.dtype)
        return self.casts[id(value)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in NARROW:
            args, kwargs = tuple(map(self.cast, args)), {key: self.cast(value) for key, value in (kwargs or {}).items()}
        elif function in WIDE:
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


class Step(nn.Module):
    """Forward and backward pass of `net`; a block that is computed again must find the same weights, so both are one call."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images, autocast) -> None:
        logits = self.net(images)
        loss = F.cross_entropy(logits.float(), torch.empty(len(logits), dtype=torch.int64, device=logits.device))
        if autocast:
            autocast.casts = None  # it ends here; from now on only what the graph keeps is alive
        # Given its place in the graph, not the tensor: a tensor's backward leaves Autocast, and blocks are computed again in it.
        torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss), torch.ones_like(loss))


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def on_meta(net) -> dict:
    """Its parameters and buffers by name, in shape only."""
    named = (*net.named_parameters(), *net.named_buffers())
    return {name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad) for name, tensor in named}


def training_bytes(net, images, accumulate: bool) -> int:
    """The most that is alive, besides weights and images, while `net` trains on `images`, a tensor on the meta device."""
    step, autocast = Step(net), Autocast(images.dtype) if images.dtype != torch.float32 else None
    tensors, modes = on_meta(step), [(module, module.training) for module in net.modules()]
    with Live([*tensors.values(), images]) as live, autocast or nullcontext():
        if accumulate:  # the parts before this one have left a gradient
            for tensor in filter(lambda tensor: tensor.requires_grad, tensors.values()):
                tensor.grad = torch.empty_like(tensor)
        net.train()
        try:
            torch.func.functional_call(step, tensors, (images, autocast))
        finally:
            for module, training in modes:
                module.training = training
        gradients = live.now
    return max(live.peak, gradients + nbytes(net.parameters()))  # weights are copied where a step is looked at


@torch.no_grad()
def inference_bytes(net, images) -> int:
    """The most that is alive, besides weights and images, while `net`, in eval mode, is applied to `images`."""
    tensors = on_meta(net)
    with Live([*tensors.values(), images]) as live, Autocast(images.dtype) if images.dtype != torch.float32 else nullcontext():
        torch.func.functional_call(net, tensors, images)
    return live.peak


class Estimate(NamedTuple):
    """Bytes at the fullest moment of a step, by what they are for."""
    weights: int  # with buffers, the optimizer's moments, moving average, and what exchanges gradients between processes
    teacher: int
    images: int  # the data set, and a batch
    step: int  # activations and gradients

    @classmethod
    def of(cls, update, machine: Machine, *, rows: int, image_size: int, images: int = 0, parts: int = 1, teacher=None,
           graph: bool = False):
        """Of a training.step.Update on `rows` images at once; draws no random number and changes nothing.

        image_size: pixels of the augmented images.  images: bytes of the data set.  parts: of a batch, --grad-accum.  graph:
        whether steps become a CUDA graph, whose memory is its own, also between steps.
        """
        inputs = torch.empty(rows, 3, image_size, image_size, dtype=machine.dtype, device="meta")
        gradient, weights = nbytes(update.parameters), update.checkpoint_bytes + 2 * update.buffers.words.nbytes
        if update.average:
            weights += update.average_buffers.words.nbytes
        if machine.ranks.size > 1:
            weights += gradient
        step, taught = training_bytes(update.net, inputs, accumulate=parts > 1), 0
        if teacher is not None:
            taught, teaching = nbytes((*teacher.parameters(), *teacher.buffers())), inference_bytes(teacher, inputs)
            step = max(step, teaching + gradient * (parts > 1))
        if graph:
            step += inference_bytes(update.net, inputs) + inputs.nbytes  # in evaluation
        return cls(weights, taught, images + inputs.nbytes, step)

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        unit, digits, name = (GIB, 1, "GiB") if self.total >= GIB else (2**20, 0, "MiB")
        what = ("weights and optimizer", "teacher", "images", "activations and gradients")
        parts = ", ".join(f"{each} {size / unit:.{digits}f}" for each, size in zip(what, self) if size)
        return f"about {self.total / unit:.{digits}f} {name} ({parts})"


def available(device: torch.device) -> int:
    """The bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def report(args, update, machine: Machine, graph: bool = False, **rest) -> None:
    """Print what a run takes; where it may not fit, warn, and name the flags that would help.  rest: as for Estimate.of."""
    if not machine.ranks.first:
        return
    try:
        estimate = Estimate.of(update, machine, graph=graph, **rest)
    except Exception as failure:  # of a layer that needs numbers; no run depends on an estimate
        print(f"memory: not estimated ({first_line(failure)})")
        return
    there = available(machine.device)
    print(f"memory: {estimate}, of {there / GIB:.1f} GiB")
    if estimate.total > USABLE * there:
        flags = [f"--grad-accum {2 * (args.grad_accum or 1)}", f"--batch-size {max(2, args.batch_size // 2)}"]
        if graph:
            flags.append("--no-cuda-graph")
        if not args.grad_checkpoint and blocks(update.net):
            flags.insert(0, "--grad-checkpoint")
        print(f"warning: this may not fit into the memory of the device. if it does not, use {' or '.join(flags)}",
              file=sys.stderr)
