"""Reads the files of run directories for figures: config.json, summary.json, status.json, log.csv, diagnostics.csv.

A file that is damaged or lacks what a figure needs is a Failure DATA that names it.
"""
import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rundir.files import damaged, read_json
from rundir.identity import BEFORE


@dataclass(frozen=True)
class Run:
    """One run directory: `epochs` int64 (E,), `val_acc1` float64 (E,) in percent, `summary` None while the run is unfinished."""
    path: Path
    config: dict
    epochs: np.ndarray
    val_acc1: np.ndarray
    summary: dict | None

    @property
    def distilled(self) -> bool:
        return self.config["script"] == "distill"

    @property
    def network(self) -> str:
        """The network that was trained."""
        return self.config["student" if self.distilled else "model"]

    @property
    def teacher(self) -> str:
        """The teacher's network; of a teacher's own run, itself."""
        return self.config["teacher" if self.distilled else "model"]

    @property
    def on_test(self) -> bool:
        """Whether `val_acc1` was measured on the test set."""
        return self.summary["selected_on"].startswith("test") if self.summary else self.config.get("val_size") == 0


SETTING = ("dataset", "student", "teacher", "teacher_sha256", "image_size", "val_size", "crop", "crop_scale", "crop_ratio",
           "flip", "policy", "random_erasing", "mixup", "cutmix", "mix_prob")


def control_of(run: Run, runs: list[Run]) -> Run | None:
    """The KD run beside it: the first of `runs` with the same teacher, network and augmented images, if possible the same seed.

    None for that run itself, and for a run without a teacher.
    """
    alike = [other for other in runs if other.config.get("method") == "kd" and all(
        (BEFORE | other.config).get(name) == (BEFORE | run.config).get(name) for name in SETTING)]
    same_seed = [other for other in alike if other.config["seed"] == run.config["seed"]]
    found = next(iter(same_seed + alike), None)
    return found if run.distilled and found is not run else None


def require(path: Path, content: dict, optional=False, **kinds) -> None:
    """Every key of `kinds` must be in `content`, read from `path`, with a value of that type; a float must be finite.

    optional: it may be missing, or None.
    """
    if not isinstance(content, dict):
        raise damaged(path, f"{content!r} is not an object")
    for key, kind in kinds.items():
        value = content.get(key)
        wrong = type(value) not in ((int, float) if kind is float else (kind,))
        if (wrong or isinstance(value, float) and not math.isfinite(value)) and not (optional and value is None):
            raise damaged(path, f"{key} is {value!r}")


def read_columns(path: Path, needed: str) -> dict[str, np.ndarray]:
    """Every column of log.csv or diagnostics.csv by name, float64 (rows,): nan for a cell that is empty or not finite.

    The epochs must be whole and rise.  needed: a column that must be there.
    """
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.reader(file)
            names = next(table, [])
            if missing := {"epoch", needed}.difference(names):
                raise ValueError(f"no column {min(missing)}")
            for cells in table:
                try:
                    row = dict(zip(names, (float(cell or "nan") for cell in cells), strict=True))
                except ValueError as reason:
                    raise ValueError(f"line {table.line_num}: {reason}") from None
                if not row["epoch"].is_integer() or row["epoch"] <= (rows[-1]["epoch"] if rows else 0):
                    raise ValueError(f"line {table.line_num}: epoch {row['epoch']}")
                rows.append(row)
    except (OSError, ValueError, csv.Error) as reason:
        raise damaged(path, reason) from None
    cells = np.array([[*row.values()] for row in rows]).reshape(len(rows), len(names))
    return dict(zip(names, np.where(np.isfinite(cells), cells, np.nan).T))


def read_run(directory: Path) -> Run:
    path, log = directory / "config.json", directory / "log.csv"
    config = read_json(path)
    if config is None:
        raise damaged(path, "no such file")
    require(path, config, script=str, dataset=str, epochs=int, seed=int)
    require(path, config, optional=True, experiment=str, clip_grad=float)
    distilled = config["script"] == "distill"
    if distilled:
        require(path, config, teacher=str, student=str, method=str)
        for key in ("method_in_tables", "method_in_figures"):  # a run from before they were recorded has its method's name
            config.setdefault(key, config["method"].upper())
        require(path, config, method_in_tables=str, method_in_figures=str)
    else:
        require(path, config, model=str)
    columns = read_columns(log, "val_acc1")
    epochs, val_acc1 = columns["epoch"].astype(int), columns["val_acc1"]
    if bad := [f"epoch {epoch}: val_acc1 {value}" for epoch, value in zip(epochs, val_acc1) if not 0 <= value <= 100]:
        raise damaged(log, bad[0])

    path = directory / "summary.json"
    if (summary := read_json(path)) is not None:
        require(path, summary, test_acc1_last=float, test_acc1_best=float, best_epoch=int, params=int, flops=float, wall_s=float,
                stopped_early=bool, selected_on=str, verdict=str)
        if distilled:
            require(path, summary, teacher_test_acc1=float, retention=float, compression=float)
        if summary["best_epoch"] not in epochs:
            raise damaged(log, f"no row of epoch {summary['best_epoch']}, the best one by summary.json")
    return Run(directory, config, epochs, val_acc1, summary)
