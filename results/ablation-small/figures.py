"""The two figures of the collapse study (PNG, PDF, their numbers as CSV), from the tables of its sweeps.

    python results/ablation-small/figures.py --output figures      figure7, figure8

Figure 7, from the sweep `high`: DKD's accuracy minus that of KD, by beta and augmentation, and where DKD collapsed.
Figure 8, from `usual` and `high`: each term's share of the gradient with respect to the logits, epoch by epoch.

Cells are compared over their common seeds.  Accuracies are those on the test set with the weights of the best epoch; a run that
diverged has none.  Collapsed: against the control of the same seed or, without one, against the run's own best epoch.
"""
import argparse
import re
import sys
from itertools import compress
from pathlib import Path
from statistics import fmean

import matplotlib.style
import numpy as np
from matplotlib.colors import CenteredNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's root
from diagnostics.alarms import FALL, SHARE
from plots import make_figures
from results.cells import AUGMENTATION, Cell, pairs_of, read_sweep

LEFT = {"x": 0.01, "ha": "left", "fontsize": 7.5}
RED, BLUE = "#D55E00", "#0072B2"
COLOURS = ListedColormap(matplotlib.colormaps["RdBu"](np.linspace(0.12, 0.88, 256)))  # without the darkest: hatching shows
TERMS = {"kl": "#56B4E9", "nckd": "#E69F00", "tckd": "#0072B2", "ce": "#DDDDDD"}  # from the bottom of the stack to its top
BASE, KD = "method-dkd_beta-8", "method-kd"  # cells of `usual` and `high`: names by experiments.sh without what is off
PANELS = {"KD": KD, "DKD, beta 2": "method-dkd_beta-2", "DKD, beta 8": BASE,  # of figure 8
          "KD, alpha 8, CE weight 1": "method-kd_alpha-8_ce-weight-1"}
PHASE = re.compile(r"method-dkd_beta-\d+(_mix-prob-\d)?(_policy-none_random-erasing-0)?")  # cells of figure 7


def signed(difference: float | None) -> str:
    return "no pair" if difference is None else f"{difference:+.1f}".replace("-", "−")


def phase_rows(cells: dict[str, Cell]) -> list[dict]:
    """By augmentation and beta: DKD against KD over the common seeds."""
    def level(cell: Cell) -> list[bool]:  # in the order of strength
        return [cell.flags[name] not in ("none", 0) for name in AUGMENTATION]

    dkd, rows = [cell for name, cell in cells.items() if PHASE.fullmatch(name)], []
    for cell in sorted(dkd, key=lambda cell: (level(cell), cell.flags["beta"])):
        pairs = pairs_of(cell, cell.control)
        rows.append({"augmentation": " + ".join(compress(AUGMENTATION.values(), level(cell))) or "none",
                     "beta": cell.flags["beta"], "n": len(pairs), "difference": fmean(pairs), "accuracy": cell.accuracy,
                     "kd_accuracy": cell.control.accuracy, **cell.ends})
    return rows


def label_rows(axis, left: list[str], right: list[str]) -> None:
    axis.set_yticks(range(len(left)), left)
    other = axis.secondary_yaxis("right")
    other.set_yticks(range(len(right)), right)
    other.tick_params(length=0)
    other.spines[:].set_visible(False)


def draw_phase(rows: list[dict], headings: tuple[str, str]) -> Figure:
    """A cell per beta and augmentation: colour and number give the difference, hatching where a run collapsed."""
    levels, betas = (list(dict.fromkeys(row[name] for row in rows)) for name in ("augmentation", "beta"))
    values = np.array([row["difference"] for row in rows], float).reshape(len(levels), len(betas))  # None becomes nan
    figure = Figure(figsize=(1.9 + 0.62 * len(betas) + 1.4, 1.2 + 0.5 * len(levels)), layout="constrained")
    axis = figure.add_subplot()
    for place, row in enumerate(rows):
        (y, x), bad = divmod(place, len(betas)), row["collapsed"] + row["diverged"]
        if bad:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor="black", linewidth=0))
        axis.text(x, y, signed(row["difference"]) + (f"\n{bad} of {row['runs']}" if row["runs"] > 1 else ""), ha="center",
                  va="center", linespacing=1.1, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})
    norm = CenteredNorm(0, max(1.0, np.nanmax(np.abs(values), initial=0.0)))
    image = axis.imshow(values, cmap=COLOURS, norm=norm, origin="lower", aspect="auto")
    axis.set(xlabel="beta, the weight of NCKD", xticks=range(len(betas)), xticklabels=[f"{beta:g}" for beta in betas],
             ylabel="augmentation\nbeside crop and flip")
    axis.set_title("{}\n{}\ntest accuracy with the weights of the best epoch".format(*headings), loc="left")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.grid(visible=False)
    label_rows(axis, [name.replace("+ ", "+\n") for name in levels], [
        "KD diverged" if row["kd_accuracy"] is None else f"KD: {row['kd_accuracy']:.1f} %" for row in rows[::len(betas)]])
    figure.colorbar(image, ax=axis, label="DKD minus KD\n(points of test accuracy)", pad=0.02, fraction=0.06)
    figure.legend([Patch(facecolor="white", edgecolor="black", hatch="////", linewidth=0.5)],
                  [f"DKD diverged, or collapsed: last validation accuracy more than {FALL:g} points below KD's;\n"
                   "k of n seeds, where there is more than one"],
                  loc="outside lower left")
    return figure


def draw_shares(sweeps: list[dict[str, Cell]]) -> Figure:
    """Per sweep a row of panels: stacked shares of the terms; validation accuracy and update norm beside those of KD."""
    panels = PANELS | {"labels alone": next(name for name in sweeps[0] if name.startswith("train_teacher"))}
    shown = [cells[name] for cells in sweeps for name in panels.values()]
    top = max(max(run["val"]) for cell in shown for run in cell.runs.values())
    figure = Figure(figsize=(9.6, 0.67 + 3.1 * len(sweeps)), layout="constrained")
    figure.suptitle(f"{shown[0].headings[0]}. Test: accuracy with the weights of the best epoch.\n"
                    f"Red: a run diverged, or collapsed: last validation accuracy more than {FALL:g} points below KD's, "
                    "or of labels alone below its own best.", **LEFT)
    for part, cells in zip(figure.subfigures(len(sweeps), 1), sweeps):
        part.suptitle(cells[KD].headings[1], **LEFT | {"fontsize": 8, "fontweight": "bold"})
        axes = part.subplots(3, len(panels), sharex=True, sharey="row", height_ratios=(1.5, 1, 0.8))
        for (above, below, lowest), (title, name) in zip(axes.T, panels.items()):
            colour = RED if cells[name].ends["collapsed"] + cells[name].ends["diverged"] else "black"
            heading = f"{title}; n = {cells[name].ends['runs']}\n{'test ' if cells[name].runs else ''}{cells[name].outcome}"
            above.set_title(heading, loc="left", color=colour)
            above.axhline(SHARE, color="black", linestyle="dotted", zorder=3)
            above.grid(visible=False)
            if cells[name].runs:
                stack(above, {term: curve for term in TERMS if (curve := cells[name].by_epoch(f"share_{term}"))[0]})
            below.plot(*cells[KD].by_epoch("val_acc1"), color=BLUE, linestyle="dashed", zorder=2)
            for run in cells[name].runs.values():
                below.plot([row["epoch"] for row in run["epochs"]], run["val"], color=colour, linewidth=0.4, zorder=3)
            below.plot(*cells[name].by_epoch("val_acc1"), color=colour, linewidth=1.4, zorder=4)
            for own, colour_of in ((cells[KD], {"color": BLUE, "linestyle": "dashed"}), (cells[name], {"color": colour})):
                epochs, ratios = own.by_epoch("update_ratio")
                lowest.plot(epochs, [100 * ratio for ratio in ratios], **colour_of)
            lowest.set_xlabel("epoch")
        axes[0, 0].set(ylim=(0, 1), yticks=(0, 0.5, SHARE, 1), yticklabels=("0", "50", f"{100 * SHARE:.0f}", "100"),
                       ylabel="share of the\nlogit gradient (%)")
        axes[1, 0].set(ylim=(0, 1.08 * top), ylabel="validation\naccuracy (%)")
        axes[2, 0].set(ylabel="step (%)")
        axes[2, 0].set_ylim(bottom=0)
        axes[1, 0].yaxis.set_major_locator(MaxNLocator(3, steps=(1, 2, 5, 10)))
        axes[1, 0].xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=(1, 2, 2.5, 5, 10)))
    handles = [Patch(facecolor=colour, edgecolor="white", label=term.upper()) for term, colour in TERMS.items()]
    handles += [Line2D([], [], color="black", linestyle="dotted", label=f"alarm: KL or NCKD above {100 * SHARE:.0f} %"),
                Line2D([], [], color="black", label="accuracy (thin: a seed), step"),
                Line2D([], [], color=BLUE, linestyle="dashed", label="those of KD")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def stack(axis, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """Shares by term: epochs, and values to stack; the largest have their name and mean over the epochs in their area."""
    (epochs, _), bottom = curves["ce"], 0.0
    axis.stackplot(epochs, [values for _, values in curves.values()], colors=[TERMS[term] for term in curves], edgecolor="white",
                   linewidth=0.5, zorder=2)
    for term, (_, values) in curves.items():
        if (share := fmean(values)) > 0.15:
            axis.text((epochs[0] + epochs[-1]) / 2, bottom + share / 2, f"{term.upper()} {100 * share:.0f} %", ha="center",
                      va="center", zorder=4, bbox={"facecolor": TERMS[term], "edgecolor": "none", "pad": 0.5})
        bottom += share


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--tables", type=Path, default=Path(__file__).parent, help="of the sweeps; default: beside this script")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="default: figures/")
    args = parser.parse_args(arguments)
    try:
        high, usual = (read_sweep(args.tables / name) for name in ("high", "usual"))
    except FileNotFoundError as failure:
        parser.exit(4, f"error: no table ({failure.filename}). make it with results/tables.py\n")
    differences = phase_rows(high)
    with matplotlib.style.context(["default", make_figures.STYLE | {"hatch.linewidth": 0.6}]):
        make_figures.write_figure(draw_phase(differences, high[KD].headings), args.output / "figure7")
        make_figures.write_figure(draw_shares([usual, high]), args.output / "figure8")
    (args.output / "figure7.csv").write_text(make_figures.csv_text(differences))


if __name__ == "__main__":
    main()
