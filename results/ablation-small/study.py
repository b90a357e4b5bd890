"""The tables of STUDY.md and of the README beside this script, from those of the sweeps.

    python results/ablation-small/study.py            prints them; a test compares them with the pages

Accuracy: on the test set with the weights of the best epoch, mean over n seeds and its 95 % interval by Student's t, in percent.
Difference: to the control or of the two named cells, in points, paired by seed, with its 95 % interval.  p: of the paired t-test,
after Holm's correction for the comparisons of its table.  Equal within: the smallest bound for which two one-sided tests at 5 %
show equivalence (Schuirmann 1987, doi 10.1007/BF01068419).  Collapsed: by diagnostics.alarms.collapsed against the control.
"""
import sys
from pathlib import Path
from statistics import fmean, median, stdev
from types import SimpleNamespace

from scipy.special import stdtrit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's root
from cli.sweep_table import spread
from results.cells import Cell, pairs_of, read_sweep, read_table
from rundir.files import as_markdown
from training.evaluation import EarlyStop

FOLDER = Path(__file__).parent

STUDENT = "model-v2_pico"
KD, DKD, ALONE = "method-kd", "method-dkd_beta-8", f"train_teacher_{STUDENT}"
ONE, DKD_CE = "method-kd_clip-grad-1", "method-dkd_clip-grad-1_beta-8_ce-weight-1"
DKD_ONE, DKD_NONE = "method-dkd_clip-grad-1_beta-8_ce-weight-0", "method-dkd_beta-8_ce-weight-0"
# Table -> label -> cell; the first is the control.  A table is of the sweep of its name, but for those of SWEEPS.
SWEEPS = {"remedies": "high", "cifar10": "../cifar10-jpeg-cpu"}
CELLS = {
    "recipe": {
        "KD, clipped at 1": ONE, "KD, not clipped": "method-kd_clip-grad-0", "KD, clipped at 0.1": "method-kd_clip-grad-0.1",
        "DKD beta 8, clipped at 1": DKD_ONE, "DKD beta 8, not clipped": DKD_NONE,
        "DKD beta 8 with cross-entropy, clipped at 1": DKD_CE,
        "DKD beta 2, clipped at 1": "method-dkd_clip-grad-1_beta-2_ce-weight-0",
        "DKD beta 2, not clipped": "method-dkd_beta-2_ce-weight-0"},
    "recipe-long": {"KD, clipped at 1": ONE, "DKD beta 8, clipped at 1": DKD_ONE, "DKD beta 8, not clipped": DKD_NONE},
    "high": {
        "KD: 0.7 KL + 0.3 CE": KD, "DKD: CE + TCKD + 8 NCKD": DKD, "DKD, loss times 0.22": f"{DKD}_loss-scale-0.22",
        "KD, loss times 4.5": f"{KD}_loss-scale-4.5", "DKD with KD's gradient norm": f"{DKD}_match-norm-kd",
        "KD with DKD's gradient norm": f"{KD}_match-norm-dkd", "KD: 0.7 KL + 1 CE": f"{KD}_ce-weight-1",
        "DKD: TCKD + 8 NCKD": f"{DKD}_ce-weight-0", "0.3 CE, no teacher": f"{KD}_alpha-0_ce-weight-0.3",
        "1 CE, no teacher": ALONE},
    "high-long": {"KD": KD, "DKD beta 8": DKD, "1 CE, no teacher": ALONE},
    "remedies": {
        "KD": KD, "DKD beta 8": DKD, "DKD beta 2": "method-dkd_beta-2", "DKD beta 8, clipped at 1": f"clip-grad-1_{DKD}",
        "DKD beta 8, warm-up over 3 epochs": f"{DKD}_dkd-warmup-3", "DKD beta 8, dominant label": f"{DKD}_mixed-target-dominant",
        "DKD beta 8, z-scored": f"{DKD}_standardize"},
    "usual": {"KD": KD, "DKD beta 2": "method-dkd_beta-2", "DKD beta 8": DKD, "KD, alpha 8 and 1 CE": f"{KD}_alpha-8_ce-weight-1",
              "KD, z-scored": f"{KD}_standardize", "DKD beta 8, z-scored": f"{DKD}_standardize", "DIST": "method-dist",
              "DKD beta 8, clipped at 1": f"clip-grad-1_{DKD}", "DKD beta 8, dominant label": f"{DKD}_mixed-target-dominant"},
    "findings": {
        name: f"teacher-checkpoint-runs-ablation-small-teacher{strong}-best.pt_{clip}experiment-{experiment}"
        for name, strong, clip, experiment in (
            ("v2: KD, all four augmentations", "", "clip-grad-1_", "v2"),
            ("v1: KD, Mixup and CutMix alone", "", "clip-grad-1_", "v1"),
            ("v3: DKD beta 8", "", "clip-grad-1_", "v3"), ("v3, not clipped", "", "", "v3"),
            ("v3.1: DKD beta 2", "", "clip-grad-1_", "v3.1"), ("v4: KD, stronger teacher", "-strong", "clip-grad-1_", "v4"))},
    "cifar10": {
        "KD, clipped at 1": ONE, "KD, not clipped": "method-kd_clip-grad-0", "DKD beta 8, clipped at 1": DKD_ONE,
        "DKD beta 8, not clipped": DKD_NONE, "DKD beta 2, clipped at 1": "method-dkd_clip-grad-1_beta-2_ce-weight-0",
        "DKD beta 2, not clipped": "method-dkd_beta-2_ce-weight-0", "1 CE, no teacher": f"train_teacher_clip-grad-1_{STUDENT}"},
}
# Title -> the two cells whose difference answers a question, with their sweep.
CONTRASTS = {
    "clipping DKD beta 8: at 1, minus none": ("recipe", DKD_ONE, DKD_NONE),
    "clipping KD: at 0.1, minus none": ("recipe", "method-kd_clip-grad-0.1", "method-kd_clip-grad-0"),
    "both clipped in nearly every step: DKD at 1, minus KD at 0.1": ("recipe", DKD_ONE, "method-kd_clip-grad-0.1"),
    "neither clipped: DKD minus KD": ("recipe", DKD_NONE, "method-kd_clip-grad-0"),
    "DKD beta 8 clipped at 1: with cross-entropy, minus without": ("recipe", DKD_CE, DKD_ONE),
    "equal gradient norms, KD's: DKD minus KD": ("high", f"{DKD}_match-norm-kd", KD),
    "equal gradient norms, DKD's: DKD minus KD": ("high", DKD, f"{KD}_match-norm-dkd"),
    "learning rate 1.6, without Mixup and CutMix: DKD beta 8 minus KD": ("high", f"{DKD}_mix-prob-0", f"{KD}_mix-prob-0"),
    "learning rate 0.2, similar gradient norms: KD with alpha 8 and 1 CE, minus DKD": ("usual", f"{KD}_alpha-8_ce-weight-1", DKD),
}
STOPPED = ("recipe-long", "high-long")  # sweeps of the table of early stopping, of which the first two cells
PATIENCE = (2, 5)  # epochs


def sweep_table(name: str) -> str:
    """A row for each cell: its accuracy and difference to the first."""
    cells, labels = read_sweep(FOLDER / SWEEPS.get(name, name)), CELLS[name]
    control, *others = (cells[name] for name in labels.values())
    compared = [None, *differences([(cell, control) for cell in others])]
    rows = []
    for label, cell, found in zip(labels, (control, *others), compared):
        mean, _, low, high, _ = spread([run["test_acc1_best"] for run in cell.runs.values()])
        rows.append({"": label, "n": str(len(cell.runs)), "accuracy (%)": f"{mean:.1f} ({low:.1f} to {high:.1f})",
                     **(shown(found) if found else {"difference": "", "p": ""}),
                     "collapsed": "" if cell is control or "no teacher" in label else str(cell.ends["collapsed"]),
                     "steps clipped": f"{fmean(of_epochs(cell, 'clip_frac')):.0%}",
                     "gradient norm, epoch 1": f"{fmean(of_epochs(cell, 'grad_norm_mean', first=True)):.2f}",
                     "largest step (%)": f"{100 * fmean(largest(cell, 'update_ratio')):.2f}"})
    return markdown(rows)


def contrasts() -> str:
    """A row for each of CONTRASTS, with the bound within which the two are equivalent."""
    pairs = [(read_sweep(FOLDER / sweep)[one], read_sweep(FOLDER / sweep)[other]) for sweep, one, other in CONTRASTS.values()]
    return markdown([{"": title, "n": str(found["n"]), **shown(found),
                      "equal within": f"{found['within']:.1f}" if found["p"] > 0.05 else ""}
                     for title, found in zip(CONTRASTS, differences(pairs))])


def repeat() -> str:
    """A row for each sweep's table: how it came out in `repeat`, the same commands on another processor.

    A difference is significant where p is at most 0.05.  other outcome: those significant in one of the two, as in `repeat`.
    """
    rows = []
    for name, labels in CELLS.items():
        sweep, (_, *others) = SWEEPS.get(name, name), labels
        if not (FOLDER / "repeat" / sweep).exists():
            continue
        here, there = ([read_sweep(folder / sweep)[cell] for cell in labels.values()] for folder in (FOLDER, FOLDER / "repeat"))
        moves = [abs(one.accuracy - other.accuracy) for one, other in zip(here, there)]
        fell = [sum(cell.ends["collapsed"] for label, cell in zip(others, cells) if "no teacher" not in label)
                for _, *cells in (here, there)]
        found, again = (differences([(cell, control) for cell in cells]) for control, *cells in (here, there))
        both = [(one["p"] <= 0.05, other["p"] <= 0.05) for one, other in zip(found, again)]
        changed = ["{0}: {difference}, p {p}".format(label, **shown(each))
                   for label, each, (first, second) in zip(others, again, both) if first != second]
        rows.append({"": name, "cells": str(len(labels)), "a mean moves by at most": f"{max(moves):.1f}",
                     "collapsed": "{} and {}".format(*fell), "significant": str(sum(first for first, _ in both)),
                     "again": str(both.count((True, True))), "other outcome": "; ".join(changed)})
    return markdown(rows)


def early_stopping() -> str:
    """What patience would have done to runs without it, exactly: a stop leaves the epochs before it as they are.

    epoch: the median of those that stop.  lost: validation accuracy of the selected epoch, in points below that of the whole run.
    """
    rows = []
    for sweep in STOPPED:
        cells = read_sweep(FOLDER / sweep)
        for label, name in list(CELLS[sweep].items())[:2]:
            for monitor in ("val_loss", "val_acc1"):
                row = {"": f"{label}, {len(next(iter(cells[name].runs.values()))['val'])} epochs", "monitor": monitor}
                for patience in PATIENCE:
                    ends = [replay(run["epochs"], monitor, patience) for run in cells[name].runs.values()]
                    stops, lost = [end for end, _ in ends if end], [loss for end, loss in ends if end]
                    row |= {f"patience {patience}: stopped": f"{len(stops)} of {len(ends)}",
                            f"epoch, {patience}": f"{median(stops):g}" if stops else "",
                            f"lost, {patience}": f"{fmean(lost):.1f}" if stops else ""}
                rows.append(row)
    return markdown(rows)


def alarms() -> str:
    return markdown([{"alarm": row["alarm"], "raised in collapsed runs": f"{row['raised']} of {row['collapsed']}",
                      "silent in others": f"{row['silent']} of {row['others']}"}
                     for row in read_table(FOLDER / "alarms.csv") if (row["half"], row["runs"]) == ("held back", "all")])


def replay(epochs: list[dict], monitor: str, patience: int) -> tuple[int | None, float]:
    """The epoch in which a run stops, or None, and by how many points its selected epoch is worse than without a stop."""
    def selected(stop) -> tuple[int | None, float]:
        for row in epochs:
            stop.update(row["epoch"], SimpleNamespace(loss=row["val_loss"], acc1=row["val_acc1"]))
            if stop.stop:
                return row["epoch"], epochs[stop.best_epoch - 1]["val_acc1"]
        return None, epochs[stop.best_epoch - 1]["val_acc1"]

    (end, accuracy), (_, whole) = (selected(EarlyStop(monitor, each)) for each in (patience, 0))
    return end, whole - accuracy


def differences(pairs: list[tuple[Cell, Cell]]) -> list[dict]:
    """Of the accuracies of each pair of cells: n, mean, low, high, within, and p after Holm's correction for all of them."""
    found = []
    for one, other in pairs:
        values = pairs_of(one, other)
        mean, _, low, high, p = spread(values)
        margin = float(stdtrit(len(values) - 1, 0.95)) * stdev(values) / len(values) ** 0.5
        found.append({"n": len(values), "mean": mean, "low": low, "high": high, "p": p, "within": abs(mean) + margin})
    largest_p = 0.0
    for rank, each in enumerate(sorted(found, key=lambda each: each["p"])):
        each["p"] = largest_p = max(largest_p, min(1.0, (len(found) - rank) * each["p"]))
    return found


def shown(found: dict) -> dict:
    return {"difference": "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**found),
            "p": "<0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"}


def of_epochs(cell: Cell, column: str, first=False) -> list[float]:
    """The values of all runs, or those of their first epochs."""
    return [row[column] for run in cell.runs.values() for row in run["epochs"][:1 if first else None]]


def largest(cell: Cell, column: str) -> list[float]:
    return [max(row[column] for row in run["epochs"]) for run in cell.runs.values()]


def markdown(rows: list[dict]) -> str:
    left = {"", "alarm", "monitor", "other outcome"}
    return as_markdown({name: [row[name] for row in rows] for name in rows[0]}, left, "").strip()


def tables() -> dict[str, str]:
    return {name: sweep_table(name) for name in CELLS} | {"contrasts": contrasts(), "repeat": repeat(),
                                                           "early stopping": early_stopping(), "alarms": alarms()}


if __name__ == "__main__":
    for name, table in tables().items():
        print(name, table, sep="\n\n", end="\n\n")
