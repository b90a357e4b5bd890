"""Evaluation on a split, early stopping, and checks of a teacher before distillation."""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import models
from diagnostics.alarms import near_chance
from diagnostics.classes import Confusion, effective_number
from rundir.errors import DIVERGED, NONFINITE_HINT, USAGE, Failure
from training.device import RunContext

ECE_BINS = 15
# Share of images whose correctness may change between precisions: measured, rounded up.
CHANGED = {"off": 0.0001, "fp16": 0.002, "bf16": 0.01}


class Evaluation(NamedTuple):
    """Cross-entropy in nats, accuracies in percent, expected calibration error as a fraction, int64 (N,) predictions."""
    loss: float
    acc1: float
    acc5: float
    ece: float
    predictions: torch.Tensor

    def columns(self) -> dict:
        return {"val_loss": self.loss, "val_acc1": self.acc1, "val_acc5": self.acc5, "val_ece": self.ece}

    def class_columns(self, classes: int) -> dict:
        """Columns of diagnostics.csv; `dead_classes` is None with fewer than five images per class."""
        images = count(self.predictions, classes)
        predicted = sum(number > 0 for number in images)
        return {"dead_classes": classes - predicted if len(self.predictions) >= 5 * classes else None,
                "predicted_classes": predicted, "effective_classes": effective_number(images)}

    def confusion(self, labels, names: list[str]) -> Confusion:
        names = [name.encode(errors="backslashreplace").decode() for name in names]  # of a folder: may be no valid UTF-8
        counts = count(labels * len(names) + self.predictions, len(names) ** 2)
        return Confusion(names, np.array(counts, dtype=int).reshape(len(names), len(names)))

    def agreement(self, other: "Evaluation") -> float:
        return (self.predictions == other.predictions).double().mean().item()


def count(indices, size: int) -> list[float]:
    """How often each of 0 ... size - 1 is in `indices`, int64 (N,); unlike bincount, of a size that the host knows."""
    ones = torch.ones(indices.shape, dtype=torch.float64, device=indices.device)
    return ones.new_zeros(size).scatter_add_(0, indices, ones).tolist()


@torch.no_grad()
def evaluate(net, split, mean, std, context: RunContext, batch_size: int) -> Evaluation:
    """Evaluate in eval mode on a split, which is divided among the ranks; restores the network's mode.

    batch_size: that of training, which is known to fit in memory.  ECE with 15 equal bins (Guo et al. 2017, arXiv 1706.04599).
    """
    training, mine = net.training, context.ranks.share(len(split.labels))
    mean, std = (torch.tensor(numbers, dtype=torch.float32, device=context.device) for numbers in (mean, std))
    net.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=context.device)
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64, device=context.device)
    predictions = torch.zeros_like(split.labels)
    for first in mine[::batch_size]:
        rows = slice(first, min(first + batch_size, mine.stop))
        begin = max(mine.start, rows.stop - batch_size)  # overlaps: cuDNN benchmarks each new batch size
        labels = split.labels[rows]
        with context.autocast:
            logits = models.infer(net, models.normalise(split.part(slice(begin, rows.stop)), mean, std))
        logits = logits[first - begin:].float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="none")
        sums += torch.stack([losses.double().sum(), hits[:, 0].double().sum(), hits.double().sum()])
        confidence = logits.softmax(1).amax(1)
        bins = (confidence.nan_to_num() * ECE_BINS).long().clamp(max=ECE_BINS - 1)  # NaN is no index
        gaps.scatter_add_(0, bins, confidence.double() - hits[:, 0].double())
        predictions[rows] = best[:, 0]
    net.train(training)
    for part in (sums, gaps, predictions):
        context.ranks.sum(part)
    (loss, top1, top5), count = sums.tolist(), len(split.labels)
    return Evaluation(loss / count, 100 * top1 / count, 100 * top5 / count, gaps.abs().sum().item() / count, predictions)


class EarlyStop:
    """Tracks the best epoch by `monitor`; `stop` is True after `patience` epochs without improvement."""

    def __init__(self, monitor: str, patience: int):
        self.monitor, self.patience = monitor, patience
        self.best_value, self.best_loss, self.best_epoch, self.bad_epochs = -math.inf, math.inf, 0, 0

    def update(self, epoch: int, evaluation: Evaluation) -> bool:
        """Count an epoch -> whether it is the best so far."""
        value = -evaluation.loss if self.monitor == "val_loss" else evaluation.acc1
        if not math.isfinite(evaluation.loss):
            raise Failure(DIVERGED, f"val_loss is not finite in epoch {epoch} ({evaluation.loss})", NONFINITE_HINT)
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


def tolerance(images: int, *precisions: str) -> float:
    """The largest expected difference in accuracy (percentage points) between these precisions, keys of AMP.

    Four standard deviations of the number of images whose correctness changes, and one image.
    """
    share = max(CHANGED[each] for each in precisions)
    return 100 * (1 + 4 * math.sqrt(share * images)) / images


def has_other_images(info: dict, data) -> bool:
    """Whether the folder of images at hand is not as it was for the best.pt with the metadata `info`; unknown of older files."""
    return info["dataset"] == "imagefolder" and info.get("data_sha256") != data.fingerprint


def check_teacher(teacher, data, context: RunContext, batch_size: int, allow_weak: bool = False,
                  kept=lambda compute: compute()) -> Evaluation:
    """Evaluate the teacher on the test set, and print its line; of an Ensemble, after those of its teachers.

    kept: calls the function that it is given, or has its result from an earlier run.
    Failure USAGE: another accuracy than in its checkpoint on the same images, or, unless allow_weak, an accuracy near chance.
    """
    evaluation = kept(lambda: evaluate(teacher, data.test, data.mean, data.std, context, batch_size))
    if isinstance(teacher, models.Ensemble):
        for each in teacher.teachers:
            check_teacher(each, data, context, batch_size, allow_weak, kept)
        print(f"ensemble of {len(teacher.teachers)} teachers: {teacher.size / 1e6:.2f} M parameters, test accuracy "
              f"{evaluation.acc1:.2f} %")
        return evaluation
    info, recorded, images = teacher.info, teacher.info["test_acc1"], len(data.test.labels)
    resized = info["dataset"] == "imagefolder" and info["stored_size"] != data.image_size  # not the pixels of its own test set
    others = resized or has_other_images(info, data)
    mean, std = (" ".join(f"{number:.3f}" for number in info[name]) for name in ("mean", "std"))
    note = f", measured here, with mean {mean} and std {std}: its file has none to compare with" if recorded is None else (
        f" on images of {data.image_size} pixels; in its checkpoint {recorded:.2f} %, of {info['stored_size']}" if resized else
        f" on these images; on those of its checkpoint {recorded:.2f} %") * others
    print(f"teacher {info['model']}: {teacher.size / 1e6:.2f} M parameters, {info['image_size']} pixels, test accuracy "
          f"{evaluation.acc1:.2f} %{note}")
    most = tolerance(images, context.precision, info["amp"])
    if recorded is not None and not others and abs(evaluation.acc1 - recorded) > most:
        both = (f"{evaluation.acc1:.2f} %, in its checkpoint {recorded:.2f} % on {info['dataset']}; "
                f"precision explains {most:.2f} points")
        raise Failure(USAGE, f"the teacher's test accuracy does not match its checkpoint ({both})",
                      "check that --dataset, --data-dir, --image-size and --crop are those that it was trained on")
    confusion = evaluation.confusion(data.test.labels, data.classes)
    if info.get("imported") and (exchanged := confusion.exchanged):
        first, other = next(iter(exchanged.items()))
        print(f"is the order of its classes that of the data? most images of {first} are predicted as {other}; likewise for "
              f"{len(exchanged)} of {len(data.classes)} classes")
    chance = confusion.chance
    if evaluation.acc1 <= near_chance(chance) and not allow_weak:
        both = f"{evaluation.acc1:.2f} % of {images} test images; chance is {chance:.2f} %"
        remedy = ("check --teacher-image-size, --teacher-mean, --teacher-std and the order of its classes" if info.get("imported")
                  else "train it longer")
        raise Failure(USAGE, f"the teacher is near chance ({both})", f"{remedy}, or use --allow-weak-teacher")
    return evaluation
