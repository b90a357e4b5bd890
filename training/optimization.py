"""One optimizer step: learning rate, optimizer, and `Update`, which scales, clips, steps and averages.

Nothing here waits for the device inside a step: counts stay on it and are read once per epoch.
"""
import math
from typing import NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel

from rundir.errors import BUG, DIVERGED, NONFINITE_HINT, Failure
from training.device import Machine

SMALLEST_SCALE = 2.0**-14  # a loss that overflows FP16 at this scale is broken, not large
ALIGNMENT = 16  # elements


def build_optimizer(net, args) -> torch.optim.Optimizer:
    """AdamW or SGD over all parameters, in the fused form that leaves a skipped FP16 step to the device."""
    if args.opt == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    if args.momentum:
        # Fused SGD allocates its momentum uninitialised; were the first step skipped (usual in FP16), the second would use it.
        for parameter in net.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(step: int, args, steps_per_epoch: int) -> float:
    """The rate of global step `step` (from 0): linear warmup from 0, then cosine to 0 or x0.1 at every milestone epoch."""
    warmup = args.warmup_epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.sched == "multistep":
        return args.lr * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in args.milestones)
    progress = (step - warmup) / (args.epochs * steps_per_epoch - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Taken(NamedTuple):
    """A step that was taken, in 0-dim fp32 tensors.  skipped: 1 or 0.  norm: of its gradient, before clipping.  move: the norm of
    what it changed in the weights over theirs; None where it was not looked at."""
    skipped: torch.Tensor
    norm: torch.Tensor
    move: torch.Tensor | None


class Update:
    """`update.backward(loss)`, once for each of the `parts` of a batch, and `update(lr)` are one optimizer step: scale, backward,
    unscale, clip, step, average.

    A step whose loss or gradient is not finite, in whatever precision, leaves weights, momentum and running statistics as they
    were; it counts as skipped.  The device decides, nothing waits for it.  Of several processes all skip a step or none: they
    see one mean gradient.
    """

    def __init__(self, net, optimizer, machine: Machine, clip_grad: float, ema_decay: float, parts: int = 1):
        self.net, self.optimizer, self.machine, self.ranks = net, optimizer, machine, machine.ranks
        self.scaler = machine.scaler()
        self.clip_grad = clip_grad or math.inf
        self.parameters = list(net.parameters())
        self.buffers = FlatBuffers(net)
        if ema_decay:
            self.average = AveragedModel(net)
            self.average_buffers = FlatBuffers(self.average.module)
            self.averages = [*self.average.module.parameters(), *self.average_buffers.floats]
        else:
            self.average = None
        self.ema_decay, self.started = ema_decay, False
        self.zero, self.share = torch.tensor([0.0, 1 / parts], device=self.parameters[0].device)
        self.remember_buffers()

    @property
    def evaluated(self):
        """The network whose weights count: the moving average where there is one."""
        return self.average.module if self.average else self.net

    def backward(self, loss) -> None:
        """Add the gradient of one part's loss, the mean over its images; of the mean over all parts, that is its share."""
        seed = torch.addcmul(self.share, loss.detach(), self.zero)  # NaN for a sick loss: then no process has a finite gradient
        loss.backward(self.scaler.scale(seed))

    def __call__(self, lr: float | torch.Tensor, look: bool = False) -> Taken:
        """Take the step.  look: how far it goes, too."""
        self.set_groups(lr, isinstance(lr, torch.Tensor) and torch.cuda.is_current_stream_capturing())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        before = self.copy_parameters() if look else None
        kept = norm < math.inf
        skipped = torch.logical_not(kept, out=torch.empty((), device=norm.device))
        self.optimizer.found_inf = skipped  # fused optimizers read it on the device; the scaler has its own for its scale
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        torch.where(kept, self.buffers.words, self.before, out=self.before)
        self.buffers.words.copy_(self.before)
        if self.average:
            self.update_average()
        return Taken(skipped, norm, self.relative_move(before) if look else None)

    def set_groups(self, lr: float | torch.Tensor, capturable: bool) -> None:
        """Tell the optimizer.  AdamW wants to know of a CUDA graph, although its fused form keeps all on the device anyway."""
        for group in self.optimizer.param_groups:
            group |= {"lr": lr} | {name: capturable for name in ("capturable",) if name in group}

    @torch.no_grad()
    def copy_parameters(self) -> list:
        return list(torch._foreach_mul(self.parameters, 1.0))

    @torch.no_grad()
    def relative_move(self, before: list):
        """The norm of what a step changed, over that of the weights before."""
        weights = torch.stack(torch._foreach_norm(before)).norm()
        torch._foreach_sub_(before, self.parameters)
        return torch.stack(torch._foreach_norm(before)).norm() / weights

    @torch.no_grad()
    def update_average(self) -> None:
        """Weights and running statistics of the average by one call; the first step is its start, and counters are copied."""
        share = 1 - self.ema_decay if self.started else 1.0
        torch._foreach_lerp_(self.averages, [*self.parameters, *self.buffers.floats], share)
        for count, now in zip(self.average_buffers.others, self.buffers.others):
            count.copy_(now)
        self.started = True

    def remember_buffers(self) -> None:
        self.before = self.buffers.words.clone()

    def agree(self) -> None:
        """Of several processes, between training and evaluation: each takes the mean of all running statistics.

        Failure BUG: the weights are no longer the same everywhere, which only a fault of hardware or software can do.
        """
        if self.ranks.size == 1:
            return
        bits = torch.stack([parameter.detach().view(torch.int32).sum() for parameter in self.parameters])
        if not self.ranks.agree(bits):
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
        self.set_groups(0.0, False)  # a number, after a recorded step, too; each step is given its own
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


def accuracy(logits, labels):
    """0-dim fp32 tensor: the share of rows whose largest logit is their label's."""
    best = logits.argmax(1)
    return torch.eq(best, labels, out=torch.empty(best.shape, device=best.device)).mean()  # compared and converted by one launch
