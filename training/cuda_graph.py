"""A training step as a CUDA graph: captured once, replayed by one launch.

A replay runs no Python.  So a step that is captured is a function of tensors that stay where they are: the position in the epoch
and the learning rate are written into two of them before each step, what a method's warm-up raises is written into others before
each epoch, and everything that a step leaves behind is on the device.  What it reads from Python is whether it is a diagnostics
step; there is a graph for each of the two kinds.

A capture that fails ends the run.  PyTorch may leave its random generator in the capture, and then no network with dropout could
go on without a graph.
"""
import torch

from rundir.errors import OUT_OF_MEMORY, USAGE, Failure, first_line
from training.device import RunContext

WARM_UP = 3  # steps before any is captured, in which libraries choose their kernels and allocate their workspaces


def use_cuda_graph(wanted: bool | None, context: RunContext, *, deterministic: bool, grad_checkpoint: bool, fused: bool) -> bool:
    """Whether to capture the steps; prints why not where one would expect it.

    wanted: the flag --cuda-graph, None where it can be done on a GPU.  fused: one kernel makes the batch, from a position on the
    device.
    """
    on_gpu = context.device.type == "cuda"
    if wanted is False or (wanted is None and not on_gpu):
        return False
    reasons = {"it needs a GPU": not on_gpu, "--deterministic": deterministic,
               "--grad-checkpoint keeps the state of the random numbers on the host": grad_checkpoint,
               "DDP's all-reduce is inside of the step": context.ranks.size > 1,
               "the batch is made by plain PyTorch, which reads its position on the host": not fused}
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason:
        print(f"CUDA graph disabled: {reason}")
    return reason is None


def capture(function, pool, stream):
    """A function that launches, as one graph, what `function` launches on `stream`; its memory is of `pool`.

    Failure OUT_OF_MEMORY or USAGE: it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # What other threads ask of CUDA meanwhile, such as NCCL's, does not matter to it.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
    except RuntimeError as failure:
        first = failure.__context__ or failure  # a failure inside of a capture makes its end fail, too
        code = OUT_OF_MEMORY if isinstance(first, torch.OutOfMemoryError) else USAGE
        raise Failure(code, f"a CUDA graph cannot be captured ({first_line(first)})", "use --no-cuda-graph") from failure
    return graph.replay


class CudaGraph:
    """`step(position, lr, diagnose)` as a CUDA graph: `CudaGraph(step, device)` is called in its place.

    The first steps are warm-up and launch every kernel.  Each kind of step, by `diagnose`, is launched so once before it is
    captured.  step: takes position and lr as 0-dim tensors on the device, int64 and fp32.
    """

    def __init__(self, step, device: torch.device):
        self.step = step
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.lr = torch.zeros((), device=device)
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.warmed, self.graphs = 0, {}  # steps so far without a graph; by kind, None for one that was only launched so

    def __call__(self, position: int, lr: float, diagnose: bool) -> None:
        self.position.fill_(position)
        self.lr.fill_(lr)
        if self.warmed >= WARM_UP and diagnose in self.graphs and not self.graphs[diagnose]:
            self.graphs[diagnose] = capture(lambda: self.step(self.position, self.lr, diagnose), self.pool, self.stream)
        replay, main = self.graphs.get(diagnose), torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            if replay:
                replay()
            else:
                self.step(self.position, self.lr, diagnose)
                self.warmed, self.graphs[diagnose] = self.warmed + 1, None
        main.wait_stream(self.stream)
