"""The three figures of the collapse study (PNG, PDF, their numbers as CSV), from what the sweeps of an ablation left.

    ./experiments.sh ablation-small                                                the sweeps: two CPU cores, 45 minutes
    python plots/ablation_figures.py --runs runs/ablation-small --output figures   figure7, figure8, figure9
    python plots/ablation_figures.py                                               runs/ablation -> figures/

Figure 7, from the sweep `phase`: DKD's accuracy minus that of KD, by beta and augmentation, and where DKD collapsed.
Figure 8, from `usual` and `high`: which term makes the gradient with respect to the logits, epoch by epoch.
Figure 9, from `usual` and `high`: what each change of a single setting does to DKD with beta 8, ranked, with intervals.

Runs that differ in nothing but the seed are one cell, and cells are compared over their common seeds.  A change of method counts
as one change with all numbers of the method; so does early stopping with what it monitors.  Accuracies are those on the test set
with the weights of the best epoch.  Runs that have not ended are left out; one that diverged has no accuracy.
"""
import csv
import json
import math
import sys
from pathlib import Path
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python plots/ablation_figures.py`
from diagnostics.alarms import FALL, SHARE, collapsed
from plots import make_figures, run_files
from rundir import errors, files
from rundir.errors import DATA, USAGE, Failure

SWEEPS = ("usual", "high", "findings", "phase")
DIVERGED = 6  # exit code of a run that stopped as its loss was not finite
SAME = 1e-9  # percentage points: differences so close differ by rounding alone
RED, BLUE, GREY = "#D55E00", "#0072B2", "#777777"
COLOURS = ListedColormap(matplotlib.colormaps["RdBu"](np.linspace(0.12, 0.88, 256)))  # without the darkest: hatching shows
WIDE = 7.2  # inches: a whole page

STYLE = make_figures.STYLE | {"hatch.linewidth": 0.6}

NOT_COMPARED = make_figures.MAY_DIFFER - {"amp", "patience", "teacher_sha256"} | {"script", "method_in_tables",
                                                                                  "method_in_figures"}
OF_THE_METHOD = {"teacher", "teacher_sha256", "alpha", "beta", "gamma", "kl", "ce_weight", "temperature", "mixed_target",
                 "dkd_warmup", "dist_warmup"}
KD = {"method": "kd", "ce_weight": 0, "standardize": 0}  # the control: with its usual weights
BASE = {"method": "dkd", "beta": 8, "mixed_target": "pair", "clip_grad": 0, "dkd_warmup": 0}
PANELS = {  # of figure 8: what distinguishes each from the base
    "KD": KD, "DKD, beta 2": {"beta": 2}, "DKD, beta 8": BASE,
    "KD, alpha 8, CE weight 1": {"method": "kd", "alpha": 8, "ce_weight": 1},
}
NUMBERS = ("alpha", "beta", "ce_weight", "clip_grad", "dkd_warmup", "mix_prob")  # as far as a run has them
AUGMENTATION = ("policy", "random_erasing", "mix_prob", "mixup", "cutmix")
TERMS = {"kl": "#56B4E9", "nckd": "#E69F00", "tckd": "#0072B2", "ce": "#DDDDDD"}  # from the bottom of the stack to its top


# Reading

class Run(NamedTuple):
    """A run that has ended.  summary: None where it diverged.  last, best: validation accuracy in percent."""
    path: Path
    config: dict
    summary: dict | None
    last: float = math.nan
    best: float = math.nan


class Cell(NamedTuple):
    """Runs that differ in nothing but the seed.  settings: of their configs, what is compared and not off."""
    settings: dict
    runs: dict[int, Run]

    def get(self, key):
        """The value of a setting; 0 where it is off, or not one of the method."""
        return self.settings.get(key, 0)

    @property
    def config(self) -> dict:
        """That of one of its runs."""
        return next(iter(self.runs.values())).config

    def has(self, wanted: dict) -> bool:
        return all(self.get(key) == value for key, value in wanted.items())

    @property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy in percent by seed, of the runs that did not diverge."""
        return {seed: run.summary["test_acc1_best"] for seed, run in sorted(self.runs.items()) if run.summary}

    def ended_badly(self, control: "Cell | None") -> dict[str, int]:
        """How many runs collapsed, against the control's of the same seed or else their own best epoch, and how many diverged."""
        theirs = {seed: run.last for seed, run in control.runs.items() if run.summary} if control else {}
        ended = {seed: run for seed, run in self.runs.items() if run.summary}
        return {"collapsed": sum(collapsed(run.last, theirs.get(seed, run.best)) for seed, run in ended.items()),
                "diverged": len(self.runs) - len(ended)}

    def outcome(self, control: "Cell | None") -> str:
        """Mean accuracy and how the runs ended, in words."""
        accuracies, n, ends = list(self.accuracies.values()), len(self.runs), self.ended_badly(control).items()
        parts = [f"{np.mean(accuracies):.1f} %"] if accuracies else []
        return ", ".join(parts + [how if n == 1 else f"{count} of {n} {how}" for how, count in ends if count])


def read_run(directory: Path) -> Run | None:
    """None where the run has not ended."""
    path = directory / "config.json"
    config = files.read_json(path)
    names = ("method", "teacher", "student") if config.get("script") == "distill" else ("model",)
    run_files.require(path, config, dataset=str, seed=int, epochs=int, lr=float, opt=str, **dict.fromkeys(names, str),
                         **{name: float for name in NUMBERS if config.get(name) is not None})
    if (path := directory / "summary.json").exists():
        summary = files.read_json(path)
        run_files.require(path, summary, test_acc1_best=float, verdict=str)
        accuracies = run_files.read_log(directory / "log.csv")[1]
        return Run(directory, config, summary, accuracies[-1], accuracies.max())
    path = directory / "status.json"
    diverged = path.exists() and files.read_json(path).get("exit_code") == DIVERGED
    return Run(directory, config, None) if diverged else None


def settings(config: dict) -> dict:
    """What is compared of two runs, without what is off; both scripts' networks under one name."""
    found = {key: value for key, value in config.items() if value and key not in NOT_COMPARED}
    found["network"] = found.pop("student", None) or found.pop("model")
    return {"method": "labels"} | found


def read_sweep(directory: Path) -> tuple[list[Cell], list[Path]]:
    """The cells of a sweep, in the order of their directories, and the runs that have not ended."""
    cells, unfinished = {}, []
    for path in sorted(directory.glob("*/config.json")):
        run = read_run(path.parent)
        if run is None:
            unfinished.append(path.parent)
            continue
        compared, seed = settings(run.config), run.config["seed"]
        cell = cells.setdefault(json.dumps(compared, sort_keys=True), Cell(compared, {}))
        if other := cell.runs.get(seed):
            raise Failure(USAGE, f"two runs of one cell have seed {seed} ({other.path} and {run.path})",
                          "take one of them away")
        cell.runs[seed] = run
    return list(cells.values()), unfinished


def read_shares(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Epochs (E,) of diagnostics.csv, and by term its share of the gradient (E,), nan where no step was looked at."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = [f"share_{term}" for term in TERMS if rows and f"share_{term}" in rows[0]]
        if not columns:
            raise ValueError("no rows with shares of the gradient")
        epochs = np.array([int(row["epoch"]) for row in rows])
        shares = {name.removeprefix("share_"): np.array([float(row[name] or "nan") for row in rows]) for name in columns}
        if any(np.any((values < 0) | (values > 1 + SAME)) for values in shares.values()):
            raise ValueError("a share of the gradient is not in [0, 1]")
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as reason:
        raise files.damaged(path, reason) from None
    return epochs, shares


# What differs

WORDS = {  # a change of one setting, from the old to the new value; others are "name old to new"
    "lr": lambda old, new: f"learning rate {old:g} to {new:g}",
    "beta": lambda old, new: f"beta {old:g} to {new:g}",
    "clip_grad": lambda old, new: f"gradient clipped at {new:g}" if new else "gradient not clipped",
    "dkd_warmup": lambda old, new: f"warm-up of DKD over {new} epochs" if new else "no warm-up of DKD",
    "mixed_target": lambda old, new: f"targets of mixed images: {new}",
    "mix_prob": lambda old, new: f"Mixup/CutMix on {new:.0%} of the images" if new else "Mixup/CutMix off",
    "standardize": lambda old, new: "logits z-scored" if new else "logits not z-scored",
    "amp": lambda old, new: f"precision: {'FP32' if new == 'off' else str(new).upper()}",
    "policy": lambda old, new: f"augmentation policy: {new}",
    "opt": lambda old, new: f"optimiser: {new}",
}


def changes(base: Cell, other: Cell) -> set[str]:
    """The names of what differs, with the numbers of a changed method under `method`."""
    names = {name for name in {*base.settings, *other.settings} if base.get(name) != other.get(name)}
    whole = dict.fromkeys(OF_THE_METHOD if "method" in names else (), "method") | {"monitor": "patience"}
    return {whole.get(name, name) for name in names}


def in_words(base: Cell, other: Cell) -> str | None:
    """What the one change from the base to the other cell is; None where it is not one."""
    if len(names := changes(base, other)) != 1:
        return None
    name, = names
    if name == "method":
        return "no teacher: labels alone" if other.get(name) == "labels" else f"method: {called(other)}"
    if name == "patience":
        return (f"early stopping on {other.get('monitor')}, patience {other.get(name)}" if other.get(name)
                else f"best epoch by {other.get('monitor')}")
    return WORDS.get(name, lambda old, new: f"{name.replace('_', ' ')} {old} to {new}")(base.get(name), other.get(name))


def called(cell: Cell) -> str:
    numbers = {"alpha": cell.get("alpha"), "CE weight": cell.get("ce_weight")}
    return ", ".join([cell.get("method").upper(), *(f"{name} {value:g}" for name, value in numbers.items() if value)])


def find_base(cells: list[Cell]) -> Cell | None:
    """Of the cells that BASE fits, the one from which most others differ in one thing; None where there is none."""
    return max((cell for cell in cells if cell.has(BASE)), default=None,
               key=lambda cell: sum(in_words(cell, other) is not None for other in cells))


def find_kd(base: Cell, cells: list[Cell]) -> Cell | None:
    """The control of a DKD cell: it differs in the method alone."""
    return next((cell for cell in cells if cell.has(KD) and changes(base, cell) == {"method"}), None)


def control_of(cell: Cell, cells: list[Cell]) -> Cell | None:
    """KD with the same teacher, network and augmentation; None for that cell itself, and for one without a teacher."""
    same = ("dataset", "network", "teacher", *AUGMENTATION)
    found = next((other for other in cells if other.has(KD) and all(other.get(name) == cell.get(name) for name in same)), None)
    return None if found is cell else found


def paired(one: Cell, other: Cell) -> list[float]:
    """The differences in accuracy over the common seeds, in percentage points."""
    return [accuracy - other.accuracies[seed] for seed, accuracy in one.accuracies.items() if seed in other.accuracies]


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean by Student's t; none for one value, or for equal ones, of which it would be certain."""
    if len(values) < 2 or max(values) - min(values) < SAME:
        return None, None
    middle, deviation = make_figures.spread(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * deviation / math.sqrt(len(values))
    return middle - half, middle + half


def signed(value: float | None, without: str) -> str:
    return without if value is None else f"{value:+.1f}".replace("-", "−")


def mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None


def setting(config: dict) -> str:
    """Data, networks and length of a distillation, for titles."""
    data = make_figures.DATASETS.get(config["dataset"], config["dataset"])
    return f"{data}, {config['teacher']} → {config['student']}, {config['epochs']} epochs"


def rate(config: dict) -> str:
    return f"{config['opt'].upper()}, learning rate {config['lr']:g}"


def seeds(counts: list[int]) -> str:
    """In words, from the numbers of the cells; those with none say so themselves."""
    some = set(counts) - {0} or {0}
    return "1 seed" if some == {1} else f"n = {make_figures.extent(some)} seeds"


# Figure 7

class Level(NamedTuple):
    """Augmentation beside crop and flip, in the order of strength."""
    policy: bool
    erased: bool
    mixed: bool
    name: str


def augmentation(cell: Cell) -> Level:
    policy = cell.get("policy") or "none"
    mixing = [name for key, name in (("mixup", "Mixup"), ("cutmix", "CutMix")) if cell.get(key) and cell.get("mix_prob")]
    parts = [make_figures.ABBREVIATIONS.get(make_figures.POLICIES.get(policy), policy) * (policy != "none"),
             "Random Erasing" * bool(cell.get("random_erasing")), "/".join(mixing)]
    return Level(policy != "none", bool(cell.get("random_erasing")), bool(mixing), " +\n".join(filter(None, parts)) or "none")


def phase_rows(cells: list[Cell]) -> list[dict]:
    """By augmentation and beta: DKD against KD over the common seeds; in the order of strength, then of beta."""
    candidates = [(cell, kd) for cell in cells if cell.get("method") == "dkd" and (kd := find_kd(cell, cells))]
    places, rows = {}, []
    for cell, kd in candidates:
        place = augmentation(cell), cell.get("beta")
        other = places.get(place, candidates[0])[0]
        if differ := changes(other, cell) - (set() if place in places else {"beta", *AUGMENTATION}):
            raise Failure(USAGE, f"figure 7 compares beta and augmentation, but its runs differ in "
                          f"{', '.join(sorted(differ))} ({one_path(other)} and {one_path(cell)})", "take one of them away")
        places[place] = cell, kd
    for (level, beta), (cell, kd) in sorted(places.items(), key=lambda item: item[0]):
        pairs = paired(cell, kd)
        bad = cell.ended_badly(kd)
        rows.append({
            "augmentation": level.name.replace("\n", " "), "beta": beta, "n": len(pairs), "difference": mean(pairs),
            "accuracy": mean([*cell.accuracies.values()]), "kd_accuracy": mean([*kd.accuracies.values()]),
            "runs": len(cell.runs), **bad, "kd": f"KD: {kd.outcome(None)}", "level": level.name})
    return rows


def one_path(cell: Cell) -> Path:
    return next(iter(cell.runs.values())).path


def draw_phase(config: dict, rows: list[dict]) -> Figure:
    """A cell per beta and augmentation: colour and number say the difference, hatching where a run collapsed.

    config: of one of the runs, for the title.
    """
    levels, betas = list(dict.fromkeys(row["level"] for row in rows)), sorted({row["beta"] for row in rows})
    values = np.full((len(levels), len(betas)), np.nan)
    figure = Figure(figsize=(1.9 + 0.62 * len(betas) + 1.4, 1.2 + 0.5 * len(levels)), layout="constrained")
    axis = figure.add_subplot()
    for row in rows:
        if row["difference"] is not None:
            values[levels.index(row["level"]), betas.index(row["beta"])] = row["difference"]
    widest = max(1.0, np.nanmax(np.abs(values), initial=0.0))
    image = axis.imshow(values, cmap=COLOURS, norm=CenteredNorm(0, widest), origin="lower", aspect="auto")
    for row in rows:
        y, x = levels.index(row["level"]), betas.index(row["beta"])
        bad = row["collapsed"] + row["diverged"]
        text = signed(row["difference"], "diverged" if row["diverged"] else "no pair")
        text += f"\n{bad} of {row['runs']}" if bad and row["runs"] > 1 else ""
        if bad:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor="black", linewidth=0))
        axis.text(x, y, text, ha="center", va="center", linespacing=1.1,
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})
    axis.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axis.set_yticks(range(len(levels)), levels)
    axis.set_xlabel("beta, the weight of NCKD")
    axis.set_ylabel("augmentation\nbeside crop and flip")
    axis.grid(visible=False)
    axis.tick_params(length=0)
    right = axis.secondary_yaxis("right")
    right.set_yticks(range(len(levels)), [next(row["kd"] for row in rows if row["level"] == level).replace(", ", ",\n")
                                          for level in levels])
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="DKD minus KD\n(points of test accuracy)", pad=0.02, fraction=0.06)
    axis.set_title(f"{setting(config)}\n{rate(config)}; {seeds([row['n'] for row in rows])}\n"
                   "test accuracy with the weights of the best epoch", loc="left")
    if any(row["collapsed"] + row["diverged"] for row in rows):
        figure.legend([Patch(facecolor="white", edgecolor="black", hatch="////", linewidth=0.5)],
                      [f"DKD diverged, or collapsed: last validation accuracy more than {FALL:g} points below KD's"],
                      loc="outside lower left")
    return figure


# Figure 8

def by_epoch(tables: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, and at each the mean over the runs that have a number there."""
    epochs = np.unique(np.concatenate([epochs for epochs, _ in tables]))
    whole = np.full((len(tables), len(epochs)), np.nan)
    for row, (own, values) in zip(whole, tables):
        row[np.searchsorted(epochs, own)] = values
    there = np.isfinite(whole).sum(axis=0)
    return epochs, np.where(there, np.nansum(whole, axis=0) / np.maximum(there, 1), np.nan)


def share_panels(cells: list[Cell]) -> dict[str, Cell]:
    """The cells of PANELS: the base, and others that differ from it in that one thing."""
    base = find_base(cells)
    known = [] if base is None else [cell for cell in cells if cell is base or len(changes(base, cell)) == 1]
    found = {name: next((cell for cell in known if cell.has(wanted) and (cell is base) == (wanted is BASE)), None)
             for name, wanted in PANELS.items()}
    return {name: cell for name, cell in found.items() if cell}


def draw_shares(sweeps: dict[str, list[Cell]]) -> Figure:
    """Per sweep a row of panels: above the stacked shares of the terms, below the validation accuracy beside that of KD."""
    panels = {sweep: share_panels(cells) for sweep, cells in sweeps.items()}
    logs = {run.path: run_files.read_log(run.path / "log.csv")
            for row in panels.values() for cell in row.values() for run in cell.runs.values()
            if run.summary or (run.path / "log.csv").exists()}
    top = 1.08 * max((values.max() for _, values in logs.values() if len(values)), default=1.0)
    figure = Figure(figsize=(WIDE, 0.67 + 2.5 * len(panels)), layout="constrained")
    counts = [len(cell.runs) for row in panels.values() for cell in row.values()]
    some = [next(iter(row.values())).config for row in panels.values()]
    figure.suptitle(f"{setting(some[0])}; {seeds(counts)}. Test: accuracy with the weights of the best epoch.\n"
                    f"Red: a run diverged, or collapsed: last validation accuracy more than {FALL:g} points below KD's.",
                    x=0.01, ha="left", fontsize=7.5)
    terms = {}
    for part, config, row in zip(np.atleast_1d(figure.subfigures(len(panels), 1)), some, panels.values()):
        part.suptitle(rate(config), x=0.01, ha="left", fontsize=8, fontweight="bold")
        axes = part.subplots(2, len(PANELS), sharex=True, sharey="row", height_ratios=(1.5, 1))
        kd = [logs[run.path] for run in row["KD"].runs.values() if run.path in logs] if "KD" in row else []
        for (above, below), (name, cell) in zip(axes.T, ((name, row.get(name)) for name in PANELS)):
            below.set_xlabel("epoch")
            if cell is None:
                above.set_title(f"{name}\nnot run", loc="left")
                continue
            control = control_of(cell, [*row.values()])
            bad = any(cell.ended_badly(control).values())
            above.set_title(f"{name}\n{'test ' if cell.accuracies else ''}{cell.outcome(control)}", loc="left",
                            color=RED if bad else "black")
            terms |= stack(above, cell)
            draw_accuracy(below, [logs[run.path] for run in cell.runs.values() if run.path in logs], kd, bad)
        axes[0, 0].set(ylim=(0, 1), yticks=(0, 0.5, SHARE, 1), yticklabels=("0", "50", f"{100 * SHARE:.0f}", "100"))
        axes[0, 0].set_ylabel("share of the\nlogit gradient (%)")
        axes[1, 0].set_ylabel("validation\naccuracy (%)")
        axes[1, 0].set_ylim(0, top)
        axes[1, 0].yaxis.set_major_locator(MaxNLocator(3, steps=(1, 2, 5, 10)))
        axes[1, 0].xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=(1, 2, 2.5, 5, 10)))
    handles = [Patch(facecolor=colour, edgecolor="white", label=term.upper()) for term, colour in TERMS.items() if term in terms]
    handles += [Line2D([], [], color="black", linestyle="dotted", label=f"alarm: KL or NCKD above {100 * SHARE:.0f} %"),
                Line2D([], [], color="black", label="accuracy (thin: a seed)"),
                Line2D([], [], color=BLUE, linestyle="dashed", label="that of KD")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def stack(axis, cell: Cell) -> dict[str, float]:
    """Stacked shares by epoch; says in each area which term it is and its mean over the epochs, which is returned."""
    tables = [read_shares(run.path / "diagnostics.csv") for run in cell.runs.values()
              if run.summary or (run.path / "diagnostics.csv").exists()]
    names = [term for term in TERMS if any(term in shares for _, shares in tables)]
    if not names:  # all runs diverged before the end of the first epoch
        return {}
    curves = {term: by_epoch([(epochs, shares[term]) for epochs, shares in tables if term in shares]) for term in names}
    means, bottom = {term: mean(values[np.isfinite(values)]) or 0.0 for term, (_, values) in curves.items()}, 0.0
    epochs, areas = curves[names[0]][0], [values for _, values in curves.values()]
    if len(epochs) == 1:  # without a width nothing would be seen
        epochs, areas = np.array((epochs[0] - 0.5, epochs[0] + 0.5)), [np.repeat(values, 2) for values in areas]
    axis.stackplot(epochs, areas, colors=[TERMS[term] for term in names], edgecolor="white", linewidth=0.5, zorder=2)
    axis.axhline(SHARE, color="black", linestyle="dotted", zorder=3)
    for term, share in means.items():
        if share > 0.15:
            axis.text((epochs[0] + epochs[-1]) / 2, bottom + share / 2, f"{term.upper()} {100 * share:.0f} %", ha="center",
                      va="center", color="white" if term == "tckd" else "black", zorder=4,
                      bbox={"facecolor": TERMS[term], "edgecolor": "none", "pad": 0.5})
        bottom += share
    axis.grid(visible=False)
    return means


def draw_accuracy(axis, logs: list, kd: list, bad: bool) -> None:
    """Validation accuracy by epoch: thin lines of the seeds, their mean, and the mean of KD."""
    colour = RED if bad else "black"
    if kd:
        axis.plot(*by_epoch(kd), color=BLUE, linestyle="dashed", zorder=2)
    for log in logs if len(logs) > 1 else ():
        axis.plot(*log, color=colour, linewidth=0.4, zorder=3)
    if logs:
        axis.plot(*by_epoch(logs), color=colour, linewidth=1.4, marker="o" if len(logs[0][0]) < 2 else "", zorder=4)


# Figure 9

def cause_rows(sweep: str, sweeps: dict[str, list[Cell]]) -> list[dict]:
    """Every cell of the sweeps that changes one thing against the base of `sweep`, the largest difference first."""
    base = find_base(sweeps[sweep])
    rows = []
    for cell, cells in ((cell, cells) for cells in sweeps.values() for cell in cells):
        if base is None or cell is base or not (words := in_words(base, cell)):
            continue
        pairs = paired(cell, base)
        low, high = interval(pairs)
        rows.append({"base": sweep, "change": words, "n": len(pairs), "difference": mean(pairs), "ci_low": low, "ci_high": high,
                     "accuracy": mean([*cell.accuracies.values()]), "base_accuracy": mean([*base.accuracies.values()]),
                     "runs": len(cell.runs), **cell.ended_badly(control_of(cell, cells))})
    return sorted(rows, key=lambda row: (row["n"] == 0, -(row["difference"] or 0)))


def draw_causes(sweeps: dict[str, list[Cell]], panels: dict[str, list[dict]]) -> Figure:
    """Per base a forest plot: points are means, lines 95 % intervals; filled where the interval does not hold 0."""
    heights = [0.17 * len(rows) + 0.75 for rows in panels.values()]
    figure = Figure(figsize=(6.0, sum(heights) + 0.45), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    some = [find_base(sweeps[sweep]) for sweep in panels]
    figure.suptitle(setting(some[0].config), x=0.01, ha="left", fontsize=7.5)
    for axis, base, (sweep, rows) in zip(axes, some, panels.items()):
        kd = find_kd(base, sweeps[sweep])
        axis.set_title(f"{rate(base.config)}; {seeds([len(base.runs)])}\nbase: DKD, beta 8: {base.outcome(kd)}"
                       + (f"; KD: {kd.outcome(None)}" if kd else ""), loc="left")
        notes = []
        for place, row in enumerate(rows):
            bad = ", ".join(f"{row[how]} {how}" for how in ("collapsed", "diverged") if row[how])
            notes.append(f"{signed(row['difference'], 'no pair')}, n = {row['n']}"
                         + (f", {bad}" if bad else ""))
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


# Writing

def as_csv(rows: list[dict]) -> bytes:
    """What is only drawn stays out."""
    return make_figures.csv_text([{name: value for name, value in row.items() if name not in ("kd", "level")}
                                  for row in rows]).encode()


def read_sweeps(top: Path) -> dict[str, list[Cell]]:
    """The sweeps below `top` with runs that have ended; says what is there and what is not."""
    sweeps = {}
    for name in SWEEPS:
        cells, unfinished = read_sweep(top / name)
        if cells:
            sweeps[name] = cells
            print(f"{name}: {sum(len(cell.runs) for cell in cells)} runs of {len(cells)} cells"
                  + (f"; not ended, left out: {', '.join(path.name for path in unfinished)}" if unfinished else ""))
    if not sweeps:
        raise Failure(DATA, f"no runs of an ablation that have ended ({top})",
                      "run ./experiments.sh ablation-small first, or name another directory with --runs")
    if missing := [name for name in SWEEPS if name not in sweeps]:
        print(f"not found: {', '.join(missing)}")
    return sweeps


def write_outputs(top: Path, output: Path) -> None:
    """Draw and write all that the sweeps allow; say on stdout what was drawn, and what not and why."""
    sweeps = read_sweeps(top)
    two = {name: sweeps[name] for name in ("high", "usual") if name in sweeps}
    phase = phase_rows(sweeps.get("phase", []))
    shares = {name: two[name] for name in ("usual", "high") if name in two and share_panels(two[name])}
    causes = {name: rows for name in two if (rows := cause_rows(name, two))}

    def drawn(name: str, figure: Figure | None, needs: str, rows=(), of="") -> None:
        if figure is None:
            print(f"{name}: not drawn, without {needs}")
            return
        make_figures.write_figure(figure, output / name)
        if rows:
            files.write_atomic(output / f"{name}.csv", as_csv(rows))
        print(f"{output / name}.png, .pdf{', .csv' if rows else ''}: {of}")

    bad = sum(row["collapsed"] + row["diverged"] > 0 for row in phase)
    drawn("figure7", draw_phase(sweeps["phase"][0].config, phase) if phase else None, "runs of KD and DKD in phase", phase,
          f"{len(phase)} cells, {bad} with a collapse")
    drawn("figure8", draw_shares(shares) if shares else None, "runs of DKD, beta 8, in usual or high", of=" and ".join(shares))
    drawn("figure9", draw_causes(two, causes) if causes else None, "DKD, beta 8, and what it is compared with in high or usual",
          [row for rows in causes.values() for row in rows],
          ", ".join(f"{len(rows)} changes around the base in {name}" for name, rows in causes.items()))


def main(arguments=None) -> None:
    parser = errors.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=make_figures.ROOT / "runs" / "ablation", metavar="DIR",
                        help=f"the directory that holds the sweeps {', '.join(SWEEPS)}; default: runs/ablation of the repository")
    parser.add_argument("--output", type=Path, default=make_figures.ROOT / "figures", metavar="DIR",
                        help="where to write; default: figures/ of the repository")

    def work(args) -> None:
        with matplotlib.style.context(["default", STYLE]):
            write_outputs(args.runs, args.output)

    errors.run(work, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
