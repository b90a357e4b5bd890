"""One optimizer step: the recipe, the learning rate, and `Update`, which scales, clips, steps and averages.

Nothing here waits for the device inside a step: counts stay on it and are read once per epoch.
"""
import math
from typing import NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel

from rundir.errors import BUG, DIVERGED, NONFINITE_HINT, Failure
from training.device import RunContext

SMALLEST_SCALE = 2.0**-14  # a loss that overflows FP16 at this scale is broken, not large
ALIGNMENT = 16  # elements


class Recipe(NamedTuple):
    """How the weights are optimised, by the flags of the same names; of `milestones` and `warmup_epochs` the unit is epochs."""
    opt: str
    lr: float
    momentum: float
    weight_decay: float
    sched: str
    milestones: list[int]
    warmup_epochs: int
    epochs: int
    clip_grad: float
    model_ema: float


def build_optimizer(net, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over all parameters, in the fused form that leaves a skipped FP16 step to the device."""
    if recipe.opt == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay,
                                fused=True)
    if recipe.momentum:
        # Fused SGD allocates its momentum uninitialised; were the first step skipped (usual in FP16), the second would use it.
        for parameter in net.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """The rate of global step `step` (from 0): linear warmup from 0, then cosine to 0 or x0.1 at every milestone epoch."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.sched == "multistep":
        return recipe.lr * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)
    progress = (step - warmup) / (recipe.epochs * steps_per_epoch - warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))


class StepResult(NamedTuple):
    """0-dim fp32 tensors.  skipped: 1 or 0.  norm: the gradient's before clipping.  relative_update: norm of the change of the
    weights over their norm; None unless it was asked for."""
    skipped: torch.Tensor
    norm: torch.Tensor
    relative_update: torch.Tensor | None


class Update:
    """`update.backward(loss)` for each of the `micro_batches` of a batch, then `update(lr)`: one optimizer step.

    Scale, backward, unscale, clip, step or skip, average.  A step whose loss or gradient is not finite, in whatever precision,
    leaves weights, momentum and running statistics as they were; it counts as skipped.  The device decides, nothing waits for
    it.  Several processes all skip a step or none: they have the same mean gradient.
    """

    def __init__(self, net, recipe: Recipe, context: RunContext, micro_batches: int = 1):
        self.net, self.optimizer, self.context, self.ranks = net, build_optimizer(net, recipe), context, context.ranks
        self.scaler = context.scaler()
        self.clip_grad, self.decay = recipe.clip_grad or math.inf, recipe.model_ema
        self.parameters = list(net.parameters())
        self.buffers = FlatBuffers(net)
        self.average, self.started = None, False
        if self.decay:
            self.average = AveragedModel(net)
            self.average_buffers = FlatBuffers(self.average.module)
            self.averages = [*self.average.module.parameters(), *self.average_buffers.floats]
        self.zero, self.share = torch.tensor([0.0, 1 / micro_batches], device=self.parameters[0].device)
        self.remember_buffers()

    @property
    def evaluated(self):
        """The network to evaluate and save: the moving average where there is one."""
        return self.average.module if self.average else self.net

    def backward(self, loss) -> None:
        """Add the gradient of a micro-batch's loss, times its share of the batch."""
        seed = torch.addcmul(self.share, loss.detach(), self.zero)  # NaN for a non-finite loss, in all processes: all skip
        loss.backward(self.scaler.scale(seed))

    def __call__(self, lr: float | torch.Tensor, diagnose: bool = False) -> StepResult:
        """Take the step.  diagnose: measure the relative update, too."""
        self.set_learning_rate(lr)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        before = self.copy_parameters() if diagnose else None
        finite = norm < math.inf
        skipped = self.step_unless_skipped(finite)
        self.restore_buffers(finite)
        if self.average:
            self.update_average()
        if self.context.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # the next step may overwrite what compiled networks returned in this one
        return StepResult(skipped, norm, self.relative_update(before) if diagnose else None)

    def set_learning_rate(self, lr: float | torch.Tensor) -> None:
        """AdamW also needs to know of a CUDA graph, although its fused form keeps all on the device anyway."""
        capturing = isinstance(lr, torch.Tensor) and torch.cuda.is_current_stream_capturing()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if "capturable" in group:
                group["capturable"] = capturing

    def step_unless_skipped(self, finite) -> torch.Tensor:
        """The optimizer's step, without effect where `finite` is False -> 1.0 where it was skipped, else 0.0."""
        skipped = torch.logical_not(finite, out=torch.empty((), device=finite.device))
        self.optimizer.found_inf = skipped  # fused optimizers read it on the device; the scaler has its own for its scale
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return skipped

    def restore_buffers(self, finite) -> None:
        """Undo what the forward pass of a skipped step did to running statistics."""
        torch.where(finite, self.buffers.words, self.before, out=self.before)
        self.buffers.words.copy_(self.before)

    @torch.no_grad()
    def copy_parameters(self) -> list:
        return list(torch._foreach_mul(self.parameters, 1.0))

    @torch.no_grad()
    def relative_update(self, before: list):
        """The norm of the change of the weights over the norm of the weights before."""
        weights = torch.stack(torch._foreach_norm(before)).norm()
        torch._foreach_sub_(before, self.parameters)
        return torch.stack(torch._foreach_norm(before)).norm() / weights

    @torch.no_grad()
    def update_average(self) -> None:
        """Weights and running statistics of the average by one call; it starts as a copy after the first step."""
        share = 1 - self.decay if self.started else 1.0
        torch._foreach_lerp_(self.averages, [*self.parameters, *self.buffers.floats], share)
        for count, now in zip(self.average_buffers.others, self.buffers.others):
            count.copy_(now)
        self.started = True

    def remember_buffers(self) -> None:
        self.before = self.buffers.words.clone()

    def sync_buffers(self) -> None:
        """Of several processes, between training and evaluation: each takes the mean of all running statistics.

        Failure BUG: the weights are no longer the same everywhere, which only a fault of hardware or software can do.
        """
        if self.ranks.size == 1:
            return
        bits = torch.stack([parameter.detach().view(torch.int32).sum() for parameter in self.parameters])
        if not self.ranks.all_equal(bits):
            raise Failure(BUG, f"ranks diverged: their weights are not the same ({self.ranks.size} processes)",
                          "go back to the last checkpoint with --resume auto; if it happens again, suspect a GPU")
        for buffers in (*self.buffers.floats, *(self.average_buffers.floats if self.average else ())):
            buffers.copy_(self.ranks.mean(buffers.double()))  # in float64 the mean of equal numbers is that number
        self.remember_buffers()

    def amp_scale(self) -> float | None:
        """The loss scale, None without one; waits for the device.  Failure DIVERGED: at any scale FP16 overflows."""
        if not self.scaler.is_enabled():
            return None
        scale = self.scaler.get_scale()
        if scale < SMALLEST_SCALE:
            raise Failure(DIVERGED, f"the gradient overflows FP16 at any loss scale (now {scale:.3g})", NONFINITE_HINT)
        return scale

    @property
    def checkpoint_bytes(self) -> int:
        """What a state_dict holds after a step: each weight, its moments in the optimizer, and its average."""
        group = self.optimizer.param_groups[0]
        moments = 2 if "betas" in group else bool(group["momentum"])
        return (1 + moments + bool(self.average)) * sum(parameter.nbytes for parameter in self.parameters)

    def state_dict(self) -> dict:
        """Weights, moving average, optimizer and loss scale, at the end of an epoch."""
        if self.average:
            self.average.n_averaged.fill_(self.started)
        self.set_learning_rate(0.0)  # a number, after a captured step, too; each step sets its own
        return {"net": self.net.state_dict(), "average": self.average.state_dict() if self.average else None,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        if self.average:
            self.average.load_state_dict(state["average"])
            self.started = bool(self.average.n_averaged)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.remember_buffers()


class FlatBuffers:
    """Moves the buffers of `net` (running statistics, counters) into one tensor, so that one kernel restores or averages all.

    words: that tensor, int32.  floats, others: its parts of floating-point and of other numbers, one per dtype.
    """

    def __init__(self, net):
        grouped, parts, end = {}, [], 0
        for buffer in net.buffers():
            grouped.setdefault(buffer.dtype, []).append(buffer)
        for dtype, buffers in sorted(grouped.items(), key=lambda item: -item[0].itemsize):  # so that the widest are aligned
            starts = [0]
            for buffer in buffers:  # aligned for vector loads
                starts.append(starts[-1] + -(-buffer.numel() // ALIGNMENT) * ALIGNMENT)
            begin, end = end, end + starts[-1] * dtype.itemsize // 4
            parts.append((dtype, buffers, starts, begin, end))
        self.words = torch.zeros(end, dtype=torch.int32, device=next(net.parameters()).device)
        self.floats, self.others = [], []
        for dtype, buffers, starts, begin, end in parts:
            part = self.words[begin:end].view(dtype)
            (self.floats if dtype.is_floating_point else self.others).append(part)
            for buffer, start in zip(buffers, starts):
                view = part[start:start + buffer.numel()].view(buffer.shape)
                view.copy_(buffer)
                buffer.data = view
