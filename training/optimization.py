"""The optimizer step: recipe, learning-rate schedule, loss scaling, clipping, skipping and weight averaging.

Nothing in a step waits for the device.
"""
import math
from typing import NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel

from rundir.errors import BUG, DIVERGED, NONFINITE_HINT, Failure
from training.device import RunContext

SMALLEST_SCALE = 2.0**-14  # a loss that overflows FP16 at this scale is broken, not large
ALIGNMENT = 16  # elements, for vector loads
AVERAGE_WARMUP = 9  # of the moving average: its decay is t / (9 + t) while that is smaller


class Recipe(NamedTuple):
    """The flags of the same names; `milestones` and `warmup_epochs` in epochs."""
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

    @classmethod
    def of(cls, args) -> "Recipe":
        return cls(*(getattr(args, name) for name in cls._fields))


def build_optimizer(net, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over all parameters; the fused form skips a step on the device."""
    if recipe.opt == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay,
                                fused=True)
    if recipe.momentum:
        # Fused SGD allocates momentum uninitialised; after a skipped first step, usual in FP16, the second would use it.
        for parameter in net.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """The rate of global step `step` (from 0): linear warm-up, then cosine to 0 or x0.1 at every milestone epoch."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.sched == "multistep":
        return recipe.lr * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)
    progress = (step - warmup) / (recipe.epochs * steps_per_epoch - warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))


class StepResult(NamedTuple):
    """0-dim fp32 tensors.  skipped: 1 or 0.  norm: of the gradient before clipping.  relative_update: norm of the weights' change
    over their norm; None outside of diagnostics steps.  match_factor: of the gradient, by Update.match_norm; None without it."""
    skipped: torch.Tensor
    norm: torch.Tensor
    relative_update: torch.Tensor | None
    match_factor: torch.Tensor | None = None


class Update:
    """`update.backward(loss)` for each of the `micro_batches` of a batch, then `update(lr)`: one optimizer step.

    A step with a non-finite loss or gradient is skipped, by the device: weights, momentum and running statistics stay.  All ranks
    skip the same steps, as they have the same mean gradient.
    """

    def __init__(self, net, recipe: Recipe, context: RunContext, micro_batches: int = 1):
        self.net, self.optimizer, self.context, self.ranks = net, build_optimizer(net, recipe), context, context.ranks
        self.scaler = context.scaler()
        self.clip_grad, self.decay = recipe.clip_grad or math.inf, recipe.model_ema
        self.parameters = list(net.parameters())
        self.buffers = FlatBuffers(net)
        self.average = None
        if self.decay:
            self.average = AveragedModel(net, self.parameters[0].device)
            self.average_buffers = FlatBuffers(self.average.module)
            self.averages = [*self.average.module.parameters(), *self.average_buffers.floats]
        self.matched = ()  # the gradient of the `matched` losses of this step so far
        self.zero, self.share = torch.tensor([0.0, 1 / micro_batches], device=self.parameters[0].device)
        self.remember_buffers()

    @property
    def evaluated(self):
        """The network to evaluate and save: the moving average where there is one."""
        return self.average.module if self.average else self.net

    def backward(self, loss, matched=None) -> None:
        """Add the gradient of a micro-batch's loss, times its share of the batch.

        matched: another loss of it; the step rescales its gradient to the norm of that of these losses.
        """
        seed = torch.addcmul(self.share, loss.detach(), self.zero)  # NaN for a non-finite loss; all-reduced, so all ranks skip
        seed = self.scaler.scale(seed)
        if matched is not None:
            trained = [parameter for parameter in self.parameters if parameter.requires_grad]
            gradient = torch.autograd.grad(matched, trained, seed, retain_graph=True, materialize_grads=True)
            self.matched = torch._foreach_add(self.matched, gradient) if self.matched else gradient
        loss.backward(seed)

    @torch.no_grad()
    def __call__(self, lr: float | torch.Tensor, diagnose: bool = False) -> StepResult:
        """Take the step.  diagnose: also measure the relative update."""
        self.set_learning_rate(lr)
        factor = self.match_norm() if self.matched else None
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        before = self.copy_parameters() if diagnose else None
        finite = norm < math.inf
        self.optimizer.found_inf = skipped = torch.logical_not(finite, out=torch.empty((), device=finite.device))
        self.optimizer.step()  # unless skipped; the scaler has a found_inf of its own
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        torch.where(finite, self.buffers.words, self.before, out=self.before)  # running statistics: kept where skipped
        self.buffers.words.copy_(self.before)
        if self.average:
            self.update_average()
        if self.context.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # the next step may overwrite compiled networks' outputs
        return StepResult(skipped, norm, self.relative_update(before) if diagnose else None, factor)

    def match_norm(self) -> torch.Tensor:
        """Rescale the gradient to the norm of that of the `matched` losses -> the factor, independent of the loss scale.

        Where a norm is not finite, or that of the gradient 0, neither is the factor, and the step is skipped.  Done before
        unscaling, so that the scaler sees an overflow in either gradient.
        """
        gradient, matched = [parameter.grad for parameter in self.parameters if parameter.grad is not None], self.matched
        self.matched = ()
        if self.ranks.size > 1:  # DDP averages the gradients of backward() alone
            matched = [self.ranks.mean(torch.cat([part.flatten() for part in matched]))]
        norm, wanted = map(torch.nn.utils.get_total_norm, (gradient, matched))
        factor = torch.addcmul(wanted / norm, norm, self.zero)  # NaN for an infinite norm
        torch._foreach_mul_(gradient, factor)
        return factor

    def set_learning_rate(self, lr: float | torch.Tensor) -> None:
        """Set the rate; AdamW's `capturable` must be set during CUDA graph capture."""
        capturing = isinstance(lr, torch.Tensor) and torch.cuda.is_current_stream_capturing()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if "capturable" in group:
                group["capturable"] = capturing

    def copy_parameters(self) -> list:
        return list(torch._foreach_mul(self.parameters, 1.0))

    def relative_update(self, before: list):
        weights = torch.stack(torch._foreach_norm(before)).norm()
        torch._foreach_sub_(before, self.parameters)
        return torch.stack(torch._foreach_norm(before)).norm() / weights

    def update_average(self) -> None:
        """Move the averages of weights and running statistics by 1 - decay_t towards the present ones.

        decay_t = min(decay, t / (9 + t)) in step t from 0: a copy at first, then (1 + n) / (10 + n) with n = t - 1, as in
        TensorFlow's ExponentialMovingAverage(num_updates=n).  A constant 0.9999 would keep the first weights for 10,000 steps.
        """
        step = self.average.n_averaged  # on the device: a CUDA graph counts on
        share = (AVERAGE_WARMUP / (step + AVERAGE_WARMUP)).clamp_(min=1 - self.decay)
        moves = torch._foreach_sub([*self.parameters, *self.buffers.floats], self.averages)
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(self.averages, moves)
        for count, now in zip(self.average_buffers.others, self.buffers.others):
            count.copy_(now)
        step.add_(1)

    def remember_buffers(self) -> None:
        self.before = self.buffers.words.clone()

    def sync_buffers(self) -> None:
        """Average the running statistics over the ranks, before evaluation.  Failure BUG: the ranks' weights differ."""
        if self.ranks.size == 1:
            return
        bits = torch.stack([parameter.detach().view(torch.int32).sum() for parameter in self.parameters])
        if not all(torch.equal(bits, other) for other in self.ranks.gather(bits)):
            raise Failure(BUG, f"ranks diverged: their weights are not the same ({self.ranks.size} processes)",
                          "go back to the last checkpoint with --resume auto; if it happens again, suspect a GPU")
        for buffers in (*self.buffers.floats, *(self.average_buffers.floats if self.average else ())):
            buffers.copy_(self.ranks.mean(buffers.double()))  # exact in float64 for equal numbers
        self.remember_buffers()

    def amp_scale(self) -> float | None:
        """The loss scale, None without one; waits for the device.  Failure DIVERGED: it is below SMALLEST_SCALE."""
        if not self.scaler.is_enabled():
            return None
        scale = self.scaler.get_scale()
        if scale < SMALLEST_SCALE:
            raise Failure(DIVERGED, f"the gradient overflows FP16 at any loss scale (now {scale:.3g})", NONFINITE_HINT)
        return scale

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a state_dict after a step: parameters, optimizer moments, moving average."""
        group = self.optimizer.param_groups[0]
        moments = 2 if "betas" in group else bool(group["momentum"])
        return (1 + moments + bool(self.average)) * sum(parameter.nbytes for parameter in self.parameters)

    def state_dict(self) -> dict:
        self.set_learning_rate(0.0)  # a float: after CUDA graph capture it is a tensor
        return {"net": self.net.state_dict(), "average": self.average.state_dict() if self.average else None,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.remember_buffers()


class FlatBuffers:
    """The buffers of `net` (running statistics, counters) as views of one tensor, so that one kernel restores or averages all.

    words: that tensor, int32.  floats, others: views of its floating-point and other parts, one per dtype.
    """

    def __init__(self, net):
        grouped = {}
        for buffer in net.buffers():
            grouped.setdefault(buffer.dtype, []).append(buffer)
        grouped = dict(sorted(grouped.items(), key=lambda item: -item[0].itemsize))  # widest first, for alignment
        sizes = [[-(-buffer.numel() // ALIGNMENT) * ALIGNMENT for buffer in buffers] for buffers in grouped.values()]
        words = [sum(each) * dtype.itemsize // 4 for each, dtype in zip(sizes, grouped)]
        self.words = torch.zeros(sum(words), dtype=torch.int32, device=next(net.parameters()).device)
        self.floats, self.others = [], []
        for (dtype, buffers), each, part in zip(grouped.items(), sizes, self.words.split(words)):
            part = part.view(dtype)
            (self.floats if dtype.is_floating_point else self.others).append(part)
            for buffer, padded in zip(buffers, part.split(each)):
                view = padded[:buffer.numel()].view(buffer.shape)
                view.copy_(buffer)
                buffer.data = view
