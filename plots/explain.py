"""One page on one or more runs (PNG or PDF): how they ended, their alarms, and the curves of what was logged.

    python plots/explain.py runs/v3-s1                        -> runs/v3-s1/explain.png
    python plots/explain.py runs/v3-s1 runs/v2-s1             two runs; the one of KD is the control of the other
    python plots/explain.py runs/v3-s1 --output v3.pdf

Verdict, alarms and advice are those of summary.json, and are printed too.  The curves are those of log.csv and
diagnostics.csv; docs/diagnostics.md explains the columns.  Colours are runs or, for a single run, the terms of its loss.  To add
a panel, add a line to PANELS.
"""
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
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python plots/explain.py`
from diagnostics.alarms import CLIPPED, SHARE, TEACHER, collapsed
from losses.methods import TERMS
from plots import make_figures
from plots.run_files import Run, control_of, read_columns, read_run, require
from rundir import errors, files
from rundir.errors import DATA, USAGE, Failure

TREATMENTS = {"all": "", "clean": "_clean", "policy": "_policy", "erased": "_erased", "mixup": "_mixup", "cutmix": "_cutmix"}
SERIES = make_figures.SERIES
LOOKS = (*(SERIES[name] for name in ("v2", "v3.1", "v1", "v4", "v3")), *make_figures.OTHERS)  # of runs
TERM_LOOKS = (SERIES["alone"], *(SERIES[name] for name in ("v3.1", "v2", "v1", "v4")))  # of cross-entropy and the other terms

STYLE = make_figures.STYLE | {"lines.markersize": 3.2, "legend.handlelength": 1.9, "legend.columnspacing": 0.9}
WIDTH, DPI = 8.3, 150  # inches: of the page
PANEL, LINE, EDGE = 2.2, 0.13, 0.3  # inches: the height of a panel and of a line of words, and the margin
CHARACTERS = 125  # of a line of words
DASHED, DOTTED = (0, (3, 1.5)), (0, (1, 1.5))


# Reading

@dataclass(frozen=True)
class Case:
    """A run on the page: `columns` are those of diagnostics.csv and val_acc1, float64 (epochs,) with nan for an empty cell;
    `status` is status.json, empty where there is none."""
    run: Run
    name: str
    look: make_figures.Series
    columns: dict
    status: dict

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
        """The split on which the accuracy of every epoch was measured."""
        return "test" if self.run.on_test else "validation"

    def column(self, name: str) -> np.ndarray:
        return self.columns.get(name, np.full(1, np.nan))

    def has(self, name: str) -> bool:
        """Whether there is a value other than 0."""
        return bool(np.nan_to_num(self.column(name)).any())

    def mean(self, name: str, suffix: str = "") -> float:
        """Over the epochs, each image the same; nan where there is none."""
        values, images = self.column(name + suffix), self.column("images" + suffix)
        there = np.isfinite(values) & (images > 0)
        return float(np.average(values[there], weights=images[there])) if there.any() else math.nan


def read_case(directory: Path, name: str, look: make_figures.Series) -> Case:
    run, log, path = read_run(directory), directory / "log.csv", directory / "diagnostics.csv"
    if not path.exists():
        raise Failure(DATA, f"no diagnostics.csv ({path})", "the run has no whole epoch, or was made before they were recorded; "
                      "train it again, or name another run")
    diagnostics, columns = read_columns(path, "images"), {}
    for source, table in ((path, diagnostics), (log, {"epoch": run.epochs, "val_acc1": run.val_acc1})):
        if not len(table["epoch"]) or table["epoch"][-1] > run.config["epochs"]:
            raise files.damaged(source, f"{len(table['epoch'])} epochs, of at most {run.config['epochs']}")
        for column, values in table.items():
            columns[column] = np.full(int(table["epoch"][-1]), math.nan)
            columns[column][table["epoch"].astype(int) - 1] = values
    status = files.read_json(directory / "status.json") or {}
    require(directory / "status.json", status, state=str | None, reason=str | None)
    return Case(run, name, look, columns, status)


def read_cases(directories: list[Path]) -> list[Case]:
    """Every run, with a name that tells it from the others, and its look."""
    names, looks = [directory.resolve().name for directory in directories], LOOKS
    if len(directories) > len(LOOKS) or len({directory.resolve() for directory in directories}) < len(directories):
        raise Failure(USAGE, f"{len(directories)} runs, of which one is named twice, or too many for a page "
                      f"({', '.join(map(str, directories))})", f"name each once, and at most {len(LOOKS)}")
    if len(set(names)) < len(names):
        names = list(map(str, directories))
    if len(directories) == 1:
        looks = (make_figures.Series("black", "solid", ""),)
    return [read_case(*each) for each in zip(directories, names, looks)]


# Words

def ending(case: Case) -> str:
    """How the run ended, and whether it is healthy."""
    summary, status, done = case.run.summary, case.status, f"epoch {case.run.epochs[-1]} of {case.run.config['epochs']}"
    if summary:
        return f"{summary['verdict']}, {summary.get('health') or 'made before alarms were recorded'}"
    if status.get("state") in ("failed", "stopped"):
        return f"{status['state']} after {done}: {status.get('reason')} (exit code {status.get('exit_code')})"
    return f"unfinished after {done}, " + (f"status {status.get('state')}" if status else "without status.json")


def sentences(case: Case, control: Case | None):
    """The comparison with the control, the accuracies, the largest term, alarms and advice."""
    summary, accuracy = case.run.summary or {}, case.run.val_acc1
    if control:
        theirs = control.run.val_acc1
        last, best = (f"{one:.1f} %, {abs(one - other):.1f} points {'below' if one < other else 'above'}"
                      for one, other in ((accuracy[-1], theirs[-1]), (accuracy.max(), theirs.max())))
        lead = "Collapsed against" if collapsed(accuracy[-1], theirs[-1], summary.get("val_images")) else "Against"
        yield f"{lead} the control {control.name}: last {case.measured} accuracy {last}; best {best}"
    yield (f"{case.measured.capitalize()} accuracy: at most {accuracy.max():.1f} % (epoch {case.run.epochs[accuracy.argmax()]}), "
           f"{accuracy[-1]:.1f} % in the last epoch ({case.run.epochs[-1]})")
    if case.largest:
        values, mean = case.column(f"share_{case.largest}"), case.mean(f"share_{case.largest}")
        yield (f"Largest term beside cross-entropy: {case.largest.upper()}, on average {100 * mean:.0f} % of the logit "
               f"gradient, at most {100 * np.nanmax(values):.0f} % (epoch {np.nanargmax(values) + 1})")
    for alarm in summary.get("alarms") or ():
        yield "Alarm: {name} {value:.3g}, limit {limit:.3g}: {text}".format_map(alarm)
    if summary.get("advice"):
        yield f"Advice: {summary['advice']}"


def words(cases: list[Case]) -> list[tuple[Case | None, list[str]]]:
    """Paragraphs, each of a heading and lines: which runs these are, and what is said of every run."""
    runs, several = [case.run for case in cases], len(cases) > 1
    controls = [next((other for other in cases if other.run is control_of(run, runs)), None) for run in runs]
    datasets = dict.fromkeys(make_figures.DATASETS.get(run.config["dataset"], run.config["dataset"]) for run in runs)
    networks = dict.fromkeys(f"{run.teacher} → {run.network}" if run.distilled else run.network for run in runs)
    about = [", ".join(datasets), ", ".join(networks)]
    if not several:
        about = [runs[0].method, *about, f"seed {runs[0].config['seed']}"]
    found = [(None, [", ".join(case.name for case in cases), "; ".join(about)])]
    for case, control in zip(cases, controls):
        role, seed = "control: " if case in controls else "", case.run.config["seed"]
        heading = f"{case.name} ({role}{case.run.method}, seed {seed}): {ending(case)}" if several else ending(case)
        heading, *said = (" ".join(line.split()) for line in (heading, *sentences(case, control)))
        found.append((case if several else None, [heading, *(f"  {line}" for line in said)]))
    return found


def write_words(figure: Figure, paragraphs) -> None:
    """Put the paragraphs on the page, from its top, and the colour and marker of a run beside its heading."""
    y, height = EDGE, figure.get_figheight()
    for case, lines in paragraphs:
        for number, line in enumerate(lines):
            y += LINE
            figure.text(2 * EDGE / WIDTH, 1 - y / height, line, fontsize=7.5, fontweight="normal" if number else "bold",
                        parse_math=False)  # a run may have a $ in its name
            if case and not number:
                figure.add_artist(Line2D([0.8 * EDGE / WIDTH, 1.7 * EDGE / WIDTH], [1 - (y - 0.04) / height] * 2, markevery=[0],
                                         color=case.look.colour, marker=case.look.marker))
        y += LINE


# Panels

def sample(text: str, colour="black", dashes="solid", marker="", width=1.1, **more) -> Line2D:
    """A line of a legend."""
    return Line2D([], [], color=colour, linestyle=dashes, marker=marker, linewidth=width, label=text, **more)


class Curve(NamedTuple):
    """A column by epoch; in it {term} is every term of a single run, and the largest one of each of several."""
    column: str
    text: str = ""
    dashes: str | tuple = "solid"
    width: float = 1.1


def plot(axis, values, look: make_figures.Series, dashes, width: float, shift: int) -> None:
    """A line by epoch from 1 on: gaps where values are nan, a marker now and then, and wherever a value stands alone; hollow
    markers on dashed lines."""
    there = np.concatenate(([False], np.isfinite(values), [False]))
    alone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])
    spacing = max(1, len(values) // 8)
    regular = range(shift % spacing, len(values), spacing) if look.marker else ()
    axis.plot(np.arange(1, len(values) + 1), values, color=look.colour, linestyle=dashes, linewidth=width,
              marker=look.marker or "o", fillstyle="full" if dashes == "solid" else "none",
              markevery=sorted({*regular, *map(int, alone)}))


def curves(*wanted: Curve, factor=1.0, limit: float | None = None, log=False) -> Callable:
    """The panel of these curves.  limit: of an alarm."""
    def draw(axis, cases) -> list:
        entries = []
        for curve in wanted:
            if curve.text and any(case.has(curve.column) for case in cases):
                entries.append(sample(curve.text, dashes=curve.dashes, width=curve.width))
            for number, case in enumerate(cases):
                by_term = "{term}" in curve.column
                for term in (case.terms if len(cases) == 1 else [case.largest]) if by_term else [""]:
                    look, values = case.look, case.column(curve.column.format(term=term))
                    if by_term and len(cases) == 1:
                        others = [name for name in case.terms if name != "ce"]
                        look = TERM_LOOKS[0 if term == "ce" else 1 + others.index(term) % (len(TERM_LOOKS) - 1)]
                    if np.isfinite(values).any():
                        plot(axis, factor * values, look, curve.dashes, curve.width, number)
                        entries += [sample(term.upper(), look.colour, marker=look.marker)] * by_term
        if limit:
            axis.axhline(limit, color="black", linestyle=DOTTED)
            entries.append(sample(f"limit {limit:g} %", dashes=DOTTED))
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        return entries
    return draw


def accuracy(axis, cases) -> list:
    """Validation accuracy, and that on training images without augmentation; where the best epoch and an early stop were."""
    measured, stop = " or ".join(dict.fromkeys(case.measured for case in cases)), []
    entries = curves(Curve("val_acc1", measured), Curve("train_acc1_clean", "clean training", DASHED, 0.8))(axis, cases)
    ring = {"marker": "o", "fillstyle": "none", "linestyle": "none"}
    entries.append(Line2D([], [], **ring, markersize=6, color="black", label="best epoch"))
    for case in cases:
        run, summary = case.run, case.run.summary or {}
        best = summary.get("best_epoch", run.epochs[run.val_acc1.argmax()])
        axis.plot(best, case.column("val_acc1")[best - 1], **ring, markersize=7, color=case.look.colour)
        if summary.get("stopped_early"):
            axis.plot(run.epochs[-1], run.val_acc1[-1], **make_figures.CROSS, color=case.look.colour)
            stop = [Line2D([], [], **make_figures.CROSS, color="white", label="early stop")]
    return entries + stop


def teacher(axis, cases) -> list:
    """What share of the student's images the teacher is right about, by what was done to them, over the run."""
    taught = [case for case in cases if case.has("teacher_acc1")]
    shown = {name: suffix for name, suffix in TREATMENTS.items() if any(case.has("teacher_acc1" + suffix) for case in taught)}
    for number, case in enumerate(taught):
        places = np.arange(len(shown)) + 0.8 * (number + 0.5) / len(taught) - 0.4
        colour = case.look.colour if len(cases) > 1 else "#888888"
        for column, face in (("teacher_acc1", {"facecolor": colour}), ("teacher_either", {"fill": False})):
            axis.barh(places, [case.mean(column, suffix) for suffix in shown.values()], 0.8 / len(taught), edgecolor="black",
                      linewidth=0.5, **face)
    axis.axvline(TEACHER, color="black", linestyle=DOTTED)
    axis.set_yticks(range(len(shown)), list(shown))
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    box = {"edgecolor": "black", "linewidth": 0.5}
    return [Patch(**box, facecolor="#888888", label="larger label"), Patch(**box, facecolor="none", label="either label"),
            sample(f"limit {TEACHER:g} %", dashes=DOTTED)]


def student_and_teacher(column: str) -> Callable:
    return curves(Curve(f"student_{column}", "student"), Curve(f"teacher_{column}", "teacher", (0, (1, 1)), 0.9))


# Title and unit; a column without which the panel is left out; how it is drawn.
PANELS = (
    ("Accuracy", "accuracy (%)", "epoch", accuracy),
    ("Share of the logit gradient", "share (%)", "share_{term}", curves(Curve("share_{term}"), factor=100, limit=100 * SHARE)),
    ("Gradient before clipping", "norm", "grad_norm_mean", curves(Curve("grad_norm_mean"), log=True)),
    ("Clipped steps", "share (%)", "clip_frac", curves(Curve("clip_frac"), factor=100, limit=100 * CLIPPED)),
    ("Change of the weights by a step", "% of their norm", "update_ratio", curves(Curve("update_ratio"), factor=100, log=True)),
    ("Teacher on the student's images", "images it is right about (%)", "teacher_acc1", teacher),
    ("Pull on mixed labels", "pull on a logit (nats)", "pull_whole",
     curves(Curve("pull_whole", "larger label"), Curve("pull_minor_whole", "other label", DASHED))),
    ("Logit scale", "std. deviation", "student_scale", student_and_teacher("scale")),
    ("Entropy of the prediction", "entropy (nats)", "student_entropy", student_and_teacher("entropy")),
    ("Cosine with cross-entropy", "cosine", "cos_{term}",
     curves(Curve("cos_{term}"), Curve("cos_whole", "whole loss", width=1.6))),
)


def page(cases: list[Case]) -> Figure:
    """Words at the top; below, the panels that make sense, each in the colours of runs or terms.  The page is as high as they."""
    panels = [panel for panel in PANELS if any(case.has(panel[2].format(term=case.largest)) for case in cases)]
    columns = 3 if len(panels) > 6 else 2
    rows = math.ceil(len(panels) / columns)
    wrapper = textwrap.TextWrapper(CHARACTERS, subsequent_indent="    ", break_on_hyphens=False)  # flags stay whole
    paragraphs = [(case, [piece for line in lines for piece in wrapper.wrap(line)]) for case, lines in words(cases)]
    height = rows * PANEL + LINE * sum(len(lines) + 1 for _, lines in paragraphs) + EDGE
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, rows * PANEL / height), w_pad=0.1, h_pad=0.08)
    write_words(figure, paragraphs)
    places = np.arange(rows * columns) - (rows * columns - len(panels))  # the first panel fills up the first row
    axes = figure.subplot_mosaic(places.clip(0).reshape(rows, columns).tolist())
    last = max(int(case.run.epochs[-1]) for case in cases)
    for (title, unit, _, draw), axis in zip(panels, axes.values()):
        axis.legend(handles=draw(axis, cases), title=title, title_fontproperties={"size": 8, "weight": "bold"}, alignment="left",
                    ncols=2, loc="lower left", bbox_to_anchor=(-0.2, 1), borderaxespad=0.3)
        if draw is teacher:
            axis.set_xlabel(unit)
        else:
            axis.set(xlim=(0.5, last + 0.5), xlabel="epoch", ylabel=unit)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    return figure


@matplotlib.style.context(["default", STYLE])
def write_page(directories: list[Path], output: Path) -> None:
    """Draw and write the page; say its words on stdout."""
    if output.suffix not in (".png", ".pdf"):
        raise Failure(USAGE, f"--output must end in .png or .pdf ({output})", "choose one of them")
    cases = read_cases(directories)
    make_figures.write_picture(page(cases), output, DPI)
    print(*("\n".join(lines) for _, lines in words(cases)), output, sep="\n\n")


def main(arguments=None) -> None:
    parser = errors.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories; one of method kd is the control")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="a .png or .pdf; default: explain.png in the directory of the first run")
    errors.run(lambda args: write_page(args.runs, args.output or args.runs[0] / "explain.png"), parser.parse_args(arguments))


if __name__ == "__main__":
    main()
