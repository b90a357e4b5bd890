"""Reads the files of run directories for figures: config.json, summary.json, log.csv, diagnostics.csv.

A file that is damaged or lacks what a figure needs is a Failure DATA that names it.
"""
import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rundir.errors import DIVERGED
from rundir.files import damaged, read_json
from rundir.identity import BEFORE

NUMBER = int | float
SUMMARY = {"test_acc1_last": NUMBER, "test_acc1_best": NUMBER, "best_epoch": int, "params": int, "flops": NUMBER,
           "wall_s": NUMBER, "stopped_early": bool, "selected_on": str, "verdict": str, "health": str | None,
           "alarms": list | None, "advice": str | None}
ALARM = {"name": str, "value": NUMBER, "limit": NUMBER, "text": str}
SETTING = ("dataset", "student", "teacher", "teacher_sha256", "image_size", "val_size", "crop", "crop_scale", "crop_ratio",
           "flip", "policy", "random_erasing", "mixup", "cutmix", "mix_prob", "class_weights")
PLAIN = {"ce_weight": None, "kl": "forward", "standardize": False, "loss_scale": 1.0, "match_norm": "none"}  # of a KD: as usual


@dataclass(frozen=True)
class Run:
    """One run directory: `epochs` int64 (E,), `val_acc1` float64 (E,) in percent.

    summary: None while the run is unfinished, and if it diverged.
    """
    path: Path
    config: dict
    epochs: np.ndarray
    val_acc1: np.ndarray
    summary: dict | None
    diverged: bool = False

    @property
    def distilled(self) -> bool:
        return self.config["script"] == "distill"

    @property
    def network(self) -> str:
        return self.config["student" if self.distilled else "model"]

    @property
    def teacher(self) -> str:
        """The teacher's network; of a teacher's own run, itself."""
        return self.config["teacher" if self.distilled else "model"]

    @property
    def method(self) -> str:
        return self.config["method_in_tables"] if self.distilled else "labels only"

    @property
    def on_test(self) -> bool:
        return self.summary["selected_on"].startswith("test") if self.summary else self.config.get("val_size") == 0


def control_of(run: Run, runs: list[Run]) -> Run | None:
    """The KD run beside it: the first of `runs` with the same teacher, network, augmented images and class weights.

    If possible a plain one, and then with the same seed.  None for that run itself, and for a run without a teacher.
    """
    alike = [other for other in runs if other.config.get("method") == "kd" and all(
        (BEFORE | other.config).get(name) == (BEFORE | run.config).get(name) for name in SETTING)]
    found = min(alike, key=lambda other: (not is_plain(other.config), other.config["seed"] != run.config["seed"]), default=None)
    return found if run.distilled and found is not run else None


def is_plain(config: dict) -> bool:
    """Whether a run of KD with these flags may be a control; runs of earlier versions lack some of the flags."""
    return all(config.get(name) in (value, None) for name, value in PLAIN.items())


def require(path: Path, content: dict, **kinds) -> None:
    """Every key of `kinds` must be in `content`, read from `path`, with a value of that type, or may be missing for `| None`."""
    for key, kind in kinds.items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, float) and not math.isfinite(value):
            raise damaged(path, f"{key} is {value!r}")


def read_columns(path: Path, needed: str) -> dict[str, np.ndarray]:
    """Every column of log.csv or diagnostics.csv by name, float64 (rows,): nan for a cell that is empty or not finite.

    The epochs must be whole and rise.  needed: a column that must be there.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            names, *rows = csv.reader(file)
        if missing := {"epoch", needed}.difference(names):
            raise ValueError(f"no column {min(missing)}")
        cells = np.array([[float(cell or "nan") for cell in row] for row in rows]).reshape(len(rows), len(names))
        columns = dict(zip(names, np.where(np.isfinite(cells), cells, np.nan).T))
        if np.any(columns["epoch"] % 1) or np.any(np.diff(columns["epoch"], prepend=0) <= 0):
            raise ValueError("its epochs do not rise")
    except (OSError, ValueError, csv.Error) as reason:
        raise damaged(path, reason) from None
    return columns


def read_run(directory: Path) -> Run:
    path, log = directory / "config.json", directory / "log.csv"
    config = read_json(path)
    if config is None:
        raise damaged(path, "no such file")
    require(path, config, script=str, dataset=str, epochs=int, seed=int, experiment=str | None, clip_grad=NUMBER | None)
    distilled = config["script"] == "distill"
    require(path, config, **dict.fromkeys(("teacher", "student", "method") if distilled else ("model",), str))
    for key in ("method_in_tables", "method_in_figures") * distilled:  # a run from before they were recorded lacks them
        config.setdefault(key, config["method"].upper())
    columns = read_columns(log, "val_acc1")
    epochs, val_acc1 = columns["epoch"].astype(int), columns["val_acc1"]
    if not all((0 <= val_acc1) & (val_acc1 <= 100)):
        raise damaged(log, "val_acc1 is no percentage in every epoch")
    path = directory / "summary.json"
    if (summary := read_json(path)) is not None:
        of_teacher = dict.fromkeys(("teacher_test_acc1", "retention", "compression") * distilled, NUMBER)
        require(path, summary, **SUMMARY, **of_teacher)
        for alarm in summary.get("alarms") or ():
            require(path, alarm if isinstance(alarm, dict) else {}, **ALARM)
        if summary["best_epoch"] not in epochs:
            raise damaged(log, f"no row of epoch {summary['best_epoch']}, the best one by summary.json")
    status = read_json(directory / "status.json") or {}
    return Run(directory, config, epochs, val_acc1, summary, summary is None and status.get("exit_code") == DIVERGED)
