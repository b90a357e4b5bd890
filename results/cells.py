"""Cells of a sweep, read from its tables: runs that differ in the seed alone, and the control of each."""
import csv
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from cli.sweep_table import spread
from diagnostics.alarms import collapsed
from plots import make_figures
from plots.run_files import is_plain

AUGMENTATION = {"policy": "AutoAugment", "random_erasing": "Random Erasing", "mix_prob": "Mixup/CutMix"}


@dataclass
class Cell:
    """Runs that differ in the seed alone.  flags: of one.  runs: by seed, rows of runs.csv with their rows of epochs.csv as
    `epochs` and validation accuracies as `val`, without those that diverged.  diverged: how many did.  control: a plain
    KD with the same teacher and augmentation; None for that cell itself and for one without a teacher."""
    flags: dict
    runs: dict
    diverged: int = 0
    control: "Cell | None" = None

    @property
    def accuracy(self) -> float | None:
        """Mean test accuracy in percent."""
        return spread([run["test_acc1_best"] for run in self.runs.values()])[0]

    @property
    def fell(self) -> dict[int, bool]:
        """By seed, whether the run collapsed: against the control or, where there is none, its own best epoch."""
        beside = self.control.runs if self.control else {}
        return {seed: collapsed(run["val"][-1], beside[seed]["val"][-1] if seed in beside else max(run["val"]))
                for seed, run in self.runs.items()}

    @property
    def ends(self) -> dict[str, int]:
        """How many runs there are, how many of them collapsed, and how many diverged."""
        return {"runs": len(self.runs) + self.diverged, "collapsed": sum(self.fell.values()), "diverged": self.diverged}

    @property
    def outcome(self) -> str:
        """Mean accuracy, and how many runs ended badly, in words."""
        parts = [f"{self.accuracy:.1f} %"] if self.runs else []
        runs, *bad = self.ends.items()
        return ", ".join(parts + [f"{count} of {runs[1]} {how}" for how, count in bad if count])

    @property
    def headings(self) -> tuple[str, str]:
        """Data, networks and epochs; optimizer and learning rate."""
        dataset = make_figures.DATASETS.get(self.flags["dataset"], self.flags["dataset"])
        return ("{0}, {teacher} → {student}, {epochs} epochs".format(dataset, **self.flags),
                f"{self.flags['opt'].upper()}, learning rate {self.flags['lr']:g}")

    def by_epoch(self, column: str) -> tuple[list[int], list[float]]:
        """Epochs, and at each the mean over the runs that have a value there."""
        rows = [row for run in self.runs.values() for row in run["epochs"] if row.get(column) is not None]
        epochs = sorted({row["epoch"] for row in rows})
        return epochs, [fmean(row[column] for row in rows if row["epoch"] == epoch) for epoch in epochs]


def read_table(path: Path) -> list[dict]:
    """Rows with numbers and truth values as such, and None for an empty cell."""
    def value(text: str):
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text

    return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(path.read_text("utf-8").splitlines())]


@cache
def read_sweep(directory: Path) -> dict[str, Cell]:
    shared, epochs, cells = json.loads((directory / "settings.json").read_text()), {}, {}
    for row in read_table(directory / "epochs.csv"):
        epochs.setdefault(row["run"], []).append(row)
    for run in read_table(directory / "runs.csv"):
        cell = cells.setdefault(re.sub("(patience|clip-grad)-0_", "", run["cell"]), Cell(shared | run, {}))
        if run["verdict"] == "diverged":
            cell.diverged += 1
        else:
            rows = epochs[run["run"]]
            cell.runs[run["seed"]] = run | {"epochs": rows, "val": [row["val_acc1"] for row in rows]}
    plain = [cell for cell in cells.values() if cell.flags["method"] == "kd" and is_plain(cell.flags)]
    plain.sort(key=lambda kd: kd.flags["clip_grad"], reverse=True)  # of several, that of the study
    for cell in cells.values():
        found = next((kd for kd in plain if all(
            kd.flags.get(name) == cell.flags.get(name) for name in ("teacher_sha256", *AUGMENTATION))), None)
        cell.control = None if found is cell else found
    return cells


def pairs_of(one: Cell, other: Cell) -> list[float]:
    """The differences in accuracy over the common seeds, in percentage points."""
    return [run["test_acc1_best"] - other.runs[seed]["test_acc1_best"] for seed, run in one.runs.items() if seed in other.runs]
