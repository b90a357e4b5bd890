"""What the loops of both scripts call: device, schedule, the step, evaluation, early stopping, the progress line.

Nothing here waits for the device inside a step: counts and sums stay on it and are read once per epoch.
"""
import math
import os
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import kernels
from training import models
from training.distributed import Ranks
from training.runlog import BUG, DIVERGED, USAGE, Failure

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": torch.float32}
ECE_BINS = 15
CALMER = "lower --lr or the weights of the loss, or use --amp bf16"
SKIPS = 20  # optimizer steps in a row that a healthy run may skip: FP16's first scale of 2^16 finds its level in fewer
SMALLEST_SCALE = 2.0**-14  # a loss that overflows FP16 at this scale is broken, not large
ALIGNMENT = 16  # elements
TEACHER_TOLERANCE = 0.1  # percentage points: more than rounding in another precision, less than another normalisation


class Machine(NamedTuple):
    """Where the run happens, in what precision, with which kernels ("triton" or "reference"), and by which processes."""
    device: torch.device
    precision: str
    kernels: str = "reference"
    ranks: Ranks = Ranks()

    @property
    def dtype(self) -> torch.dtype:
        return AMP[self.precision]

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        """fp16 gradients need scaling; the other types have fp32's range."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def describe(self) -> dict:
        return {"device": str(self.device), "amp": self.precision, "kernels": self.kernels, "processes": self.ranks.size}

    def peak_memory_mb(self):
        return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1) if self.device.type == "cuda" else None


def prepare_machine(device: str, amp: str | None, seed: int, kernels_choice: str = "auto",
                    deterministic: bool = False) -> Machine:
    """Seed the weights' initialisation and choose device, precision and kernels; the data have generators of their own.

    Under torchrun each process has a GPU of its own, or all share the CPU.
    deterministic: the same bits every time on one machine and one set of versions, at some cost on a GPU.
    """
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # one more launch for each new tensor
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    ranks = Ranks.of_environment()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1 and device != "cpu":
        if device != "cuda":
            raise Failure(USAGE, f"every process needs a GPU of its own (--device {device})", "leave out --device")
        device = f"cuda:{ranks.local}"
    device = torch.device(device)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            fewer = ", or fewer processes per machine" if ranks.size > 1 else ""
            raise Failure(USAGE, f"no such GPU here (--device {device})", f"use --device cpu{fewer}, or check the driver")
        device = torch.device("cuda", device.index or 0)  # CUDA takes no device without a number
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = amp != "off"  # which would keep 10 of fp32's 23 bits in every convolution
    kernels.choose(kernels_choice)
    fused = kernels.use_triton(torch.empty(0, device=device))
    if kernels_choice == "triton" and not fused:
        raise Failure(USAGE, f"Triton needs a GPU (--kernels triton, --device {device})",
                      "use --kernels auto, or set TRITON_INTERPRET=1 to run it in Python")
    return Machine(device, amp or ("fp16" if device.type == "cuda" else "off"), "triton" if fused else "reference", ranks)


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


class Update:
    """`skipped = update(loss, lr)` is one optimizer step: scale, backward, unscale, clip, step, average; and its gradient norm.

    A step whose loss or gradient is not finite, in whatever precision, leaves weights, momentum and running statistics as they
    were; it counts as skipped and enters neither the gradient norms nor the clipped share.  `skipped` is a 0-dim fp32 tensor, 1
    or 0: the device decides, nothing waits for it.  Of several processes all skip a step or none: they see one mean gradient.
    """

    def __init__(self, net, optimizer, machine: Machine, clip_grad: float, ema_decay: float):
        self.net, self.optimizer, self.scaler, self.ranks = net, optimizer, machine.scaler(), machine.ranks
        self.clip_grad = clip_grad or math.inf
        self.parameters = list(net.parameters())
        self.buffers = FlatBuffers(net)
        if ema_decay:
            self.average = AveragedModel(net)
            self.average_buffers = FlatBuffers(self.average.module)
            self.averages = [*self.average.module.parameters(), *self.average_buffers.floats]
        else:
            self.average = None
        self.ema_decay = ema_decay
        self.zero, self.one = torch.arange(2.0, device=self.parameters[0].device)
        self.norms = []  # of this epoch's steps, on the device
        self.remember_buffers()

    @property
    def evaluated(self):
        """The network whose weights count: the moving average where there is one."""
        return self.average.module if self.average else self.net

    def __call__(self, loss, lr: float):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seed = torch.addcmul(self.one, loss.detach(), self.zero)  # NaN for a sick loss: then no process has a finite gradient
        loss.backward(self.scaler.scale(seed))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
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
        self.norms.append(norm)
        return skipped

    @torch.no_grad()
    def update_average(self) -> None:
        """Weights and running statistics of the average by one call; the first step is its start, and counters are copied."""
        share = 1 - self.ema_decay if self.average.n_averaged else 1.0
        torch._foreach_lerp_(self.averages, [*self.parameters, *self.buffers.floats], share)
        for count, now in zip(self.average_buffers.others, self.buffers.others):
            count.copy_(now)
        self.average.n_averaged += 1  # which is on the host

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

    def epoch_columns(self) -> dict:
        """The epoch's columns of log.csv, read from the device once; starts the next epoch's counts."""
        norms = torch.stack(self.norms).tolist()
        good = [norm for norm in norms if math.isfinite(norm)]
        columns = {
            "grad_norm_mean": sum(good) / len(good) if good else math.nan, "grad_norm_max": max(good, default=0.0),
            "clip_frac": sum(norm > self.clip_grad for norm in good) / len(good) if good else math.nan,
            "amp_scale": self.scaler.get_scale() if self.scaler.is_enabled() else None,
            "skipped_steps": len(norms) - len(good), "steps": len(norms),
        }
        if self.scaler.is_enabled() and columns["amp_scale"] < SMALLEST_SCALE:
            raise Failure(DIVERGED, f"the gradient overflows FP16 at any loss scale (now {columns['amp_scale']:.3g})", CALMER)
        self.norms.clear()
        return columns

    @property
    def checkpoint_bytes(self) -> int:
        """What a state_dict holds after a step: each weight, its moments in the optimizer, and its average."""
        group = self.optimizer.param_groups[0]
        moments = 2 if "betas" in group else bool(group["momentum"])
        return (1 + moments + bool(self.average)) * sum(parameter.nbytes for parameter in self.parameters)

    def state_dict(self) -> dict:
        """Weights, moving average, optimizer and loss scale, at the end of an epoch."""
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
    """Moves the buffers of `net` (running statistics, counters) into one tensor, so that one kernel restores or averages all.

    words: that tensor, int32.  floats, others: its parts of floating-point and of other numbers, one per dtype.
    """

    def __init__(self, net):
        grouped, parts, end = {}, [], 0
        for buffer in net.buffers():
            grouped.setdefault(buffer.dtype, []).append(buffer)
        for dtype, buffers in grouped.items():
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


class Means:
    """Means over an epoch's samples of losses and accuracy; and the end of a run that only skips steps.

    A step writes one row of a table on the device, by one launch: whether it was skipped, how much it got right, its losses.  The
    host reads rows that have arrived, without waiting, and what is missing at the end of the epoch.  Of several processes each
    has the means over all of them, so that all decide alike.
    """

    def __init__(self, machine: Machine, steps: int):
        self.ranks, self.steps = machine.ranks, steps
        self.in_a_row = 0  # steps skipped
        self.clear()

    def clear(self) -> None:
        self.names, self.table, self.samples, self.rows, self.arrived = (), None, [], [], None

    def add(self, samples: int, skipped, correct, **losses) -> None:
        """Add a step's batch of `samples`: whether it was `skipped`, the share that is `correct`, its losses; 0-dim fp32 tensors.

        The names are the same at every call.  Failure DIVERGED after too many skipped steps in a row; on a GPU some steps later.
        """
        if self.table is None:
            self.names = tuple(losses)
            self.table = torch.empty(self.steps, 2 + len(losses), device=skipped.device)
        row = self.table[len(self.samples)]
        torch.stack([skipped, correct, *(loss.detach() for loss in losses.values())], out=row)
        self.ranks.mean(row)
        self.samples.append(samples)
        new = self.table[len(self.rows):len(self.samples)]
        if not new.is_cuda:
            self.take(new)
        elif self.arrived is None and len(new) >= SKIPS:  # a copy for each step would be one more launch
            self.host = torch.empty(new.shape, pin_memory=True)
            self.host.copy_(new, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        elif self.arrived is not None and self.arrived.query():
            self.take(self.host)
            self.arrived = None

    def take(self, rows) -> None:
        for row in rows.tolist():
            self.rows.append(row)
            self.in_a_row = self.in_a_row + 1 if row[0] else 0
            if self.in_a_row > SKIPS:
                raise self.failure(f"more than {SKIPS} steps in a row were skipped")

    def read(self) -> dict:
        """The means over the rows that have arrived, as columns of log.csv; NaN where no step was kept."""
        sums = [0.0] * (2 + len(self.names))
        for samples, (skipped, *numbers) in zip(self.samples, self.rows):
            if not skipped:
                sums = [total + samples * number for total, number in zip(sums, (1.0, *numbers))]
        count, correct, *losses = sums
        return {name: total / count if count else math.nan
                for name, total in zip((*self.names, "train_acc1"), (*losses, 100 * correct))}

    def epoch_columns(self, epoch: int) -> dict:
        """The epoch's means; waits for the device and starts the next epoch's.  An epoch without a kept step ends the run."""
        self.take(self.table[len(self.rows):len(self.samples)])
        columns = self.read()
        if not all(map(math.isfinite, columns.values())):
            raise self.failure(f"no step of epoch {epoch} was kept")
        self.clear()
        return columns

    def failure(self, reason: str) -> Failure:
        """Names the loss that went first: the terms stand after their sum."""
        sick = [name for name, *values in zip(self.names, *(row[2:] for row in self.rows)) if not all(map(math.isfinite, values))]
        return Failure(DIVERGED, f"{sick[-1] if sick else 'the gradient'} is not finite ({reason})", CALMER)


class Evaluation(NamedTuple):
    """Cross-entropy in nats, accuracies in percent, expected calibration error as a fraction, int64 (N,) predictions."""
    loss: float
    acc1: float
    acc5: float
    ece: float
    predictions: torch.Tensor

    def columns(self) -> dict:
        return {"val_loss": self.loss, "val_acc1": self.acc1, "val_acc5": self.acc5, "val_ece": self.ece}

    def agreement(self, other: "Evaluation") -> float:
        """The share of images on which both predict the same class."""
        return (self.predictions == other.predictions).double().mean().item()


@torch.no_grad()
def evaluate(net, split, mean, std, machine: Machine, batch_size: int) -> Evaluation:
    """One pass over a split in eval mode, every image once, by one of the processes; the network's mode is restored.

    batch_size: that of training, so that what could be trained can be evaluated.

    Calibration error in 15 equal bins of confidence (Guo et al. 2017, arXiv 1706.04599).
    """
    training, mine = net.training, machine.ranks.share(len(split.labels))
    mean, std = (torch.tensor(numbers, dtype=torch.float32, device=machine.device) for numbers in (mean, std))
    net.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=machine.device)
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64, device=machine.device)
    predictions = torch.zeros_like(split.labels)
    for first in mine[::batch_size]:
        rows = slice(first, min(first + batch_size, mine.stop))
        labels = split.labels[rows]
        with machine.autocast():
            logits = net(models.normalise(split.images[rows], mean, std))
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="none")
        sums[:3] += torch.stack([losses.double().sum(), hits[:, 0].double().sum(), hits.double().sum()])
        sums[3] += len(labels)
        confidence = logits.softmax(1).amax(1)
        bins = (confidence.nan_to_num() * ECE_BINS).long().clamp(max=ECE_BINS - 1)  # NaN, as an index, would be a crash
        gaps.scatter_add_(0, bins, confidence.double() - hits[:, 0].double())
        predictions[rows] = best[:, 0]
    net.train(training)
    for part in (sums, gaps, predictions):
        machine.ranks.sum(part)
    loss, top1, top5, count = sums.tolist()
    assert count == len(split.labels), f"{count:.0f} of {len(split.labels)} images were evaluated"
    return Evaluation(loss / count, 100 * top1 / count, 100 * top5 / count, gaps.abs().sum().item() / count, predictions)


class EarlyStop:
    """Keeps the best epoch by `monitor` and says when `patience` epochs have passed without a better one."""

    def __init__(self, monitor: str, patience: int):
        self.monitor, self.patience = monitor, patience
        self.best_value, self.best_loss, self.best_epoch, self.bad_epochs = -math.inf, math.inf, 0, 0

    def update(self, epoch: int, evaluation: Evaluation) -> bool:
        """Count an epoch; True where it is the best so far."""
        value = -evaluation.loss if self.monitor == "val_loss" else evaluation.acc1
        if not math.isfinite(evaluation.loss):
            raise Failure(DIVERGED, f"val_loss is not finite in epoch {epoch} ({evaluation.loss})", CALMER)
        self.best_loss = min(self.best_loss, evaluation.loss)
        if value > self.best_value:
            self.best_value, self.best_epoch, self.bad_epochs = value, epoch, 0
            return True
        self.bad_epochs += 1
        return False

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("best_value", "best_loss", "best_epoch", "bad_epochs")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.bad_epochs

    def columns(self) -> dict:
        return {"best_val_loss": self.best_loss, "best_epoch": self.best_epoch, "bad_epochs": self.bad_epochs}


def accuracy(logits, labels):
    """0-dim fp32 tensor: the share of rows whose largest logit is their label's."""
    best = logits.argmax(1)
    return torch.eq(best, labels, out=torch.empty(best.shape, device=best.device)).mean()  # compared and converted by one launch


def global_batch_size(each: int, data, machine: Machine) -> int:
    """Images per step, where every process takes `each` of them; says so where there are several."""
    processes, images = machine.ranks.size, len(data.train.labels)
    together = each * processes
    if together > images:
        share = f"{processes} times {each}" if processes > 1 else each
        raise Failure(USAGE, f"--batch-size is larger than the training set ({share} of {images} images)", "choose a smaller one")
    if processes > 1:
        if each % 2:
            raise Failure(USAGE, f"an odd --batch-size parts pairs of images to mix ({each} in each of {processes} processes)",
                          "choose an even one")
        print(f"{processes} processes with --batch-size {each}: {together} images a step")
    return together


def check_teacher(teacher, data, machine: Machine, batch_size: int) -> Evaluation:
    """The teacher on the test set; refuses one that knows other classes, or is not as accurate as its checkpoint says."""
    info = teacher.info
    if list(info["classes"]) != list(data.classes):
        both = f"{len(info['classes'])} of {info['dataset']}, {len(data.classes)} of {data.name}"
        raise Failure(USAGE, f"the teacher knows other classes than the data ({both})",
                      "choose the --dataset that it was trained on, or another --teacher-checkpoint")
    evaluation = evaluate(teacher, data.test, data.mean, data.std, machine, batch_size)
    if info["test_acc1"] is None:
        print("the teacher's run never finished, so its checkpoint states no accuracy to check against")
    elif abs(evaluation.acc1 - info["test_acc1"]) > TEACHER_TOLERANCE:
        both = f"{evaluation.acc1:.2f} %, its checkpoint says {info['test_acc1']:.2f} % of {info['dataset']}"
        raise Failure(USAGE, f"the teacher's test accuracy is not what it was ({both})",
                      "check that --dataset and --data-dir are those that it was trained on")
    return evaluation


def test(run, net, data, machine: Machine, batch_size: int) -> dict:
    """Read the test set, once: the accuracies of `net`, the last epoch's, and of best.pt, which is told its own."""
    machine.ranks.wait()  # for the one that writes best.pt
    best = models.load(run / "best.pt", machine.device)
    last, chosen = (evaluate(each, data.test, data.mean, data.std, machine, batch_size).acc1 for each in (net, best))
    if machine.ranks.first:
        models.save(run / "best.pt", best, **best.info | {"test_acc1": chosen})
    return {"test_acc1_last": last, "test_acc1_best": chosen}


CLEAR = "\r\033[K"  # back to the start of the terminal's line, and empty it


class Progress:
    """One line per epoch; on a terminal also a live line inside the epoch, twice a second."""

    def __init__(self, epochs: int, steps_per_epoch: int, first: int = 1, stream=None):
        self.epochs, self.steps, self.first, self.stream = epochs, steps_per_epoch, first, stream or sys.stdout
        self.live, self.started, self.shown = self.stream.isatty(), time.perf_counter(), 0.0

    def step(self, epoch: int, step: int, lr: float, means: Means) -> None:
        now = time.perf_counter()
        if not self.live or now - self.shown < 0.5:
            return
        self.shown = now
        done = (epoch - self.first) * self.steps + step + 1  # since this process began
        eta = (now - self.started) / done * ((self.epochs - self.first + 1) * self.steps - done)
        losses = " ".join(f"{name.removeprefix('train_')} {value:.3f}" for name, value in means.read().items())
        rate = sum(means.samples) * done / (step + 1) / (now - self.started)
        self.stream.write(f"{CLEAR}epoch {epoch}/{self.epochs} [{step + 1}/{self.steps}] eta {clock(eta)} "
                          f"lr {lr:.2g} {losses} {rate:.0f} images/s")
        self.stream.flush()

    def epoch(self, row, best: bool) -> None:
        terms = {name: getattr(row, f"train_loss_{name}") for name in ("ce", "kl", "tckd", "nckd")}
        terms = " ".join(f"{name} {value:.3f}" for name, value in terms.items() if value is not None)
        left = (time.perf_counter() - self.started) / (row.epoch - self.first + 1) * (self.epochs - row.epoch)
        self.stream.write(
            f"{CLEAR * self.live}epoch {row.epoch}/{self.epochs}  lr {row.lr:.2g}  loss {row.train_loss:.3f} ({terms})  "
            f"train {row.train_acc1:.2f} %  val {row.val_acc1:.2f} % loss {row.val_loss:.3f}{' *' if best else '  '}  "
            f"{row.images_per_s:.0f} images/s  eta {clock(left)}\n")
        self.stream.flush()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
