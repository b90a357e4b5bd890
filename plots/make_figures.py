"""The six figures (PNG, PDF) and two tables (Markdown, CSV, LaTeX) of the study, from the CSV and JSON of its runs alone.

    python plots/make_figures.py                              the runs in runs/ -> figures/
    python plots/make_figures.py --runs runs/demo             the demo alone
    python plots/make_figures.py --runs runs/v2-* runs/v3-*   one study out of several

A run is a directory with config.json and log.csv; one without summary.json is unfinished and appears in curves only.  Runs that
differ in nothing but the seed become one line: mean and sample standard deviation.  Runs of other methods join the figures of
all students where data, networks and teacher are the study's.  To add a figure, write a function `(study, names) -> axis` and
name it in FIGURES.
"""
import io
import math
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python plots/make_figures.py`
from diagnostics.alarms import FALL, collapsed
from plots.run_files import Run, control_of, read_run
from rundir import errors, files
from rundir.errors import DATA, USAGE, Failure
from rundir.identity import BEFORE, NON_EXPERIMENT_FLAGS

ROOT = Path(__file__).resolve().parent.parent


class Series(NamedTuple):
    """How one group of runs looks: an Okabe-Ito colour, and dashes and a marker so that grey print is readable too."""
    colour: str
    dashes: str | tuple
    marker: str
    remark: str = ""


EXPERIMENTS = {
    "v1": Series("#009E73", (0, (1, 1)), "^", ", mixing only"),
    "v2": Series("#0072B2", "solid", "o"),
    "v3": Series("#D55E00", (0, (5, 1.5)), "s"),
    "v3.1": Series("#E69F00", (0, (5, 1.2, 1, 1.2)), "D"),
    "v4": Series("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v", ", stronger teacher"),
}
ALONE = {"alone": Series("#777777", "solid", "P", "student alone")}
TEACHERS = {
    "teacher": Series("#000000", "dotted", "", "teacher"),
    "teacher-strong": Series("#000000", "dashdot", "", "stronger teacher"),
}
SERIES = TEACHERS | ALONE | EXPERIMENTS
STUDENTS = (*EXPERIMENTS, *ALONE)
OTHERS = (  # of students outside the study, in the order of their names, again from the start where there are more
    Series("#56B4E9", (0, (3, 1, 1, 1)), "<"), Series("#8C6D1F", (0, (1, 2)), ">"), Series("#7F3C8D", (0, (6, 2)), "p"),
)

DATASETS = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10", "imagefolder": "image folder", "synthetic": "synthetic images"}
POLICIES = {
    "autoaugment": "AA", "autoaugment-imagenet": "AA-ImageNet", "autoaugment-svhn": "AA-SVHN",
    "randaugment": "RA", "trivialaugment": "TA", "none": "",
}
ABBREVIATIONS = {
    "AA": "AutoAugment", "RA": "RandAugment", "TA": "TrivialAugment", "RE": "Random Erasing",
    "MC": "Mixup/CutMix", "M": "Mixup", "C": "CutMix",
}

# Accuracy and retention in percent, as the report gives them; shown beside ours only where data set and networks are its own.
REPORT = {
    "teacher": (76.65, None),
    "v1": (76.12, 99.31), "v2": (76.19, 99.40), "v3": (66.85, 87.21), "v3.1": (75.63, 98.67), "v4": (76.19, 99.40),
}
REPORT_SETTING = ("cifar100", "efficientnet_v2_l", "efficientnet_v2_s")

STYLE = {
    "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "lines.linewidth": 1.1, "lines.markersize": 3, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.4, "grid.color": "#DDDDDD",
    "legend.frameon": False, "legend.labelspacing": 0.3,
    "legend.handlelength": 2.7, "legend.handletextpad": 0.6, "legend.columnspacing": 1.0,
    "pdf.fonttype": 42,  # TrueType: Type 3 fonts are refused by several publishers
}
WIDTH, HEIGHT = 3.5, 2.5  # inches: one column, without the legend
CROSS = {"linestyle": "none", "marker": "X", "markersize": 6.5, "markeredgecolor": "black", "markeredgewidth": 0.7}


# Reading

def group(run: Run) -> str:
    """The name under which the run is drawn: its experiment's, else its directory's without the seed."""
    return run.config.get("experiment") or re.sub(r"-s\d+$", "", run.path.resolve().name)


def in_study(run: Run) -> bool:
    return group(run) in (EXPERIMENTS if run.distilled else TEACHERS | ALONE)


def run_directories(top: Path) -> list[Path]:
    """Where runs are: `top` itself or the first level below it that has any; runs/demo/v2 is of another study than runs/v2."""
    levels = ([log.parent for log in top.glob("*/" * depth + "log.csv")] for depth in range(4))
    return next((found for each in levels if (found := [path for path in each if (path / "config.json").is_file()])), [])


def read_study(directories) -> tuple[dict[str, list[Run]], list[Run], list[Failure]]:
    """The runs at or below `directories`: by group, in the order of SERIES, then of names, and of seeds; those that are of no
    group; and why others cannot be read."""
    runs, unreadable = [], []
    for path in sorted({path.resolve(): path for top in directories for path in run_directories(top)}.values()):
        try:
            runs.append(read_run(path))
        except Failure as failure:
            unreadable.append(failure)
    known = [run for run in runs if in_study(run)]
    members = known + [run for run in runs if not in_study(run) and joins(run, known)]
    names = [*SERIES, *sorted({group(run) for run in members} - SERIES.keys())]
    study = {name: sorted((run for run in members if group(run) == name), key=lambda run: run.config["seed"]) for name in names}
    study = {name: runs for name, runs in study.items() if runs}
    refuse_mixtures(study)
    return study, [run for run in runs if run not in members], unreadable


def joins(run, known) -> bool:
    """Whether a run outside the study is a student of a teacher of the study, comparable with its students."""
    def setting(run):
        return run.network, run.config.get("image_size"), run.on_test

    return (run.distilled and any(run.teacher == other.teacher for other in known if group(other) not in ALONE)
            and run.config["dataset"] == known[0].config["dataset"]
            and all(setting(run) == setting(other) for other in known if group(other) not in TEACHERS))


# The seeds of one experiment may differ in these, which say where and how a run was done, not what was computed.
MAY_DIFFER = NON_EXPERIMENT_FLAGS | {
    "seed", "kernels", "amp", "processes", "deterministic", "experiment", "teacher_checkpoint", "teacher_sha256", "init",
    "student_init", "data_dir", "patience", "compile", "data_sha256", "init_sha256", "threads"}
ALIKE = {  # what runs of these groups must share
    "dataset": (SERIES, lambda run: run.config["dataset"]),
    "student": (STUDENTS, lambda run: run.network),
    "image_size": (STUDENTS, lambda run: run.config.get("image_size")),
    "what they validate on": (STUDENTS, lambda run: "the test set" if run.on_test else "a validation split"),
    "teacher": (("teacher", "v1", "v2", "v3", "v3.1"), lambda run: run.teacher),
    "stronger teacher": (("teacher-strong", "v4"), lambda run: run.teacher),
}


def refuse_mixtures(study) -> None:
    """A figure compares one thing: refuse runs that differ in more than their experiment, and one seed counted twice."""
    checks = ALIKE | {
        f"{key} of {name}": ([name], lambda run, key=key: (BEFORE | run.config).get(key)) for name, runs in study.items()
        for key in dict.fromkeys(key for run in runs for key in run.config) if key not in MAY_DIFFER}
    found = [(f"runs of one study differ in {what}, {value(runs[0])} and {value(run)}", runs[0], run)
             for what, (names, value) in checks.items() if (runs := [run for name in names for run in study.get(name, ())])
             for run in runs if value(run) != value(runs[0])]
    found += [(f"{name} has two runs with seed {one.config['seed']}", one, other) for name, runs in study.items()
              for one, other in zip(runs, runs[1:]) if one.config["seed"] == other.config["seed"]]
    for what, one, other in found:
        raise Failure(USAGE, f"{what} ({one.path} and {other.path})",
                      "with --runs name only the directories that belong together")


# Numbers

def spread(values) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, None where they are not defined."""
    return float(np.mean(values)) if values else None, float(np.std(values, ddof=1)) if len(values) > 1 else None


def shown(mean_and_deviation, digits=".2f", between=" ± ") -> str:
    """In words; `-` for a mean of None."""
    return between.join(format(value, digits) for value in mean_and_deviation if value is not None) or "-"


def extent(values) -> str:
    return f"{min(values)}" + (f"–{max(values)}" if min(values) < max(values) else "")


def mean_curve(runs) -> tuple[np.ndarray, ...]:
    """Epochs (E,), and of the seeds that ran so long: mean (E,) and sample deviation (E,; nan for one seed)."""
    epochs = np.unique(np.concatenate([run.epochs for run in runs]))
    table = np.ma.masked_all((len(runs), len(epochs)))
    for row, run in zip(table, runs):
        row[np.searchsorted(epochs, run.epochs)] = run.val_acc1
    return epochs, table.mean(axis=0).data, table.std(axis=0, ddof=1).filled(np.nan)


def retentions(finished, name) -> list[float]:
    """Each seed's share of its teacher's test accuracy, in percent; for the student alone, of one that it did not have."""
    if finished[name][0].distilled:
        return [run.summary["retention"] for run in finished[name]]
    teacher = [run.summary["test_acc1_best"] for run in finished.get("teacher", ())] or [
        run.summary["teacher_test_acc1"] for other in ("v1", "v2", "v3", "v3.1") for run in finished.get(other, ())]
    if name in TEACHERS or not teacher:
        return []
    return [100 * run.summary["test_acc1_best"] / np.mean(teacher) for run in finished[name]]


# Figures

def dataset(study) -> str:
    name = next(iter(study.values()))[0].config["dataset"]
    return DATASETS.get(name, name)


def label(study, name) -> str:
    """What the group is, for legends and ticks; no line may break inside `β = 8`."""
    remark, run = look(study, name).remark, study[name][0]
    return f"{name}: {run.config['method_in_figures']}{remark}" if run.distilled else remark


def look(study, name) -> Series:
    if name in SERIES:
        return SERIES[name]
    return OTHERS[[other for other in study if other not in SERIES].index(name) % len(OTHERS)]


def new_axis(study, names, statistic):
    """A figure of one column with one axis and a heading that says what was measured, on how many seeds."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axis = figure.add_subplot()
    counts = [len(study[name]) for name in names]
    seeds = "1 seed" if max(counts) == 1 else f"n = {extent(counts)} seeds, {statistic} = ± 1 SD"
    teachers = dict.fromkeys(run.teacher for name in names for run in study[name] if run.distilled)
    networks = textwrap.fill(f"{' / '.join(teachers)} → {study[names[0]][0].network}", 52)
    axis.set_title(f"{dataset(study)}, {seeds}\n{networks}", loc="left")
    return axis


def draw_curves(study, names, first_epoch=1):
    """Validation accuracy by epoch from `first_epoch` on: mean line, band of one deviation, a cross where a seed stopped early.

    Beyond the first cross the mean is over the seeds that are left.
    """
    axis = new_axis(study, names, "band")
    unequal = len({len(study[name]) for name in names}) > 1
    for index, name in enumerate(names):
        series, runs = look(study, name), study[name]
        curve = mean_curve(runs)
        epochs, mean, deviation = (column[curve[0] >= first_epoch] for column in curve)
        text = label(study, name) + (f" (n = {len(runs)})" if unequal else "")
        text += "" if all(run.summary or run.diverged for run in runs) else ", unfinished"
        text += ", diverged" * any(run.diverged for run in runs)
        stops = sorted((int(run.epochs[-1]), run.val_acc1[-1]) for run in runs if run.summary and run.summary["stopped_early"])
        if stops:
            text += f", stopped at {extent([epoch for epoch, _ in stops])}"
        spacing = max(1, len(epochs) // 7)
        axis.plot(epochs, mean, label=text, color=series.colour, linestyle=series.dashes, marker=series.marker,
                  markevery=(spacing * index // len(names), spacing))
        axis.fill_between(epochs, mean - deviation, mean + deviation, color=series.colour, alpha=0.2, linewidth=0)
        if in_sight := [stop for stop in stops if stop[0] >= first_epoch]:
            axis.plot(*zip(*in_sight), **CROSS, color=series.colour, zorder=4)
    axis.set_xlabel("epoch")
    axis.set_ylabel("test accuracy (%),\nused for selection" if study[names[0]][0].on_test else "validation accuracy (%)")
    # By default the number of ticks depends on the size of the axis, which depends on the room for the ticks' labels.
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 2.5, 5, 10)))
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    return axis


def legend(axis) -> Figure:
    """The legend below the axis, where it covers no curve, in as many columns as fit; the figure grows by its height."""
    figure = axis.figure
    handles, _ = axis.get_legend_handles_labels()
    if any(line.get_marker() == CROSS["marker"] for line in axis.lines):
        handles.append(Line2D([], [], **CROSS, color="white", label="early stop"))
    for columns in (3, 2, 1):
        box = figure.legend(handles=handles, loc="outside lower left", ncols=columns)
        size = box.get_window_extent()
        if columns == 1 or size.x1 < figure.bbox.x1:
            break
        box.remove()
    figure.set_size_inches(WIDTH, HEIGHT + size.height / figure.dpi)
    return figure


def teacher_comparison(study, names):
    """Figure 2: does a stronger teacher help?  With each teacher's validation accuracy, that of its saved weights, as a line."""
    axis = draw_curves(study, names)
    for name, series in TEACHERS.items():
        comparable = [run for run in study.get(name, ()) if run.summary and run.on_test == study[names[0]][0].on_test]
        if comparable:
            best = np.mean([run.val_acc1[run.epochs == run.summary["best_epoch"]] for run in comparable])
            text = f"{series.remark}: {best:.1f} %"
            axis.axhline(best, color=series.colour, linestyle=series.dashes, linewidth=0.9, label=text)
    return axis


def retention_bars(study, names):
    """Figure 5: the share of its own teacher's test accuracy that each student reaches, mean and deviation over seeds."""
    names = [name for name in names if retentions(study, name)]
    axis, spreads = new_axis(study, names, "error bar"), [spread(retentions(study, name)) for name in names]
    deviations = [deviation or 0 for _, deviation in spreads]
    bars = axis.bar(range(len(names)), [mean for mean, _ in spreads], width=0.7, edgecolor="black", linewidth=0.5,
                    color=[look(study, name).colour for name in names], yerr=deviations if any(deviations) else None,
                    error_kw={"elinewidth": 0.8, "capsize": 2})
    teacher = "teacher" + ("; for v4 the stronger one" if "v4" in names else "")
    axis.axhline(100, color="black", linestyle="dotted", linewidth=0.9, label=teacher)
    axis.bar_label(bars, [shown((mean, deviation), ".1f", "\n± ") for mean, deviation in spreads], padding=2, linespacing=1.0,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3})  # in front of the teacher's line
    axis.set_xticks(range(len(names)), [re.sub("[:,]? ", "\n", label(study, name)) for name in names])
    axis.grid(visible=False)  # every bar says its value
    axis.set_ylim(0, max(120, 1.2 * axis.dataLim.y1))
    axis.set_ylabel("share of the teacher's\ntest accuracy (%)")
    return axis


def last_epochs(study, names):
    """Figure 6: the last 50 epochs of figure 4, or the last half of a run of fewer than 100."""
    last = int(max(run.epochs[-1] for name in names for run in study[name]))
    return draw_curves(study, names, first_epoch=last - min(50, math.ceil(last / 2)) + 1)


# How each figure is drawn, of which runs, and whether it needs the summary of finished runs.  To STUDENTS all others are added.
FIGURES = {
    "figure1": (draw_curves, ("v2", "v3"), False),
    "figure2": (teacher_comparison, ("v2", "v4"), False),
    "figure3": (draw_curves, ("v3", "v3.1"), False),
    "figure4": (draw_curves, STUDENTS, False),
    "figure5": (retention_bars, STUDENTS, True),
    "figure6": (last_epochs, STUDENTS, False),
}


# Tables

def augmentation(config) -> str:
    """Abbreviated, without crop and flip."""
    mixing = ("M" if config.get("mixup") else "") + ("C" if config.get("cutmix") else "")
    policy = config.get("policy")
    parts = POLICIES.get(policy, policy), "RE" if config.get("random_erasing") else "", mixing
    return "+".join(filter(None, parts)) or "-"


def verdict(run: Run, others: list[Run]) -> str:
    """That of summary.json, or "collapsed" where the run ended far below the KD run among the others."""
    control = control_of(run, others)
    fell = control and collapsed(run.val_acc1[-1], control.val_acc1[-1], run.summary.get("val_images"))
    return "collapsed" if fell else run.summary["verdict"]


def over_seeds(column: str, values) -> dict:
    return dict(zip((f"{column}_mean", f"{column}_sd"), spread(values)))


# A row of a table: plain numbers by CSV column, and what people read by header.
Row = tuple[dict[str, Any], dict[str, str]]
LEFT = {"exp.", "method", "augm.", "verdict", "network"}  # headers of texts


def table1(finished) -> tuple[list[Row], str]:
    """What was run and what came out, beside the report's numbers where the setting is the report's; and the note below."""
    rows, reported, everyone = [], in_the_reports_setting(finished), [run for runs in finished.values() for run in runs]
    for name, runs in finished.items():
        first, best, last = runs[0], *([run.summary[f"test_acc1_{which}"] for run in runs] for which in ("best", "last"))
        teacher = np.mean([run.summary["teacher_test_acc1"] for run in runs]) if first.distilled else None
        ran, chosen = [int(run.epochs[-1]) for run in runs], [run.summary["best_epoch"] for run in runs]
        kinds = Counter(verdict(run, everyone) for run in runs)
        verdicts = ", ".join(f"{n} {kind}" if len(kinds) > 1 else kind for kind, n in kinds.items())
        texts = {
            "exp.": name, "method": first.method, "augm.": augmentation(first.config), "teacher": shown([teacher]),
            "accuracy (%)": shown(spread(best)), "n": str(len(runs)), "last (%)": shown(spread(last)),
            "retention (%)": shown(spread(retentions(finished, name))), "epochs / best": f"{extent(ran)} / {extent(chosen)}",
            "verdict": verdicts}
        numbers = {
            "experiment": name, "method": texts["method"], "augmentation": texts["augm."], "teacher_test_acc1": teacher,
            **over_seeds("test_acc1_best", best), "n": len(runs), **over_seeds("test_acc1_last", last),
            **over_seeds("retention", retentions(finished, name)), "epochs_min": min(ran), "epochs_max": max(ran),
            "best_epoch_min": min(chosen), "best_epoch_max": max(chosen), "verdict": verdicts}
        if reported:
            report = REPORT.get(name, (None, None))
            texts["report (%)"] = shown(report, between=" / ")
            numbers |= dict(zip(("report_acc1", "report_retention"), report))
        rows.append((numbers, texts))
    used = {word for _, texts in rows for word in re.split(r"\W+", texts["augm."])}
    abbreviations = ", ".join(f"{short} {meaning}" for short, meaning in ABBREVIATIONS.items() if short in used)
    return rows, (
        "Teacher, accuracy: on the test set in percent, with the weights of the best epoch; last: with those of the last. "
        f"Retention: accuracy / teacher{'; for alone, of a teacher that it did not see' if 'alone' in finished else ''}. "
        f"Augmentation besides crop and flip: {abbreviations or 'none'}. "
        f"Collapsed: the last validation accuracy is more than {FALL:g} points, and three images, below that of KD on the same "
        f"images or, without such a run, below its own best. {provenance(finished)}"
        + (" Report: accuracy / retention; one seed, selected on the test set, batch and epochs not given." if reported else ""))


def table2(finished) -> tuple[list[Row], str]:
    rows = []
    for name, runs in finished.items():
        summary, image_size = runs[0].summary, runs[0].config.get("image_size")
        best = [run.summary["test_acc1_best"] for run in runs]
        numbers = {
            "experiment": name, "network": runs[0].network, "params_m": summary["params"] / 1e6,
            "size_mb": 4 * summary["params"] / 1e6, "gflop": summary["flops"] / 1e9, "image_size": image_size,
            **over_seeds("test_acc1_best", best), "compression": summary.get("compression"),
            "wall_min": np.mean([run.summary["wall_s"] for run in runs]) / 60}
        rows.append((numbers, {
            "exp.": name, "network": runs[0].network, "parameters (M)": f"{numbers['params_m']:.4g}",
            "size (MB)": f"{numbers['size_mb']:.4g}", "GFLOP": f"{numbers['gflop']:.4g}",
            "image": f"{image_size} px" if image_size else "native", "accuracy (%)": shown(spread(best)),
            "compression (x)": shown([numbers["compression"]]), "wall time (min)": f"{numbers['wall_min']:.1f}"}))
    devices = dict.fromkeys(str(run.config.get("device")) for runs in finished.values() for run in runs)
    return rows, (
        "Size: parameters in fp32, 1 MB = 1000000 bytes. GFLOP: one image of that size forward, a multiply-add counts as 2. "
        "Accuracy: on the test set, with the weights of the best epoch. Compression: parameters of the teacher / of the student. "
        f"Wall time: whole run, mean over seeds, on {', '.join(devices)}. {provenance(finished)}")


def in_the_reports_setting(finished) -> bool:
    return any((run.config["dataset"], run.teacher, run.network) == REPORT_SETTING
               for run, *_ in finished.values() if run.distilled)


def provenance(finished) -> str:
    """What a reader must know beside every number: data, selection, seeds, and how the weights started."""

    def stated(key):
        """Each text under `key` of the summaries; where they differ, with the experiments that it belongs to."""
        groups = {}
        for name, runs in finished.items():
            for run in runs:
                groups.setdefault(run.summary.get(key) or "not stated", {})[name] = None
        return "; ".join(said if len(groups) == 1 else f"{said} ({', '.join(names)})" for said, names in groups.items())

    counts = [len(runs) for runs in finished.values()]
    seeds = "1 seed" if counts == [1] * len(counts) else f"n = {extent(counts)} seeds, mean ± sample SD"
    networks = ", ".join(dict.fromkeys(runs[0].network for runs in finished.values()))
    text = (f"Data: {dataset(finished)}; networks: {networks}; {seeds}. Best epoch selected on: {stated('selected_on')}. "
            f"Notes: {stated('note')}.")
    return text if in_the_reports_setting(finished) else (
        text + " Runs of this code in their own setting, not a reproduction of the report (CIFAR-100, EfficientNetV2-L to -S).")


TABLES = {"table1": table1, "table2": table2}


def csv_text(records: list[dict]) -> str:
    """A table with the columns of the first record; fractions are rounded to four decimals."""
    return files.as_csv(list(records[0]), [
        {name: round(float(value), 4) if isinstance(value, float) else value for name, value in record.items()}
        for record in records]).decode()


def as_markdown(rows, note) -> str:
    return files.as_markdown({header: [texts[header] for _, texts in rows] for header in rows[0][1]}, LEFT, note)


LATEX = str.maketrans({character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "<": "$<$", ">": "$>$"})


def as_latex(rows, note) -> str:
    """A plain tabular to \\input, without packages, about as wide as a page of two columns."""
    lines = [list(rows[0][1]), *(texts.values() for _, texts in rows)]
    head, *body = (" & ".join(text.translate(LATEX) for text in line) + r" \\" for line in lines)
    return "\n".join((
        r"{\scriptsize\setlength{\tabcolsep}{1.5pt}%",
        rf"\begin{{tabular}}{{{''.join('l' if header in LEFT else 'r' for header in rows[0][1])}}}",
        r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}\par\smallskip",
        rf"\noindent {note.translate(LATEX)}\par}}", ""))


FORMATS = {"md": as_markdown, "csv": lambda rows, note: csv_text([numbers for numbers, _ in rows]), "tex": as_latex}


# Writing

def write_picture(figure: Figure, path: Path, dpi: int) -> None:
    """PNG or PDF, by the suffix, without the date, so that the same runs give the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=dpi, metadata={"CreationDate": None} if path.suffix == ".pdf" else {})
    files.write_atomic(path, content.getvalue())


def write_figure(figure: Figure, path: Path) -> None:
    for suffix in (".png", ".pdf"):
        write_picture(figure, path.with_suffix(suffix), dpi=300)


def selected(study, wanted) -> dict[str, list[Run]]:
    chosen = {name: [run for run in runs if wanted(run)] for name, runs in study.items()}
    return {name: runs for name, runs in chosen.items() if runs}


@matplotlib.style.context(["default", STYLE])
def write_outputs(directories, output: Path) -> None:
    """Draw and write all that the runs allow; say on stdout what is missing, what is unfinished, and at the end Table 1.

    Failure DATA, then, where runs could not be read.
    """
    study, others, unreadable = read_study(directories)
    started, finished = selected(study, lambda run: len(run.epochs)), selected(study, lambda run: run.summary)
    if not finished and not any(run.distilled for runs in started.values() for run in runs):
        raise unreadable[0] if unreadable else Failure(
            DATA, f"no runs of the study to draw ({', '.join(map(str, directories))})",
            "train first, name other directories with --runs, or draw any run with plots/explain.py")
    said = [f"left out: {failure}" for failure in unreadable]
    said += [f"left out, not of the study: {', '.join(str(run.path) for run in others)}"] * bool(others)
    if missing := [name for name in SERIES if name not in study]:
        said.append(f"not found: {', '.join(missing)}")
    said += [f"{'diverged' if run.diverged else 'unfinished'}, in curves only: {run.path} (epoch {max(run.epochs, default=0)} of "
             f"{run.config['epochs']})" for runs in study.values() for run in runs if not run.summary]
    print(*said, sep="\n", end="\n" * bool(said))

    for name, (draw, wanted, needs_summary) in FIGURES.items():
        pool = finished if needs_summary else started
        names, missing = [key for key in wanted if key in pool], [key for key in wanted if key not in pool]
        names += [key for key in pool if wanted is STUDENTS and key not in SERIES]
        if not any(pool[name][0].distilled for name in names):
            print(f"{name}: not drawn, without {' and '.join(missing)}")
            continue
        write_figure(legend(draw(pool, names)), output / name)
        print(f"{output / name}.png, .pdf" + (f": drawn without {', '.join(missing)}" if missing else ""))
    diverged = ", ".join(f"{name} seed {run.config['seed']}" for name, runs in study.items() for run in runs if run.diverged)
    lost = f" Diverged, and not counted: {diverged}." * bool(diverged)
    made = {name: table(finished) for name, table in TABLES.items()} if finished else {}
    tables = {name: (rows, note + lost) for name, (rows, note) in made.items()}
    for name, (rows, note) in tables.items():
        for suffix, render in FORMATS.items():
            files.write_atomic(output / f"{name}.{suffix}", render(rows, note).encode())
        print(f"{output / name}.md, .csv, .tex")
    if finished:
        print("", as_markdown(*tables["table1"]), sep="\n", end="")
    if unreadable:
        raise Failure(DATA, f"runs that cannot be read were left out ({len(unreadable)}, named above)",
                      "repair them, or take them away")


def main(arguments=None) -> None:
    parser = errors.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", nargs="+", type=Path, default=[ROOT / "runs"], metavar="DIR",
                        help="directories that hold runs, directly or below; default: runs/ of the repository")
    parser.add_argument("--output", type=Path, default=ROOT / "figures", metavar="DIR",
                        help="where to write; default: figures/ of the repository")
    errors.run(lambda args: write_outputs(args.runs, args.output), parser.parse_args(arguments))


if __name__ == "__main__":
    main()
