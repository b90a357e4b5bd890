"""A script's step as its loop calls it: taken launch by launch, or recorded once as a CUDA graph and replayed; where it cannot
be recorded, the teacher's forward pass is.

A replay runs no Python.  So a step that is recorded is a function of tensors that stay where they are: the position in the epoch
and the learning rate are written into two of them before each step, and all that a step leaves behind is on the device.  What
it reads from Python is whether it is looked at, of which there is a recording each, and the method's numbers, with which all are
made anew.
"""
import math
import time
from contextlib import nullcontext

import torch

from training.ahead import Trial
from training.errors import USAGE, Failure, first_line
from training.machine import Machine, cannot_compile
from training.step import EVERY
from training.terminal import say

WARM_UP = 3  # steps before any is recorded, in which libraries choose their kernels and make their workspaces


def captures(args, machine: Machine, fused: bool) -> bool:
    """Whether steps are to be recorded; says why not where one would expect it.

    args: of training.options.  fused: whether one launch makes the batch, from a position on the device.
    """
    on_gpu = machine.device.type == "cuda"
    if args.cuda_graph is False or (args.cuda_graph is None and not on_gpu):
        return False
    reasons = {"it needs a GPU": not on_gpu, "--deterministic": args.deterministic,
               "--grad-checkpoint keeps the state of the random numbers on the host": args.grad_checkpoint,
               "several processes average their gradients in it": machine.ranks.size > 1,
               "the batch is made by plain PyTorch, which reads its position on the host": not fused}
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason:
        print(f"no CUDA graph of the step: {reason}")
    return reason is None


def record(function, pool, stream):
    """What `function` launches on `stream` -> a function that launches it all at once; its memory is of `pool`."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # What other threads ask of CUDA meanwhile, such as NCCL's, is none of its business.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
    finally:
        torch.cuda.set_stream(before)  # which a recording that fails leaves as it is
    return graph.replay


class Replayed:
    """A frozen `net` on batches of one shape, recorded after a warm-up; each call writes over what the last one returned."""

    def __init__(self, net):
        self.net, self.calls, self.stream, self.replay = net, 0, torch.cuda.Stream(), None

    def __call__(self, images):
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.net(images)
        if self.replay is None:
            self.images = images.clone()  # which keeps its memory format

            def forward():
                self.logits = self.net(self.images)

            try:
                self.replay = record(forward, torch.cuda.graph_pool_handle(), self.stream)
            except RuntimeError as failure:
                say(f"no CUDA graph of the teacher: {first_line(failure)}")
                self.calls = -math.inf  # a warm-up without end
                return self.net(images)
        self.images.copy_(images)
        self.replay()
        return self.logits


class Step:
    """`step(position, lr)` takes the step at `position` of an epoch; every 40th is looked at.

    function: (position, lr, look); with `captured`, position and lr are 0-dim tensors on the device.  numbers: what it reads
    besides, by name; may change between steps.  abandon: called after a recording that failed, to forget what it began.  ahead:
    a training.ahead.Ahead that it reads, if it reads one.
    """

    def __init__(self, function, numbers: dict, machine: Machine, captured: bool, abandon, ahead=None):
        self.function, self.numbers, self.machine, self.captured, self.abandon = function, numbers, machine, captured, abandon
        self.begun, self.launched, self.warm, self.read = False, 0, set(), None
        self.ahead, self.trial = ahead, Trial() if ahead else Trial([False])
        if captured:
            self.position = torch.zeros((), dtype=torch.int64, device=machine.device)
            self.lr = torch.zeros((), device=machine.device)
            self.stream = torch.cuda.Stream()

    def __call__(self, position: int, lr: float) -> None:
        look = position % EVERY == 0
        self.machine.begin_step()
        take = self.compile if self.machine.compiled and not self.begun else self.take
        take(position, lr, look)
        self.begun = True

    def take(self, position: int, lr: float, look: bool) -> None:
        if position == 0 and self.ahead:
            self.ahead.begin_epoch()
        take = self.replay if self.captured else self.function
        take(position, lr, look)

    def compile(self, position: int, lr: float, look: bool) -> None:
        """The first step, in which torch.compile works."""
        print("compiling the networks, which takes a minute or more", flush=True)
        started = time.perf_counter()
        try:
            self.take(position, lr, look)
        except Exception as failure:
            reason = cannot_compile(failure)
            if reason is None:
                raise
            raise Failure(USAGE, f"the networks cannot be compiled ({reason})", "leave out --compile") from failure
        print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)

    def replay(self, position: int, lr: float, look: bool) -> None:
        """On a stream of its own: a warm-up, or the recording of such a step, which is made where there is none.

        launched: steps that were taken launch by launch.  warm: by their `look`, those with the numbers that were `read` last.
        """
        self.position.fill_(position)
        self.lr.fill_(lr)
        if self.read != (numbers := tuple(self.numbers.values())):
            self.forget()
            self.warm, self.read = set(), numbers
        replay = self.recording(look) if look in self.warm and self.launched >= WARM_UP else None
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            if replay is None:
                self.function(self.position, self.lr, look)
                self.launched += 1
                self.warm.add(look)
            elif look:
                replay()
            else:
                self.trial.run(replay)
        main.wait_stream(self.stream)

    def forget(self) -> None:
        """All recordings at once, (overlapped, look) -> replay: they share cuBLAS's workspace, which ends with any of them."""
        self.recorded = {}
        self.pool = torch.cuda.graph_pool_handle()  # the old one cannot be used again once its graphs are gone

    def recording(self, look: bool):
        """The replay of such a step; None where none can be recorded."""
        while self.captured:
            key = self.trial.kind(timed=not look), look
            if key in self.recorded:
                return self.recorded[key]
            self.record(*key)
        return None

    def record(self, overlapped: bool, look: bool) -> None:
        """Record such a step.  Where that fails, steps are recorded on one stream, if it was to be on two, or not at all."""
        def take():
            with self.ahead.overlapping(overlapped) if self.ahead else nullcontext():
                self.function(self.position, self.lr, look)

        try:
            self.recorded[overlapped, look] = record(take, self.pool, self.stream)
        except RuntimeError as failure:
            self.abandon()
            self.forget()
            if overlapped:  # which takes more memory
                say(f"teacher and student one after the other: {first_line(failure)}")
                self.trial = Trial([False])
            else:
                say(f"no CUDA graph of the step: {first_line(failure)}")
                self.captured = False
