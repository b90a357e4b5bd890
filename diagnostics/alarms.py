"""The verdict on a run: whether it collapsed, and which of its numbers are beyond a limit.

A collapse has one definition, `collapsed`.  A run alone is compared with its own best epoch; where the run of a control, plain
KD, is at hand, as in plots/ and STUDY.md, with the last epoch of that one.  A run alone that ends near chance collapsed, too.
An alarm is a number beyond a limit, and not a cause: STUDY.md counts how often each is raised in runs that did not collapse.
MOVE and DEAD are set on those runs.  Imports no torch.
"""
from typing import NamedTuple

FALL = 5.0  # percentage points of validation accuracy below the reference: a collapse
NEAR = 5.0  # percentage points above chance
CLIPPED = 0.9  # share of the steps
SHARE = 0.8  # of one distillation term in the logit gradient
TEACHER = 50.0  # accuracy (%) on the images that it teaches with
SKIPPED = 0.01  # share of the steps
MOVE = 0.03  # what a step changes, over the norm of the weights
DEAD = 0.1  # share of the classes that are never predicted


def collapsed(last: float, reference: float) -> bool:
    """Whether a run with that validation accuracy (%) in its last epoch collapsed.

    reference: the last epoch's accuracy of the control, the KD run beside it, where there is one; else the run's own best.
    """
    return last < reference - FALL


class Alarm(NamedTuple):
    """value: the number beyond its limit.  epoch: where it was worst, None for one of the whole run.  text: both, in words."""
    name: str
    value: float
    limit: float
    epoch: int | None
    text: str


def judge(method, monitor: str, rows: list, looked: list[dict], classes: int, stopped_early: bool) -> dict:
    """What summary.json says of a run: verdict, health, alarms, advice.

    method: a losses.chosen_method.ChosenMethod.  monitor: the flag.  rows: of log.csv.  looked: rows of
    diagnostics.csv.  classes: their number.
    advice: of a run that went wrong, what lowers each number beyond its limit; None of others.
    """
    found = alarms(method, monitor, rows, looked, classes, stopped_early)
    names = {alarm.name for alarm in found}
    remedies = [f"{name}: {remedy}" for name, remedy in advice(method, looked).items() if name in names]
    verdict = "collapsed" if names & {"collapse", "chance"} else "early stop" if stopped_early else "completed"
    return {"verdict": verdict,
            "health": f"{len(found)} alarm{'s' * (len(found) > 1)}" if found else "healthy",
            "alarms": [alarm._asdict() for alarm in found],
            "advice": "; ".join(remedies) or None if verdict == "collapsed" or "dead" in names else None}


def alarms(method, monitor, rows, looked, classes: int, stopped_early: bool) -> list[Alarm]:
    """Every number of a run that is beyond its limit; arguments as above."""
    found, steps, loud = [], sum(row.steps for row in rows), shares(method, looked)

    def check(name: str, value, limit: float, text: str, epoch=None) -> None:
        if value is not None and value > limit:
            found.append(Alarm(name, value, limit, epoch, text))

    def worst(column: str) -> tuple:
        """Its largest value and the epoch of it."""
        return max(((row[column], row["epoch"]) for row in looked if row.get(column) is not None), default=(None, None))

    accuracy, last = [row.val_acc1 for row in rows], rows[-1].val_acc1
    best, chance = max(accuracy), 100 / classes
    near = min(2 * chance, chance + NEAR)  # twice chance would be any accuracy at all of two classes
    if collapsed(last, best):
        found.append(Alarm("collapse", best - last, FALL, rows[-1].epoch, f"validation accuracy fell from {best:.1f} % in epoch "
                           f"{accuracy.index(best) + 1} to {last:.1f} % at the end (alarm above {FALL:g} points)"))
    if last <= near:
        found.append(Alarm("chance", last, near, rows[-1].epoch, f"validation accuracy is {last:.1f} % at the end, near the "
                           f"chance of {chance:.3g} % with {classes} classes (alarm up to {near:.3g} %)"))
    dead = looked[-1]["dead_classes"] if looked else None
    if dead:
        check("dead", dead / classes, DEAD, f"the student never predicts {dead} of {classes} classes at the end "
              f"(alarm above {DEAD:.0%})", looked[-1]["epoch"])
    skipped = sum(row.skipped_steps for row in rows) / steps
    check("skipped", skipped, SKIPPED, f"{skipped:.1%} of the steps were skipped: loss or gradient was not finite "
          f"(alarm above {SKIPPED:.0%})")
    move, epoch = worst("update_ratio")
    check("move", move, MOVE, f"steps are large: in epoch {epoch} one changes the weights by {move or 0:.1%} of their norm "
          f"(alarm above {MOVE:.0%})" + "".join(f"; {term.upper()} makes {share:.0%} of the logit gradient"
                                                 for term, share in list(loud.items())[:1]), epoch)
    dominant, minor = mean(looked, "pull_whole"), mean(looked, "pull_minor_whole")
    if dominant is not None and minor > dominant:
        found.append(Alarm("inverted", minor, dominant, None, "mixed images: the loss raises the logit of the smaller label more "
                           f"than that of the larger one ({minor:.3f} against {dominant:.3f} an image)"))
    clipped = sum(row.clip_frac * (row.steps - row.skipped_steps) for row in rows) / max(1, steps - sum(
        row.skipped_steps for row in rows))
    factors = [row["clip_factor"] for row in looked if row["clip_factor"]]
    check("clipped", clipped, CLIPPED, f"{clipped:.0%} of the steps were clipped (alarm above {CLIPPED:.0%}), to "
          f"{sum(factors) / max(1, len(factors)):.0%} of the gradient on average")
    for term, share in loud.items():
        check("share", share, SHARE, f"{term.upper()} makes {share:.0%} of the logit gradient (alarm above {SHARE:.0%})")
    teacher = mean(looked, "teacher_acc1")
    if teacher is not None and teacher < TEACHER:
        found.append(Alarm("teacher", teacher, TEACHER, None, f"the teacher is right about {teacher:.0f} % of the augmented "
                           f"images (alarm below {TEACHER:g} %; about either label {mean(looked, 'teacher_either'):.0f} %)"))
    if stopped_early:
        kept = accuracy[rows[-1].best_epoch - 1]
        check("early stop", last - kept, 0.0, "early stopping ended the run while validation accuracy was rising: "
              f"{kept:.1f} % in the best epoch by --monitor {monitor}, {last:.1f} % in the last")
    return found


def mean(looked: list[dict], column: str) -> float | None:
    """Of a column of diagnostics.csv, over the run, each image the same; None where it is empty."""
    there = [(row[column], row["images"]) for row in looked if row.get(column) is not None]
    return sum(value * images for value, images in there) / sum(images for _, images in there) if there else None


def shares(method, looked: list[dict]) -> dict:
    """Each distillation term's part of the logit gradient over the run, the largest first; empty for a teacher."""
    found = {term: mean(looked, f"share_{term}") or 0.0 for term in method.record.terms if term != "ce"}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def advice(method, looked: list[dict]) -> dict[str, str]:
    """What to change, by alarm."""
    weights = method.record.weight_of
    loudest = [f"--{weights[term].replace('_', '-')}" for term in list(shares(method, looked))[:1] if term in weights]
    quieter = "".join(f" or {flag}" for flag in loudest)
    return {
        "skipped": f"lower --lr{quieter}, or use --amp bf16",
        "move": f"halve --lr{quieter}, or clip the gradient (--clip-grad 1), one at a time",
        "inverted": "use --mixed-target pair, or less mixing (--mix-prob)",
        "clipped": " or ".join(["raise --clip-grad", *(f"lower {flag}" for flag in loudest)]),
        "share": ", or ".join([*(f"lower {flag}" for flag in loudest), "raise --ce-weight"]),
        "teacher": "train the teacher under the same augmentation, or weaken it (--policy none, a lower --mix-prob)",
    }
