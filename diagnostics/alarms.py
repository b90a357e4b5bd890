"""Verdict and alarms of a run.  Imports no torch.

A collapse is a fall of validation accuracy below a reference, by `collapsed`: summary.json compares with the run's own best epoch
and also counts an accuracy near chance; plots/ and STUDY.md compare with the control, a KD run.  An alarm is a value beyond a
limit, not a cause: results/ablation-small/alarms.csv counts how often each is raised in runs that collapsed, and in others.
"""
import math
from typing import NamedTuple

from diagnostics.classes import Confusion, effective_number

FALL = 5.0  # percentage points of validation accuracy below the reference: runs of that folder end at most 1.9 below their best
NEAR = 5.0  # percentage points above chance: as FALL
CLIPPED = 0.9  # share of the steps: then clipping is not for rare large gradients, but scales nearly all
SHARE = 0.8  # of one distillation term in the logit gradient: four times all others together
TEACHER = 50.0  # teacher accuracy (%) on the augmented images: below, it is wrong more often than right
SKIPPED = 0.01  # share of the steps: a loss scale that is doubled every 2,000 steps skips 0.05 %
MOVE = 1.48  # relative update norm over that of equilibrium: 90th percentile of the calibrating runs that did not collapse
DEAD = 0.03  # share of classes that are never predicted: likewise
HIGH = 0.5  # share of the peak learning rate: above, cosine is in its first half, and multistep before its first milestone
# Of the effective number of predicted classes beyond the first over that of the labels: 0 for a constant prediction, whatever the
# sizes of the classes, and 1 for a perfect one.  0.5 is half-way.
CONCENTRATED = 0.5
BETA1 = 0.9  # of torch.optim.AdamW


def near_chance(chance: float) -> float:
    """The largest accuracy in percent that counts as near chance, which may be 1 %, 50 % or 96 %."""
    return min(2 * chance, chance + NEAR, (chance + 100) / 2)


def largest_fall(images: int | None) -> float:
    """The points below the reference that are no collapse: FALL, or three of the validation images, if their number is known."""
    return max(FALL, 300 / images) if images else FALL


def collapsed(last: float, reference: float, images: int | None = None) -> bool:
    """Whether a run collapsed.  last: its last validation accuracy (%).  reference: the control's last, or its own best."""
    return reference - last > largest_fall(images) + 1e-9  # three images may differ from 300 / images by rounding


class Alarm(NamedTuple):
    """A value beyond its limit.  epoch: of the worst value, None for a mean over the run."""
    name: str
    value: float
    limit: float
    epoch: int | None
    text: str


def judge(method, recipe, monitor: str, rows: list, diagnostics: list[dict], val: Confusion, stopped_early: bool) -> dict:
    """Entries of summary.json: verdict, health, alarms, and advice, None unless the run collapsed or leaves out classes.

    method: a losses.chosen_method.ChosenMethod.  recipe: a training.optimization.Recipe.  rows: of log.csv.
    diagnostics: rows of diagnostics.csv.  val: the confusion matrix of the best epoch's weights on the validation set.
    """
    found = alarms(method, recipe, monitor, rows, diagnostics, val, stopped_early)
    names = {alarm.name for alarm in found}
    remedies = [f"{name}: {remedy}" for name, remedy in advice(method, diagnostics).items() if name in names]
    verdict = "collapsed" if names & {"collapse", "chance"} else "early stop" if stopped_early else "completed"
    return {"verdict": verdict,
            "health": f"{len(found)} alarm{'s' * (len(found) > 1)}" if found else "healthy",
            "alarms": [alarm._asdict() for alarm in found],
            "advice": "; ".join(remedies) or None if verdict == "collapsed" or names & {"dead", "concentrated"} else None}


def alarms(method, recipe, monitor, rows, diagnostics, val: Confusion, stopped_early: bool) -> list[Alarm]:
    """The alarms of a run; arguments as for `judge`."""
    found, steps, by_share = [], sum(row.steps for row in rows), shares(method, diagnostics)

    def check(name: str, value, limit: float, text: str, epoch=None) -> None:
        if value is not None and value > limit:
            found.append(Alarm(name, value, limit, epoch, text))

    accuracy, last = [row.val_acc1 for row in rows], rows[-1].val_acc1
    best, chance, classes = max(accuracy), val.chance, len(val.names)
    near, images = near_chance(chance), int(val.labels.sum())
    if collapsed(last, best, images):
        fall = largest_fall(images)
        found.append(Alarm("collapse", best - last, fall, rows[-1].epoch, f"validation accuracy fell from {best:.1f} % in epoch "
                           f"{accuracy.index(best) + 1} to {last:.1f} % at the end (alarm above {fall:.3g} points)"))
    if last <= near:
        found.append(Alarm("chance", last, near, rows[-1].epoch, f"validation accuracy is {last:.1f} % at the end, near "
                           f"chance, {chance:.3g} %, the share of the largest of {classes} classes (alarm up to {near:.3g} %)"))
    labels, predicted = effective_number(val.labels), effective_number(val.predicted)
    fewest, most = 1 + CONCENTRATED * (labels - 1), int(val.predicted.argmax())
    if predicted < fewest:
        of_predictions, of_labels = (number[most] / number.sum() for number in (val.predicted, val.labels))
        found.append(Alarm("concentrated", predicted, fewest, rows[-1].best_epoch, f"predictions are concentrated: in the best "
                           f"epoch {val.names[most]!r} is predicted for {of_predictions:.0%} of the validation images and the "
                           f"label of {of_labels:.0%}; the effective number of predicted classes is {predicted:.1f}, that of "
                           f"the labels {labels:.1f} (alarm below {fewest:.1f})"))
    dead = diagnostics[-1]["dead_classes"] if diagnostics else None
    if dead:
        check("dead", dead / classes, DEAD, f"{dead} of {classes} classes are never predicted at the end "
              f"(alarm above {DEAD:.0%})", diagnostics[-1]["epoch"])
    skipped = sum(row.skipped_steps for row in rows) / steps
    check("skipped", skipped, SKIPPED, f"{skipped:.1%} of the steps were skipped: loss or gradient was not finite "
          f"(alarm above {SKIPPED:.0%})")
    move, ratio, epoch = max(moves(recipe, rows, diagnostics), default=(None, 0, None))
    check("move", move, MOVE, f"large updates: in epoch {epoch} a step changes the weights by {ratio:.1%} of their norm, "
          f"{move or 0:.2f} times what learning rate and weight decay alone set (alarm above {MOVE:g})" + "".join(
              f"; {term.upper()} is {share:.0%} of the logit gradient" for term, share in list(by_share.items())[:1]), epoch)
    dominant, minor = mean(diagnostics, "pull_whole"), mean(diagnostics, "pull_minor_whole")
    if dominant is not None and minor > dominant:
        found.append(Alarm("inverted", minor, dominant, None, "mixed images: the loss raises the logit of the minor label more "
                           f"than that of the dominant one ({minor:.3f} against {dominant:.3f} per image)"))
    taken = [row.steps - row.skipped_steps for row in rows]
    clipped = sum(row.clip_frac * count for row, count in zip(rows, taken)) / max(1, sum(taken))
    factors = [row["clip_factor"] for row in diagnostics if row["clip_factor"]]
    check("clipped", clipped, CLIPPED, f"{clipped:.0%} of the steps were clipped (alarm above {CLIPPED:.0%}), to "
          f"{sum(factors) / max(1, len(factors)):.0%} of the gradient on average; STUDY.md has an example of its cost")
    for term, share in by_share.items():
        check("share", share, SHARE, f"{term.upper()} is {share:.0%} of the logit gradient (alarm above {SHARE:.0%})")
    teacher = mean(diagnostics, "teacher_acc1")
    if teacher is not None and teacher < TEACHER:
        found.append(Alarm("teacher", teacher, TEACHER, None, f"the teacher's accuracy on augmented images is {teacher:.0f} % "
                           f"(alarm below {TEACHER:g} %; either label {mean(diagnostics, 'teacher_either'):.0f} %)"))
    if stopped_early:
        kept = accuracy[rows[-1].best_epoch - 1]
        check("early stop", last - kept, 0.0, "early stopping while validation accuracy was rising: "
              f"{kept:.1f} % in the best epoch by --monitor {monitor}, {last:.1f} % in the last")
        epoch, lr, peak = rows[-1].epoch, rows[-1].lr, max(row.lr for row in rows)
        check("stop", lr / peak, HIGH, f"stopped before the learning rate came down: after {epoch / recipe.epochs:.0%} of the "
              f"schedule it is {lr:.3g}, {lr / peak:.0%} of its peak (alarm above {HIGH:.0%})", epoch)
    return found


def equilibrium(recipe, lr: float) -> tuple[float, float]:
    """The share of the weights' squared norm that weight decay takes per step, and the relative update norm that balances it.

    For scale-invariant weights (before a normalisation) and random gradients, the second is sqrt(2 lr wd / (1 + momentum)) with
    SGD and sqrt(2 lr wd (1 - beta1) / (1 + beta1)) with AdamW: rotational equilibrium (arXiv 2305.17212).
    """
    momentum, beta = (recipe.momentum, recipe.momentum) if recipe.opt == "sgd" else (0.0, BETA1)
    decay = 2 * lr * recipe.weight_decay / (1 - momentum)
    return decay, math.sqrt(decay * (1 - beta) / (1 + beta))


def moves(recipe, rows: list, diagnostics: list[dict]) -> list[tuple[float, float, int]]:
    """By epoch: the mean relative update norm over that of equilibrium at the epoch's mean learning rate, itself, and the epoch.

    Only of epochs by whose end weight decay alone has taken the squared norm to 1 / e: before, the initialisation sets the norm.
    """
    ratios, found, taken = {row["epoch"]: row.get("update_ratio") for row in diagnostics}, [], 0.0
    before = 0.0 if recipe.warmup_epochs else recipe.lr
    for row in rows:  # which have the rate of the last step
        constant = recipe.sched == "multistep" and row.epoch > recipe.warmup_epochs
        decay, balance = equilibrium(recipe, row.lr if constant else (before + row.lr) / 2)
        before, taken = row.lr, taken + row.steps * decay
        if taken >= 1 and (ratio := ratios.get(row.epoch)) is not None:
            found.append((ratio / balance, ratio, row.epoch))
    return found


def mean(diagnostics: list[dict], column: str) -> float | None:
    """The mean of a column of diagnostics.csv over all images of the run; None where it is empty."""
    filled = [(row[column], row["images"]) for row in diagnostics if row.get(column) is not None]
    return sum(value * images for value, images in filled) / sum(images for _, images in filled) if filled else None


def shares(method, diagnostics: list[dict]) -> dict:
    """The share of each distillation term in the logit gradient over the run, in descending order."""
    found = {term: mean(diagnostics, f"share_{term}") or 0.0 for term in method.record.terms if term != "ce"}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def advice(method, diagnostics: list[dict]) -> dict[str, str]:
    """Alarm -> the change to try."""
    weights = method.record.weight_of
    largest = [f"--{weights[term].replace('_', '-')}" for term in list(shares(method, diagnostics))[:1] if term in weights]
    or_weight = "".join(f" or {flag}" for flag in largest)
    pair = "use --mixed-target pair, or " * (method.hyperparameters.get("mixed_target", "pair") != "pair")
    uneven = ", or, with classes of uneven size, use --class-weights balanced" * (method.class_weights != "balanced")
    return {
        "concentrated": f"train longer{uneven}",
        "skipped": f"lower --lr{or_weight}, or use --amp bf16",
        "move": f"halve --lr{or_weight}, or clip the gradient (--clip-grad 1), one at a time",
        "inverted": f"{pair}mix less (--mix-prob)",
        "clipped": " or ".join(["raise --clip-grad", *(f"lower {flag}" for flag in largest)]),
        "share": ", or ".join([*(f"lower {flag}" for flag in largest), "raise --ce-weight"]),
        "teacher": "train the teacher under the same augmentation, or weaken it (--policy none, a lower --mix-prob)",
    }
