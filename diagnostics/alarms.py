"""Verdict and alarms of a run.  Imports no torch.

A collapse is a fall of validation accuracy below a reference, by `collapsed`: summary.json compares with the run's own best epoch
and also counts an accuracy near chance; plots/ and STUDY.md compare with the control, a KD run.  Chance is the accuracy of the
constant prediction of the largest class.  An alarm is a value beyond a limit, not a cause: STUDY.md counts how often each is
raised in runs that did not collapse.  MOVE and DEAD are set on those runs.
"""
from typing import NamedTuple

from diagnostics.classes import Confusion, effective_number

FALL = 5.0  # percentage points of validation accuracy below the reference: a collapse
NEAR = 5.0  # percentage points above chance
CLIPPED = 0.9  # share of the steps
SHARE = 0.8  # of one distillation term in the logit gradient
TEACHER = 50.0  # teacher accuracy (%) on the augmented images
SKIPPED = 0.01  # share of the steps
MOVE = 0.03  # relative norm of a weight update
DEAD = 0.1  # share of classes that are never predicted
# Of the effective number of predicted classes beyond the first over that of the labels: 0 for a constant prediction, whatever the
# sizes of the classes, and 1 for a perfect one.
CONCENTRATED = 0.5


def near_chance(chance: float) -> float:
    """The largest accuracy in percent that counts as near chance, which may be 1 %, 50 % or 96 %."""
    return min(2 * chance, chance + NEAR, (chance + 100) / 2)


def collapsed(last: float, reference: float) -> bool:
    """Whether a run collapsed.  last: its last validation accuracy (%).  reference: the control's last, or its own best."""
    return last < reference - FALL


class Alarm(NamedTuple):
    """A value beyond its limit.  epoch: of the worst value, None for a mean over the run."""
    name: str
    value: float
    limit: float
    epoch: int | None
    text: str


def judge(method, monitor: str, rows: list, diagnostics: list[dict], val: Confusion, stopped_early: bool) -> dict:
    """Entries of summary.json: verdict, health, alarms, and advice, None unless the run collapsed or leaves out classes.

    method: a losses.chosen_method.ChosenMethod.  rows: of log.csv.  diagnostics: rows of diagnostics.csv.
    val: the confusion matrix of the best epoch's weights on the validation set.
    """
    found = alarms(method, monitor, rows, diagnostics, val, stopped_early)
    names = {alarm.name for alarm in found}
    remedies = [f"{name}: {remedy}" for name, remedy in advice(method, diagnostics).items() if name in names]
    verdict = "collapsed" if names & {"collapse", "chance"} else "early stop" if stopped_early else "completed"
    return {"verdict": verdict,
            "health": f"{len(found)} alarm{'s' * (len(found) > 1)}" if found else "healthy",
            "alarms": [alarm._asdict() for alarm in found],
            "advice": "; ".join(remedies) or None if verdict == "collapsed" or names & {"dead", "concentrated"} else None}


def alarms(method, monitor, rows, diagnostics, val: Confusion, stopped_early: bool) -> list[Alarm]:
    """The alarms of a run; arguments as for `judge`."""
    found, steps, by_share = [], sum(row.steps for row in rows), shares(method, diagnostics)

    def check(name: str, value, limit: float, text: str, epoch=None) -> None:
        if value is not None and value > limit:
            found.append(Alarm(name, value, limit, epoch, text))

    def worst(column: str) -> tuple:
        """The largest value and its epoch."""
        return max(((row[column], row["epoch"]) for row in diagnostics if row.get(column) is not None), default=(None, None))

    accuracy, last = [row.val_acc1 for row in rows], rows[-1].val_acc1
    best, chance, classes = max(accuracy), val.chance, len(val.names)
    near = near_chance(chance)
    if collapsed(last, best):
        found.append(Alarm("collapse", best - last, FALL, rows[-1].epoch, f"validation accuracy fell from {best:.1f} % in epoch "
                           f"{accuracy.index(best) + 1} to {last:.1f} % at the end (alarm above {FALL:g} points)"))
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
    move, epoch = worst("update_ratio")
    check("move", move, MOVE, f"large updates: in epoch {epoch} a step changes the weights by {move or 0:.1%} of their norm "
          f"(alarm above {MOVE:.0%})" + "".join(f"; {term.upper()} is {share:.0%} of the logit gradient"
                                                 for term, share in list(by_share.items())[:1]), epoch)
    dominant, minor = mean(diagnostics, "pull_whole"), mean(diagnostics, "pull_minor_whole")
    if dominant is not None and minor > dominant:
        found.append(Alarm("inverted", minor, dominant, None, "mixed images: the loss raises the logit of the minor label more "
                           f"than that of the dominant one ({minor:.3f} against {dominant:.3f} per image)"))
    taken = [row.steps - row.skipped_steps for row in rows]
    clipped = sum(row.clip_frac * count for row, count in zip(rows, taken)) / max(1, sum(taken))
    factors = [row["clip_factor"] for row in diagnostics if row["clip_factor"]]
    check("clipped", clipped, CLIPPED, f"{clipped:.0%} of the steps were clipped (alarm above {CLIPPED:.0%}), to "
          f"{sum(factors) / max(1, len(factors)):.0%} of the gradient on average")
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
    pair = "use --mixed-target pair, or " * ("mixed_target" in method.hyperparameters)
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
