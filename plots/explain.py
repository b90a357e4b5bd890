"""One page on one or more runs (PNG or PDF): how they ended, their alarms, and the curves of what was logged.

    python plots/explain.py runs/v3-s1                        -> runs/v3-s1/explain.png
    python plots/explain.py runs/v3-s1 runs/v2-s1             two runs; the one of KD is the control of the other
    python plots/explain.py runs/v3-s1 --output v3.pdf

Verdict, alarms and advice are those of summary.json, and are printed too.  The curves are those of log.csv and
diagnostics.csv; docs/diagnostics.md explains the columns.  Colours are runs or, for a single run, the terms of its loss.  To add
a panel, write a function `(axis, cases) -> legend entries` and name it in PANELS.
"""
import io
import math
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python plots/explain.py`
from diagnostics.alarms import MOVE, SHARE, TEACHER, collapsed
from losses.methods import TERMS
from plots import make_figures
from plots.run_files import Run, control_of, read_columns, read_run, require
from rundir import errors, files
from rundir.errors import DATA, USAGE, Failure

TREATMENTS = {"all": "", "clean": "_clean", "policy": "_policy", "erased": "_erased", "mixup": "_mixup", "cutmix": "_cutmix"}

SERIES = make_figures.EXPERIMENTS
LOOKS = (SERIES["v2"], SERIES["v3.1"], SERIES["v1"], SERIES["v4"], SERIES["v3"], *make_figures.OTHERS)  # of runs
CE_LOOK = make_figures.ALONE["alone"]
TERM_LOOKS = (SERIES["v3.1"], SERIES["v2"], SERIES["v1"], SERIES["v4"])  # of the other terms, in this order, again and again

STYLE = make_figures.STYLE | {
    "text.parse_math": False,  # a run may have a $ in its name
    "lines.markersize": 3.2, "legend.borderpad": 0, "legend.handlelength": 1.9, "legend.columnspacing": 0.9,
}
WIDTH, DPI = 8.3, 150  # inches: of the page
EDGE = 0.35  # inches: its margin
PANEL = 2.2  # inches: the height of a panel, and of what is around its axes
HEAD, FOOT, LEFT, RIGHT = 0.56, 0.46, 0.47, 0.4
STEP, GAP = 0.13, 0.15  # inches: from line to line of the words, and between words and panels
TITLE, BODY = 9, 7.5  # points
CHARACTERS = 125  # of a line of BODY points
INDENT = 0.3  # inches: of the words on several runs, beside which their lines are shown
DOTTED = {"color": "black", "linestyle": (0, (1, 1.5)), "linewidth": 1.0}


# Reading

@dataclass(frozen=True)
class Case:
    """A run on the page: `columns` are those of diagnostics.csv, float64 (epochs,) with nan for an empty cell; `status` is
    status.json, empty where there is none."""
    run: Run
    name: str
    look: make_figures.Series
    columns: dict
    status: dict

    @property
    def method(self) -> str:
        return self.run.config["method_in_tables"] if self.run.distilled else "labels only"

    @property
    def terms(self) -> list[str]:
        """Those of the loss, cross-entropy first."""
        return [term for term in TERMS if self.has(f"share_{term}")]

    @property
    def largest(self) -> str | None:
        """The term besides cross-entropy that makes most of the logit gradient."""
        return max((term for term in self.terms if term != "ce"), key=lambda term: self.mean(f"share_{term}"), default=None)

    @property
    def measured(self) -> str:
        """On what the accuracy of every epoch was measured."""
        return "test" if self.run.on_test else "validation"

    def column(self, name: str) -> np.ndarray:
        return self.columns.get(name, np.full(1, np.nan))

    def has(self, name: str) -> bool:
        return bool(np.isfinite(self.column(name)).any())

    def mean(self, name: str, suffix: str = "") -> float:
        """Over the epochs, each image the same; nan where there is none."""
        values, images = self.column(name + suffix), self.column("images" + suffix)
        there = np.isfinite(values) & (images > 0)
        return float(np.average(values[there], weights=images[there])) if there.any() else math.nan


def read_diagnostics(path: Path, epochs: int) -> dict[str, np.ndarray]:
    """Every column of diagnostics.csv by name, (epochs,): nan for a missing epoch, too."""
    if not path.exists():
        raise Failure(DATA, f"no diagnostics.csv ({path})", "the run has no whole epoch, or was made before they were recorded; "
                      "train it again, or name another run")
    columns = read_columns(path, "images")
    there = columns["epoch"]
    if not len(there) or there[-1] > epochs:
        raise files.damaged(path, f"epoch {there[-1]:g}" if len(there) else "no epoch")
    filled = np.full((len(columns), int(there[-1])), math.nan)
    filled[:, there.astype(int) - 1] = [*columns.values()]
    return dict(zip(columns, filled))


def read_case(directory: Path, name: str, look: make_figures.Series) -> Case:
    run = read_run(directory)
    if not len(run.epochs):
        raise files.damaged(directory / "log.csv", "no epoch")
    path, status = directory / "status.json", {}
    if summary := run.summary:
        require(directory / "summary.json", summary, optional=True, health=str, alarms=list, advice=str)
        for alarm in summary.get("alarms") or ():
            require(directory / "summary.json", alarm, name=str, value=float, limit=float, text=str)
    elif path.exists():
        status = files.read_json(path)
        require(path, status, state=str, reason=str)
    return Case(run, name, look, read_diagnostics(directory / "diagnostics.csv", run.config["epochs"]), status)


def read_cases(directories: list[Path]) -> list[Case]:
    """Every run, with a name that tells it from the others, and its look."""
    places = [directory.resolve() for directory in directories]
    if len(places) > len(LOOKS):
        raise Failure(USAGE, f"{len(places)} runs do not fit on a page", f"name at most {len(LOOKS)}")
    if again := next((place for place in places if places.count(place) > 1), None):
        raise Failure(USAGE, f"a run is named twice ({again})", "name it once")
    parts = 1
    while len({place.parts[-parts:] for place in places}) < len(places):
        parts += 1
    names = ["/".join(place.parts[-parts:]) for place in places]
    looks = LOOKS if len(places) > 1 else (make_figures.Series("black", "solid", ""),)
    return [read_case(*each) for each in zip(directories, names, looks)]


# Words

def ending(case: Case) -> str:
    """How the run ended, and whether it is healthy."""
    summary, status, done = case.run.summary, case.status, f"epoch {case.run.epochs[-1]} of {case.run.config['epochs']}"
    if summary:
        return f"{summary['verdict']}, {summary.get('health') or 'made before alarms were recorded'}"
    if status.get("state") in ("failed", "stopped"):
        return f"{status['state']} after {done}: {status['reason']} (exit code {status.get('exit_code')})"
    return f"unfinished after {done}, " + (f"status {status['state']}" if status else "without status.json")


def against(case: Case, control: Case) -> str:
    """How far the run is from the control, the KD run beside it, and whether it collapsed."""
    ours, theirs = case.run.val_acc1, control.run.val_acc1
    last, best = (f"{one:.1f} %, {abs(one - other):.1f} points {'below' if one < other else 'above'}"
                  for one, other in ((ours[-1], theirs[-1]), (ours.max(), theirs.max())))
    lead = "Collapsed against" if collapsed(ours[-1], theirs[-1]) else "Against"
    return f"{lead} the control {control.name}: last {case.measured} accuracy {last}; best {best}"


def curves(case: Case) -> list[str]:
    """The accuracies, and the largest term."""
    run, top = case.run, int(np.argmax(case.run.val_acc1))
    found = [f"{case.measured.capitalize()} accuracy: at most {run.val_acc1[top]:.1f} % (epoch {run.epochs[top]}), "
             f"{run.val_acc1[-1]:.1f} % in the last epoch ({run.epochs[-1]})"]
    if case.largest:
        values, mean = case.column(f"share_{case.largest}"), case.mean(f"share_{case.largest}")
        found.append(f"Largest term beside cross-entropy: {case.largest.upper()}, on average {100 * mean:.0f} % of the logit "
                     f"gradient, at most {100 * np.nanmax(values):.0f} % (epoch {np.nanargmax(values) + 1})")
    return found


def blocks(cases: list[Case]) -> list[tuple[str, list[str]]]:
    """What is said of every run: a heading and sentences."""
    runs, found = [case.run for case in cases], []
    controls = [next((other for other in cases if other.run is control_of(run, runs)), None) for run in runs]
    for case, control in zip(cases, controls):
        said = [against(case, control)] if control else []
        said, summary, line = said + curves(case), case.run.summary or {}, "Alarm: {name} {value:.3g}, limit {limit:.3g}: {text}"
        said += [line.format_map(alarm) for alarm in summary.get("alarms") or ()]
        said += [f"Advice: {summary['advice']}"] if summary.get("advice") else []
        heading = ending(case)
        if len(cases) > 1:
            heading = (f"{case.name} ({'control: ' if case in controls else ''}{case.method}, seed {case.run.config['seed']}): "
                       f"{heading}")
        found.append((" ".join(heading.split()), [" ".join(sentence.split()) for sentence in said]))
    return found


def title(cases: list[Case]) -> tuple[str, str]:
    """Which runs these are, and what they trained, on what."""
    runs = [case.run for case in cases]
    datasets = dict.fromkeys(make_figures.DATASETS.get(run.config["dataset"], run.config["dataset"]) for run in runs)
    networks = dict.fromkeys(f"{run.teacher} → {run.network}" if run.distilled else run.network for run in runs)
    about = [", ".join(datasets), ", ".join(networks)]
    if len(cases) == 1:
        return cases[0].name, "; ".join([cases[0].method, *about, f"seed {runs[0].config['seed']}"])
    names = ", ".join(case.name for case in cases)
    return names if len(names) < 60 else f"{len(cases)} runs", "; ".join(about)


class Line(NamedTuple):
    """A line of text at the top of the page; `marks`: the run whose colour and marker are shown beside it."""
    text: str
    size: float = BODY
    weight: str = "normal"
    marks: Case | None = None


def lines_of(cases: list[Case]) -> list[Line]:
    """The words at the top of the page."""
    head, about = title(cases)
    found = [Line(text, TITLE, "bold") for text in textwrap.wrap(head, int(CHARACTERS * BODY / TITLE))]
    found += [Line(text) for text in textwrap.wrap(about, CHARACTERS)]
    for case, (heading, sentences) in zip(cases, blocks(cases)):
        first, *more = textwrap.wrap(heading, CHARACTERS)
        found += [Line(""), Line(first, weight="bold", marks=case if len(cases) > 1 else None)]
        found += [Line(text, weight="bold") for text in more]
        for sentence in sentences:
            found += [Line(text) for text in textwrap.wrap(sentence, CHARACTERS, subsequent_indent="    ")]
    return found


def write_words(figure: Figure, lines: list[Line]) -> None:
    """Put the lines on the page, from its top; where some have a mark, there is room beside all."""
    height, several = figure.get_figheight(), any(line.marks for line in lines)
    for number, line in enumerate(lines, 1):
        y = (height - EDGE - number * STEP) / height
        figure.text((EDGE + INDENT * several) / WIDTH, y, line.text, fontsize=line.size, fontweight=line.weight, va="baseline")
        if line.marks:
            look, middle = line.marks.look, y + 0.04 / height
            figure.add_artist(Line2D([EDGE / WIDTH, (EDGE + 0.22) / WIDTH], [middle] * 2, color=look.colour, marker=look.marker,
                                     markevery=[0], markersize=4.5, linewidth=1.6))


# Panels

def sample(text: str, colour="black", dashes="solid", marker="", width=1.1, **more) -> Line2D:
    """A line of a legend."""
    return Line2D([], [], color=colour, linestyle=dashes, marker=marker, linewidth=width, label=text, **more)


def box(text: str, colour="none") -> Patch:
    return Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=text)


def limit(value: float) -> Line2D:
    """Of an alarm."""
    return Line2D([], [], **DOTTED, label=f"limit {value:g} %")


def term_look(case: Case, term: str) -> make_figures.Series:
    return CE_LOOK if term == "ce" else TERM_LOOKS[[name for name in case.terms if name != "ce"].index(term) % len(TERM_LOOKS)]


def plot(axis, values, colour, marker="", dashes="solid", width=1.1, shift=0) -> None:
    """A line by epoch from 1 on: gaps where values are nan, a marker now and then, and wherever a value stands alone; hollow
    markers on dashed lines."""
    there = np.isfinite(values)
    beside = np.concatenate(([False], there, [False]))
    alone = np.flatnonzero(there & ~beside[:-2] & ~beside[2:])
    spacing = max(1, len(values) // 8)
    regular = range(shift % spacing, len(values), spacing) if marker else ()
    axis.plot(np.arange(1, len(values) + 1), values, color=colour, linestyle=dashes, linewidth=width, marker=marker or "o",
              fillstyle="full" if dashes == "solid" else "none", markevery=sorted({*regular, *map(int, alone)}))


def plot_runs(axis, cases, column: Callable | str, dashes="solid", factor=1.0, width=1.1) -> None:
    """That column of every run that has it, a colour each; with a function, the column's name for that run."""
    for number, case in enumerate(cases):
        name = column(case) if callable(column) else column
        if case.has(name):
            plot(axis, factor * case.column(name), case.look.colour, case.look.marker, dashes, width, number)


def log_axis(axis) -> None:
    """A log axis with a few plain numbers."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def accuracy(axis, cases) -> list:
    """Validation accuracy, and that on training images without augmentation; where the best epoch and an early stop were."""
    for number, case in enumerate(cases):
        run, colour = case.run, case.look.colour
        values = np.full(run.epochs[-1], math.nan)
        values[run.epochs - 1] = run.val_acc1
        kept = run.summary["best_epoch"] if run.summary else run.epochs[np.argmax(run.val_acc1)]
        plot(axis, values, colour, case.look.marker, shift=number)
        axis.plot(kept, values[kept - 1], color=colour, marker="o", markersize=7, fillstyle="none", linestyle="none")
        if run.summary and run.summary["stopped_early"]:
            axis.plot(run.epochs[-1], run.val_acc1[-1], **make_figures.CROSS, color=colour)
    plot_runs(axis, cases, "train_acc1_clean", (0, (3, 1.5)), width=0.8)
    axis.set_ylim(bottom=0)
    measured = " or ".join(dict.fromkeys(case.measured for case in cases))
    entries = [sample(measured), sample("clean training", dashes=(0, (3, 1.5)), width=0.8),
               sample("best epoch", dashes="none", marker="o", markersize=6, fillstyle="none")]
    if any(case.run.summary and case.run.summary["stopped_early"] for case in cases):
        entries.append(Line2D([], [], **make_figures.CROSS, color="white", label="early stop"))
    return entries


def shares(axis, cases) -> list:
    """What part of the logit gradient each term makes, the largest at the bottom, where the limit is read, and cross-entropy on
    top; of several runs, the largest term."""
    if len(cases) == 1:
        case, entries = cases[0], []
        edges = np.arange(len(case.column("epoch")) + 1) + 0.5
        low = np.zeros(len(edges) - 1)
        for term in sorted(case.terms, key=lambda term: (term == "ce", -case.mean(f"share_{term}"))):
            colour = "#D9D9D9" if term == "ce" else term_look(case, term).colour
            high = low + 100 * case.column(f"share_{term}")
            axis.stairs(high, edges, baseline=low, fill=True, color=colour)
            axis.stairs(high, edges, baseline=None, color="black", linewidth=0.5)
            entries.append(box(term.upper(), colour))
            low = high
    else:
        plot_runs(axis, cases, lambda case: f"share_{case.largest}", factor=100)
        entries = largest_terms(cases)
    axis.axhline(100 * SHARE, color="white", linewidth=2.2, alpha=0.8)
    axis.axhline(100 * SHARE, **DOTTED)
    axis.set_ylim(0, 100)
    return [*entries, limit(100 * SHARE)]


def largest_terms(cases) -> list:
    """The name of the largest term of every run, in the run's look; of more than five runs only the words say it."""
    taught = [case for case in cases if case.largest]
    return [sample(case.largest.upper(), case.look.colour, marker=case.look.marker) for case in taught] if len(taught) < 6 else []


def gradient_norm(axis, cases) -> list:
    """The norm before clipping, the norm clipped to, and on the right the share of clipped steps."""
    plot_runs(axis, cases, "grad_norm_mean")
    clipping, entries = [case for case in cases if case.run.config.get("clip_grad")], [sample("norm")]
    for case in clipping:
        axis.axhline(case.run.config["clip_grad"], **DOTTED | {"color": case.look.colour})
    log_axis(axis)
    if clipping:
        right = axis.twinx()
        plot_runs(right, cases, lambda case: "clip_frac" if case.run.config.get("clip_grad") else "", (0, (4, 1.5)), 100, 0.8)
        right.set(ylim=(0, 105), ylabel="steps clipped (%)")
        right.spines["right"].set_visible(True)
        right.grid(visible=False)
        entries += [Line2D([], [], **DOTTED, label="clipped to"), sample("clipped steps", dashes=(0, (4, 1.5)), width=0.8)]
    return entries


def step_size(axis, cases) -> list:
    """How far a step moves the weights."""
    plot_runs(axis, cases, "update_ratio", factor=100)
    axis.axhline(100 * MOVE, **DOTTED)
    log_axis(axis)
    return [limit(100 * MOVE)]


def teacher(axis, cases) -> list:
    """What share of the student's images the teacher is right about, by what was done to them, over the run."""
    taught = [case for case in cases if case.has("teacher_acc1")]
    shown = {name: suffix for name, suffix in TREATMENTS.items() if any(case.has("teacher_acc1" + suffix) for case in taught)}
    thickness = 0.8 / len(taught)
    for number, case in enumerate(taught):
        places = np.arange(len(shown)) + thickness * (number + 0.5) - 0.4
        colour = case.look.colour if len(cases) > 1 else "#888888"
        for column, look in (("teacher_acc1", {"facecolor": colour}), ("teacher_either", {"fill": False})):
            means = [case.mean(column, suffix) for suffix in shown.values()]
            axis.barh(places, means, thickness, edgecolor="black", linewidth=0.5, **look)
    axis.axvline(TEACHER, **DOTTED)
    axis.set_yticks(range(len(shown)), list(shown))
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.grid(visible=False, axis="y")
    return [box("larger label", "#888888"), box("either label"), limit(TEACHER)]


def pull(axis, cases) -> list:
    """How strongly the loss, and for one run each of its terms, raises the logits of a mixed image's two labels."""
    dashed, entries = (0, (3, 1.5)), []
    case = cases[0]
    if len(cases) == 1 and case.largest:
        for number, term in enumerate(case.terms):
            look = term_look(case, term)
            plot(axis, case.column(f"pull_{term}"), look.colour, look.marker, width=0.8, shift=number)
            plot(axis, case.column(f"pull_minor_{term}"), look.colour, look.marker, dashed, 0.8, number)
            entries.append(sample(term.upper(), look.colour, marker=look.marker, width=0.8))
        entries.append(sample("whole loss", width=1.6))
    plot_runs(axis, cases, "pull_whole", width=1.6)
    plot_runs(axis, cases, "pull_minor_whole", dashed, width=1.6)
    axis.axhline(0, color="black", linewidth=0.5, zorder=1)
    return [*entries, sample("larger label"), sample("other label", dashes=dashed)]


def student_and_teacher(column: str) -> Callable:
    """The panel of that column of student and teacher."""
    def draw(axis, cases) -> list:
        plot_runs(axis, cases, f"student_{column}")
        plot_runs(axis, cases, f"teacher_{column}", (0, (1, 1)), width=0.9)
        axis.set_ylim(0, 1.08 * axis.dataLim.y1 or 1)
        taught = any(case.has(f"teacher_{column}") for case in cases)
        return [sample("student"), *([sample("teacher", dashes=(0, (1, 1)), width=0.9)] if taught else [])]
    return draw


def cosine(axis, cases) -> list:
    """Whether the terms pull where cross-entropy pulls: 1 the same direction, 0 at right angles, -1 against it."""
    if len(cases) == 1:
        case, entries = cases[0], [sample("whole loss", width=1.6)]
        for number, term in enumerate(term for term in case.terms if case.has(f"cos_{term}")):
            look = term_look(case, term)
            plot(axis, case.column(f"cos_{term}"), look.colour, look.marker, shift=number)
            entries.insert(-1, sample(term.upper(), look.colour, marker=look.marker))
        plot_runs(axis, cases, "cos_whole", width=1.6)
    else:
        plot_runs(axis, cases, lambda case: f"cos_{case.largest}")
        entries = largest_terms(cases)
    axis.axhline(0, color="black", linewidth=0.5, zorder=1)
    axis.set_ylim(min(-0.05, axis.get_ylim()[0]), 1.05)
    return entries


class Panel(NamedTuple):
    """A panel by its title, drawn where a run has `column`, in which {largest} stands for its largest term."""
    title: str
    unit: str
    column: str
    draw: Callable
    by_epoch: bool = True


PANELS = (
    Panel("Accuracy", "accuracy (%)", "epoch", accuracy),
    Panel("Share of the logit gradient", "share (%)", "share_{largest}", shares),
    Panel("Parameter gradient before clipping", "norm", "grad_norm_mean", gradient_norm),
    Panel("Change of the weights by a step", "% of their norm", "update_ratio", step_size),
    Panel("Teacher on the student's images", "images it is right about (%)", "teacher_acc1", teacher, by_epoch=False),
    Panel("Pull on the labels of mixed images", "pull on a logit (nats)", "pull_whole", pull),
    Panel("Logit scale", "std. deviation", "student_scale", student_and_teacher("scale")),
    Panel("Entropy of the prediction", "entropy (nats)", "student_entropy", student_and_teacher("entropy")),
    Panel("Cosine with cross-entropy", "cosine", "cos_{largest}", cosine),
)


def draw_panels(figure: Figure, cases: list[Case], panels: list[Panel], columns: int) -> None:
    """The panels from the bottom of the page on: in rows, of which the first panel fills up the first one."""
    height, width, rows = figure.get_figheight(), (WIDTH - 2 * EDGE) / columns, math.ceil(len(panels) / columns)
    last = max(max(len(case.column("epoch")), int(case.run.epochs[-1])) for case in cases)
    spare = rows * columns - len(panels)
    for number, panel in enumerate(panels):
        row, column = divmod(number + spare if number else 0, columns)
        across = 1 if number else 1 + spare
        axis = figure.add_axes((
            (EDGE + column * width + LEFT) / WIDTH, (EDGE + (rows - row - 1) * PANEL + FOOT) / height,
            (across * width - LEFT - RIGHT) / WIDTH, (PANEL - HEAD - FOOT) / height))
        entries = panel.draw(axis, cases)
        if panel.by_epoch:
            axis.set(xlim=(0.5, last + 0.5), xlabel="epoch", ylabel=panel.unit)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        else:
            axis.set_xlabel(panel.unit)
        # Title and legend begin above the axis's labels.
        axis.legend(handles=entries, title=panel.title, ncols=2 * across,
                    loc="upper left", bbox_to_anchor=(-LEFT / (across * width - LEFT - RIGHT), 1 + HEAD / (PANEL - HEAD - FOOT)),
                    borderaxespad=0, alignment="left", title_fontproperties={"size": 8, "weight": "bold"})


def page(cases: list[Case]) -> Figure:
    """Words at the top; below, the panels that make sense, each in the colours of runs or terms.  The page is as high as they."""
    panels = [panel for panel in PANELS if any(case.has(panel.column.format(largest=case.largest)) for case in cases)]
    columns, lines = 3 if len(panels) > 6 else 2, lines_of(cases)
    height = 2 * EDGE + len(lines) * STEP + GAP + math.ceil(len(panels) / columns) * PANEL
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    write_words(figure, lines)
    draw_panels(figure, cases, panels, columns)
    return figure


# Writing

def spoken(cases: list[Case]) -> str:
    """The words of the page as plain text."""
    lines = list(title(cases))
    for heading, sentences in blocks(cases):
        lines += ["", heading, *(f"  {sentence}" for sentence in sentences)]
    return "\n".join(lines)


def main(arguments=None) -> None:
    parser = errors.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories; one of method kd is the control")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="a .png or .pdf; default: explain.png in the directory of the first run")

    def work(args) -> None:
        output, content = args.output or args.runs[0] / "explain.png", io.BytesIO()
        if output.suffix not in (".png", ".pdf"):
            raise Failure(USAGE, f"--output must end in .png or .pdf ({output})", "choose one of them")
        cases, metadata = read_cases(args.runs), {"CreationDate": None} if output.suffix == ".pdf" else {}
        with matplotlib.style.context(["default", STYLE]):
            page(cases).savefig(content, format=output.suffix[1:], metadata=metadata)
        files.write_atomic(output, content.getvalue())
        print(spoken(cases), f"\n{output}", sep="\n")

    errors.run(work, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without → still gets the words
    main()
