"""A training step as a CUDA graph: captured once, replayed by one launch.

A replay runs no Python.  So a captured step reads position and learning rate from two tensors that are filled before each step,
and hyperparameters under warm-up from others.  Steps of each kind, such as diagnostics steps, have a graph of their own.
"""
import torch

from rundir.errors import OUT_OF_MEMORY, USAGE, Failure, first_line
from training.device import RunContext

WARM_UP = 3  # steps before a capture, in which libraries choose kernels and allocate workspaces


def use_cuda_graph(wanted: bool | None, context: RunContext, *, deterministic: bool, grad_checkpoint: bool, fused: bool) -> bool:
    """Whether to capture the steps; prints the reason where a GPU run does not.

    wanted: the flag --cuda-graph; None: on a GPU, where possible.  fused: whether one kernel makes the batch.
    """
    on_gpu = context.device.type == "cuda"
    if wanted is False or (wanted is None and not on_gpu):
        return False
    reasons = {"it needs a GPU": not on_gpu, "--deterministic": deterministic,
               "--grad-checkpoint keeps the random generator's state on the host": grad_checkpoint,
               "DDP all-reduce is inside the step": context.ranks.size > 1,
               "plain PyTorch augmentation reads the step's position on the host": not fused}
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason:
        print(f"CUDA graph disabled: {reason}")
    return reason is None


def capture(function, pool, stream):
    """Capture `function` on `stream` with memory from `pool` -> its replay.

    Failure OUT_OF_MEMORY or USAGE ends the run: PyTorch may leave its random generator in capture mode.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # "thread_local": CUDA calls of other threads, such as NCCL's, do not invalidate it.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
    except RuntimeError as failure:
        first = failure.__context__ or failure  # an error inside a capture makes its end fail, too
        code = OUT_OF_MEMORY if isinstance(first, torch.OutOfMemoryError) else USAGE
        raise Failure(code, f"a CUDA graph cannot be captured ({first_line(first)})", "use --no-cuda-graph") from failure
    return graph.replay


class CudaGraph:
    """A replacement for `step(position, lr, *kind)` that replays it as a CUDA graph.

    The first WARM_UP steps, and the first of each kind, run eagerly.
    step: takes position and lr as 0-dim tensors on the device, int64 and fp32.  kind: bools, by which the step branches.
    """

    def __init__(self, step, device: torch.device):
        self.step = step
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.lr = torch.zeros((), device=device)
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.eager_steps, self.graphs = 0, {}  # graphs: by kind; None after its eager step

    def __call__(self, position: int, lr: float, *kind: bool) -> None:
        self.position.fill_(position)
        self.lr.fill_(lr)
        if self.eager_steps >= WARM_UP and kind in self.graphs and not self.graphs[kind]:
            self.graphs[kind] = capture(lambda: self.step(self.position, self.lr, *kind), self.pool, self.stream)
        replay, main = self.graphs.get(kind), torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            if replay:
                replay()
            else:
                self.step(self.position, self.lr, *kind)
                self.eager_steps, self.graphs[kind] = self.eager_steps + 1, None
        main.wait_stream(self.stream)
