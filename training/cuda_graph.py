"""A script's step as its loop calls it: taken launch by launch, or recorded once as a CUDA graph and replayed; where it is not
recorded, the teacher's forward pass is.

A replay runs no Python.  So a step that is recorded is a function of tensors that stay where they are: the position in the epoch
and the learning rate are written into two of them before each step, what a method's warm-up raises is written into others before
each epoch, and all that a step leaves behind is on the device.  What it reads from Python is whether it is looked at, of which
there is a recording each.

A recording that fails ends the run.  PyTorch may leave its random generator in the recording, and then no network with dropout
could go on launch by launch.
"""
import time

import torch

from diagnostics.gradients import EVERY
from rundir.errors import OUT_OF_MEMORY, USAGE, Failure, first_line
from training.device import Machine, cannot_compile

WARM_UP = 3  # steps before any is recorded, in which libraries choose their kernels and make their workspaces


def captures(args, machine: Machine, fused: bool) -> bool:
    """Whether steps are to be recorded; says why not where one would expect it.

    args: of cli.options.  fused: whether one launch makes the batch, from a position on the device.
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
    """What `function` launches on `stream` -> a function that launches it all at once; its memory is of `pool`.

    Failure OUT_OF_MEMORY or USAGE: it cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # What other threads ask of CUDA meanwhile, such as NCCL's, is none of its business.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
    except RuntimeError as failure:
        first = failure.__context__ or failure  # a failure inside of a recording makes its end fail, too
        code = OUT_OF_MEMORY if isinstance(first, torch.OutOfMemoryError) else USAGE
        raise Failure(code, f"a CUDA graph cannot be recorded ({first_line(first)})", "use --no-cuda-graph") from failure
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

            self.replay = record(forward, torch.cuda.graph_pool_handle(), self.stream)
        self.images.copy_(images)
        self.replay()
        return self.logits


class Step:
    """`step(position, lr)` takes the step at `position` of an epoch; every 40th is looked at.

    function: (position, lr, look); with `captured`, position and lr are 0-dim tensors on the device.
    """

    def __init__(self, function, machine: Machine, captured: bool):
        self.function, self.machine, self.begun = function, machine, False
        self.take = self.replay if captured else function
        if captured:
            self.position = torch.zeros((), dtype=torch.int64, device=machine.device)
            self.lr = torch.zeros((), device=machine.device)
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self.launched, self.recorded = 0, {}

    def __call__(self, position: int, lr: float) -> None:
        self.machine.begin_step()
        take = self.compile if self.machine.compiled and not self.begun else self.take
        take(position, lr, position % EVERY == 0)
        self.begun = True

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

        launched: steps that were taken launch by launch.  recorded: by `look`, None for one that was so taken.
        """
        self.position.fill_(position)
        self.lr.fill_(lr)
        if self.launched >= WARM_UP and look in self.recorded and not self.recorded[look]:
            self.recorded[look] = record(lambda: self.function(self.position, self.lr, look), self.pool, self.stream)
        replay, main = self.recorded.get(look), torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            if replay:
                replay()
            else:
                self.function(self.position, self.lr, look)
                self.launched, self.recorded[look] = self.launched + 1, None
        main.wait_stream(self.stream)
