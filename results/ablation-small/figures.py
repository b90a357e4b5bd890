"""The three figures of the collapse study (PNG, PDF, their numbers as CSV), from the tables of its sweeps.

    python results/ablation-small/figures.py --output figures                                figure7, figure8, figure9
    python results/ablation-small/figures.py --tables runs/ablation --output figures         of another ./experiments.sh ablation

Figure 7, from the sweep `phase`: DKD's accuracy minus that of KD, by beta and augmentation, and where DKD collapsed.
Figure 8, from `usual` and `high`: each term's share of the gradient with respect to the logits, epoch by epoch.
Figure 9, from `usual` and `high`: the effect of each change of a single setting on DKD with beta 8, with intervals.

Runs that differ in the seed alone are one cell.  Cells are compared over their common seeds.  Accuracies are those on the test
set with the weights of the best epoch; a run that diverged has none.  A run collapsed by diagnostics.alarms.collapsed: against KD
of the same sweep, teacher, augmentation and seed or, without it, against its own best epoch.
"""
import argparse
import csv
import json
import math
import re
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.colors import CenteredNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit  # the inverse of Student's t

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's root
from diagnostics.alarms import FALL, SHARE, collapsed

AUGMENTATION = ("policy", "random_erasing", "mix_prob", "mixup", "cutmix")
SAME = 1e-9  # percentage points: differences so close differ by rounding alone
RED, BLUE, GREY = "#D55E00", "#0072B2", "#777777"
COLOURS = ListedColormap(matplotlib.colormaps["RdBu"](np.linspace(0.12, 0.88, 256)))  # without the darkest: hatching shows
STYLE = {
    "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "lines.linewidth": 1.1, "lines.markersize": 3, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.4, "grid.color": "#DDDDDD",
    "legend.frameon": False, "legend.labelspacing": 0.3,
    "legend.handlelength": 2.7, "legend.handletextpad": 0.6, "legend.columnspacing": 1.0,
    "pdf.fonttype": 42, "hatch.linewidth": 0.6,
}
DATASETS = {"cifar100": "CIFAR-100", "synthetic": "synthetic images"}
TERMS = {"kl": "#56B4E9", "nckd": "#E69F00", "tckd": "#0072B2", "ce": "#DDDDDD"}  # from the bottom of the stack to its top

# The cells of `usual` and `high`, by the names that experiments.sh gives them without what is off.
BASE, KD = "method-dkd_beta-8", "method-kd"
PANELS = {"KD": KD, "DKD, beta 2": "method-dkd_beta-2", "DKD, beta 8": BASE,  # of figure 8
          "KD, alpha 8, CE weight 1": "method-kd_alpha-8_ce-weight-1"}
CHANGES = {  # of the base, in words
    KD: "method: KD, alpha 0.7", "method-kd_alpha-8_ce-weight-1": "method: KD, alpha 8, CE weight 1",
    "method-dist": "method: DIST, CE weight 1", r"train_teacher_model-\w+": "no teacher: labels alone",
    "method-dkd_beta-2": "beta 8 to 2", f"clip-grad-1_{BASE}": "gradient clipped at 1",
    rf"{BASE}_dkd-warmup-(\d+)": r"warm-up of DKD over \1 epochs",
    rf"{BASE}_mixed-target-(\w+)": r"targets of mixed images: \1", f"{BASE}_mix-prob-0": "Mixup/CutMix off",
    f"{BASE}_standardize": "logits z-scored", f"{BASE}_amp-bf16": "precision: BF16", f"{BASE}_amp-off": "precision: FP32",
    rf"patience-(\d+)_{BASE}_monitor-(\w+)": r"early stopping on \2, patience \1",
}


class Cell(NamedTuple):
    """Runs that differ in the seed alone.  flags: of one of them.  runs: rows of runs.csv.  epochs: rows of epochs.csv by run."""
    flags: dict
    runs: list
    epochs: dict

    @property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy in percent by seed."""
        return {run["seed"]: run["test_acc1_best"] for run in self.runs if run["test_acc1_best"] is not None}

    @property
    def val(self) -> dict[int, list[float]]:
        """Validation accuracy (%) of every epoch by seed, of the runs that did not diverge."""
        return {run["seed"]: [row["val_acc1"] for row in self.epochs[run["run"]]] for run in self.runs
                if run["verdict"] != "diverged"}

    def ended_badly(self, control: "Cell | None") -> dict[str, int]:
        """How many runs collapsed, against the control's of the same seed or else their own best epoch, and how many diverged."""
        theirs = {seed: values[-1] for seed, values in control.val.items()} if control else {}
        return {"collapsed": sum(collapsed(values[-1], theirs.get(seed, max(values))) for seed, values in self.val.items()),
                "diverged": len(self.runs) - len(self.val)}

    def outcome(self, control: "Cell | None") -> str:
        """Mean accuracy, and how many runs collapsed or diverged, in words."""
        parts = [f"{fmean(self.accuracies.values()):.1f} %"] if self.accuracies else []
        return ", ".join(parts + [f"{count} of {len(self.runs)} {how}" for how, count in self.ended_badly(control).items()
                                  if count])

    def by_epoch(self, column: str) -> tuple[list[int], list[float]]:
        """Epochs, and at each the mean over the runs that have a value there."""
        found = {}
        for row in (row for rows in self.epochs.values() for row in rows if row.get(column) is not None):
            found.setdefault(row["epoch"], []).append(row[column])
        return sorted(found), [fmean(found[epoch]) for epoch in sorted(found)]


def value(text: str):
    """A cell of a table: a number or truth value, None where it is empty, else text."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


def read_table(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def read_sweep(directory: Path) -> dict[str, Cell]:
    """The cells by name."""
    shared, epochs, cells = json.loads((directory / "settings.json").read_text()), {}, {}
    for row in read_table(directory / "epochs.csv"):
        epochs.setdefault(row["run"], []).append(row)
    for run in read_table(directory / "runs.csv"):
        name = re.sub("(patience|clip-grad)-0_", "", run["cell"])
        cell = cells.setdefault(name, Cell(shared | run, [], {}))
        cell.runs.append(run)
        cell.epochs[run["run"]] = epochs.get(run["run"], [])
    return cells


# Comparing

def control_of(cell: Cell, cells: dict[str, Cell]) -> Cell | None:
    """KD with alpha 0.7, the same teacher and augmentation; None for that cell itself and for one without a teacher."""
    found = next((other for other in cells.values() if other.flags["method"] == "kd" and not other.flags.get("ce_weight")
                  and not other.flags.get("standardize")
                  and all(other.flags.get(name) == cell.flags.get(name) for name in ("teacher", *AUGMENTATION))), None)
    return None if found is cell else found


def paired(one: Cell, other: Cell) -> list[float]:
    """The differences in accuracy over the common seeds, in percentage points."""
    return [accuracy - other.accuracies[seed] for seed, accuracy in one.accuracies.items() if seed in other.accuracies]


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean by Student's t; none for one value, or for equal ones."""
    if len(values) < 2 or max(values) - min(values) < SAME:
        return None, None
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def mean(values) -> float | None:
    return fmean(values) if values else None


def signed(difference: float | None) -> str:
    return "no pair" if difference is None else f"{difference:+.1f}".replace("-", "−")


def setting(flags: dict) -> str:
    return (f"{DATASETS.get(flags['dataset'], flags['dataset'])}, {flags['teacher']} → {flags['student']}, "
            f"{flags['epochs']} epochs")


def rate(flags: dict) -> str:
    return f"{flags['opt'].upper()}, learning rate {flags['lr']:g}"


def seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"n = {count} seeds"


# Figure 7

def level(cell: Cell) -> tuple[bool, bool, bool]:
    """Augmentation beside crop and flip, in the order of strength: the policy, Random Erasing, Mixup/CutMix."""
    return cell.flags["policy"] != "none", cell.flags["random_erasing"] > 0, cell.flags["mix_prob"] > 0


def phase_rows(cells: dict[str, Cell]) -> list[dict]:
    """By augmentation and beta: DKD against KD over the common seeds."""
    controls = {level(cell): cell for cell in cells.values() if cell.flags["method"] == "kd"}
    dkd, rows = [cell for cell in cells.values() if cell.flags["method"] == "dkd"], []
    for cell in sorted(dkd, key=lambda cell: (level(cell), cell.flags["beta"])):
        kd = controls[level(cell)]
        names = [name for name, on in zip(("AutoAugment", "Random Erasing", "Mixup/CutMix"), level(cell)) if on]
        rows.append({
            "augmentation": " + ".join(names) or "none", "beta": cell.flags["beta"], "n": len(pairs := paired(cell, kd)),
            "difference": mean(pairs), "accuracy": mean(cell.accuracies.values()), "kd_accuracy": mean(kd.accuracies.values()),
            "runs": len(cell.runs), **cell.ended_badly(kd)})
    return rows


def draw_phase(flags: dict, rows: list[dict]) -> Figure:
    """A cell per beta and augmentation: colour and number give the difference, hatching where a run collapsed."""
    levels, betas = list(dict.fromkeys(row["augmentation"] for row in rows)), sorted({row["beta"] for row in rows})
    values = np.full((len(levels), len(betas)), np.nan)
    figure = Figure(figsize=(1.9 + 0.62 * len(betas) + 1.4, 1.2 + 0.5 * len(levels)), layout="constrained")
    axis = figure.add_subplot()
    for row in rows:
        y, x, bad = levels.index(row["augmentation"]), betas.index(row["beta"]), row["collapsed"] + row["diverged"]
        values[y, x] = np.nan if row["difference"] is None else row["difference"]
        if bad:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor="black", linewidth=0))
        axis.text(x, y, signed(row["difference"]) + (f"\n{bad} of {row['runs']}" if bad and row["runs"] > 1 else ""), ha="center",
                  va="center", linespacing=1.1, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})
    widest = max(1.0, np.nanmax(np.abs(values), initial=0.0))
    image = axis.imshow(values, cmap=COLOURS, norm=CenteredNorm(0, widest), origin="lower", aspect="auto")
    axis.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axis.set_yticks(range(len(levels)), [name.replace("+ ", "+\n") for name in levels])
    axis.set(xlabel="beta, the weight of NCKD", ylabel="augmentation\nbeside crop and flip")
    right = axis.secondary_yaxis("right")
    controls = {row["augmentation"]: row["kd_accuracy"] for row in rows}
    right.set_yticks(range(len(levels)), ["KD diverged" if controls[name] is None else f"KD: {controls[name]:.1f} %"
                                          for name in levels])
    for each in (axis, right):
        each.tick_params(length=0)
        each.spines[:].set_visible(False)
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="DKD minus KD\n(points of test accuracy)", pad=0.02, fraction=0.06)
    axis.set_title(f"{setting(flags)}\n{rate(flags)}; {seeds(rows[0]['n'])}\ntest accuracy with the weights of the best epoch",
                   loc="left")
    figure.legend([Patch(facecolor="white", edgecolor="black", hatch="////", linewidth=0.5)],
                  [f"DKD diverged, or collapsed: last validation accuracy more than {FALL:g} points below KD's"],
                  loc="outside lower left")
    return figure


# Figure 8

def draw_shares(sweeps: list[dict[str, Cell]]) -> Figure:
    """Per sweep a row of panels: above the stacked shares of the terms, below the validation accuracy beside that of KD."""
    shown = [cells[name] for cells in sweeps for name in PANELS.values()]
    top = max(row["val_acc1"] for cell in shown for rows in cell.epochs.values() for row in rows)
    figure = Figure(figsize=(7.2, 0.67 + 2.5 * len(sweeps)), layout="constrained")
    figure.suptitle(f"{setting(shown[0].flags)}; {seeds(len(shown[0].runs))}. "
                    "Test: accuracy with the weights of the best epoch.\n"
                    f"Red: a run diverged, or collapsed: last validation accuracy more than {FALL:g} points below KD's.",
                    x=0.01, ha="left", fontsize=7.5)
    for part, cells in zip(figure.subfigures(len(sweeps), 1), sweeps):
        part.suptitle(rate(cells[KD].flags), x=0.01, ha="left", fontsize=8, fontweight="bold")
        axes = part.subplots(2, len(PANELS), sharex=True, sharey="row", height_ratios=(1.5, 1))
        for (above, below), (title, name) in zip(axes.T, PANELS.items()):
            cell = cells[name]
            control = control_of(cell, cells)
            colour = RED if any(cell.ended_badly(control).values()) else "black"
            above.set_title(f"{title}\n{'test ' if cell.accuracies else ''}{cell.outcome(control)}", loc="left", color=colour)
            stack(above, cell)
            draw_accuracy(below, cell, cells[KD], colour)
        axes[0, 0].set(ylim=(0, 1), yticks=(0, 0.5, SHARE, 1), yticklabels=("0", "50", f"{100 * SHARE:.0f}", "100"),
                       ylabel="share of the\nlogit gradient (%)")
        axes[1, 0].set(ylim=(0, 1.08 * top), ylabel="validation\naccuracy (%)")
        axes[1, 0].yaxis.set_major_locator(MaxNLocator(3, steps=(1, 2, 5, 10)))
        axes[1, 0].xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=(1, 2, 2.5, 5, 10)))
    handles = [Patch(facecolor=colour, edgecolor="white", label=term.upper()) for term, colour in TERMS.items()]
    handles += [Line2D([], [], color="black", linestyle="dotted", label=f"alarm: KL or NCKD above {100 * SHARE:.0f} %"),
                Line2D([], [], color="black", label="accuracy (thin: a seed)"),
                Line2D([], [], color=BLUE, linestyle="dashed", label="that of KD")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def stack(axis, cell: Cell) -> None:
    """Stacked shares by epoch; the largest have their name and mean over the epochs in their area."""
    curves = {term: curve for term in TERMS if (curve := cell.by_epoch(f"share_{term}"))[0]}
    axis.axhline(SHARE, color="black", linestyle="dotted", zorder=3)
    axis.grid(visible=False)
    if not curves:  # all runs diverged in the first epoch
        return
    (epochs, _), bottom = curves["ce"], 0.0
    axis.stackplot(epochs, [values for _, values in curves.values()], colors=[TERMS[term] for term in curves], edgecolor="white",
                   linewidth=0.5, zorder=2)
    for term, (_, values) in curves.items():
        if (share := fmean(values)) > 0.15:
            axis.text((epochs[0] + epochs[-1]) / 2, bottom + share / 2, f"{term.upper()} {100 * share:.0f} %", ha="center",
                      va="center", zorder=4, bbox={"facecolor": TERMS[term], "edgecolor": "none", "pad": 0.5})
        bottom += share


def draw_accuracy(axis, cell: Cell, kd: Cell, colour: str) -> None:
    """Validation accuracy by epoch: thin lines of the seeds, their mean, and the mean of KD."""
    axis.plot(*kd.by_epoch("val_acc1"), color=BLUE, linestyle="dashed", zorder=2)
    for rows in cell.epochs.values():
        axis.plot([row["epoch"] for row in rows], [row["val_acc1"] for row in rows], color=colour, linewidth=0.4, zorder=3)
    axis.plot(*cell.by_epoch("val_acc1"), color=colour, linewidth=1.4, zorder=4)
    axis.set_xlabel("epoch")


# Figure 9

def cause_rows(sweep: str, sweeps: dict[str, dict[str, Cell]]) -> list[dict]:
    """Every cell that changes one thing against the base of `sweep`, the largest difference first."""
    base, (other,) = sweeps[sweep][BASE], (cells[BASE] for name, cells in sweeps.items() if name != sweep)
    compared = {f"learning rate {base.flags['lr']:g} to {other.flags['lr']:g}": other}
    for name, cell in sweeps[sweep].items():
        compared |= {re.sub(pattern, words, name): cell for pattern, words in CHANGES.items() if re.fullmatch(pattern, name)}
    rows, controls = [], {id(cell): control_of(cell, cells) for cells in sweeps.values() for cell in cells.values()}
    for words, cell in compared.items():
        low, high = interval(pairs := paired(cell, base))
        rows.append({"base": sweep, "change": words, "n": len(pairs), "difference": mean(pairs), "ci_low": low, "ci_high": high,
                     "accuracy": mean(cell.accuracies.values()), "base_accuracy": mean(base.accuracies.values()),
                     "runs": len(cell.runs), **cell.ended_badly(controls[id(cell)])})
    return sorted(rows, key=lambda row: (row["n"] == 0, -(row["difference"] or 0)))


def draw_causes(sweeps: dict[str, dict[str, Cell]], panels: dict[str, list[dict]]) -> Figure:
    """Per base a forest plot: points are means, lines 95 % intervals; filled where the interval does not hold 0."""
    heights = [0.17 * len(rows) + 0.75 for rows in panels.values()]
    figure = Figure(figsize=(6.0, sum(heights) + 0.45), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (sweep, rows) in zip(axes, panels.items()):
        base, kd = sweeps[sweep][BASE], sweeps[sweep][KD]
        figure.suptitle(setting(base.flags), x=0.01, ha="left", fontsize=7.5)
        axis.set_title(f"{rate(base.flags)}; {seeds(len(base.runs))}\nbase: DKD, beta 8: {base.outcome(kd)}; "
                       f"KD: {kd.outcome(None)}", loc="left")
        notes = []
        for place, row in enumerate(rows):
            bad = "".join(f", {row[how]} {how}" for how in ("collapsed", "diverged") if row[how])
            notes.append(f"{signed(row['difference'])}, n = {row['n']}{bad}")
            if row["difference"] is None:
                continue
            sure = row["ci_low"] is not None and not row["ci_low"] <= 0 <= row["ci_high"]
            colour = GREY if not sure else BLUE if row["difference"] > 0 else RED
            if row["ci_low"] is not None:
                axis.plot((row["ci_low"], row["ci_high"]), (place, place), color=colour, zorder=2)
            axis.plot(row["difference"], place, marker="o", markersize=4, color=colour,
                      markerfacecolor=colour if sure else "white", zorder=3)
        axis.axvline(0, color="black", linewidth=0.8, zorder=1)
        axis.set_yticks(range(len(rows)), [row["change"] for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 2.5, 5, 10)))
        right = axis.secondary_yaxis("right")
        right.set_yticks(range(len(rows)), notes)
        right.tick_params(length=0)
        right.spines[:].set_visible(False)
    figure.supxlabel("test accuracy (weights of the best epoch) minus that of the base over the n common seeds, in points\n"
                     "line: 95 % interval, Student's t (none for one seed, or equal differences); filled: it does not hold 0",
                     fontsize=7.5, x=0.01, ha="left")
    return figure


def write_csv(path: Path, rows: list[dict]) -> None:
    """With fractions rounded to four decimals."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
                        for row in rows)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--tables", type=Path, default=Path(__file__).parent, metavar="DIR",
                        help="the directory of the sweeps usual, high and phase; default: that of this script")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR", help="default: figures/")
    args = parser.parse_args(arguments)
    try:
        phase, high, usual = (read_sweep(args.tables / name) for name in ("phase", "high", "usual"))
    except FileNotFoundError as failure:
        parser.exit(4, f"error: no table ({failure.filename}). make it with results/tables.py\n")
    two, differences = {"high": high, "usual": usual}, phase_rows(phase)
    causes = {name: cause_rows(name, two) for name in two}
    args.output.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):
        flags = next(iter(phase.values())).flags
        for name, figure in {"figure7": draw_phase(flags, differences), "figure8": draw_shares([usual, high]),
                             "figure9": draw_causes(two, causes)}.items():
            figure.savefig(args.output / f"{name}.png", dpi=300)
            figure.savefig(args.output / f"{name}.pdf", metadata={"CreationDate": None})
    write_csv(args.output / "figure7.csv", differences)
    write_csv(args.output / "figure9.csv", [row for rows in causes.values() for row in rows])


if __name__ == "__main__":
    main()
