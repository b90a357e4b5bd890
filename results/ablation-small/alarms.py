"""Sensitivity and specificity of the alarms for a collapse, from the tables of the sweeps: printed, and written to alarms.csv.

    python results/ablation-small/alarms.py

Sensitivity is the share of the collapsed runs in which an alarm is raised, specificity that of the others in which it is not.
The alarms are those in runs.csv.  Collapsed is as in figures.py.

Runs without a teacher are left out: they have no control.  Half of the cells calibrates: `calibrated`, a limit, is the 90th
percentile of its runs that did not collapse.  The other half is held back.  A control cannot fall below itself, and at lower
learning rates few runs collapse: so the runs at 1.6 that have a control are also counted on their own.
"""
import argparse
import hashlib
import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's root
from diagnostics import alarms
from plots.run_files import PLAIN
from results.cells import read_sweep
from results.tables import write_csv

FOLDER = Path(__file__).parent
HALVES = ("calibrating", "held back")
# A cell's settings, in all sweeps: the seeds of a cell, and of the same with more epochs, are in the same half.
SETTINGS = ("lr", "opt", "clip_grad", "teacher_checkpoint", "method", "alpha", "beta", "ce_weight", "standardize", "mixed_target",
            "dkd_warmup", "policy", "random_erasing", "mix_prob", "loss_scale", "match_norm")
SWEEPS = "findings", "high", "high-long", "recipe", "recipe-long", "usual"
GROUPS = ("all", "learning rate 1.6, with a control")
CLASSES = 100


def read_runs() -> list[dict]:
    """A dict per run: its half and groups, whether it collapsed, its alarms, and the values of those that are calibrated."""
    runs = []
    for cell in (cell for sweep in SWEEPS for cell in read_sweep(FOLDER / sweep).values() if cell.flags.get("teacher")):
        recipe = SimpleNamespace(**cell.flags)
        settings = json.dumps([cell.flags.get(name, PLAIN.get(name)) for name in SETTINGS])
        half = HALVES[int(hashlib.sha256(settings.encode()).hexdigest()[0], 16) % 2]  # whatever other cells there are
        for seed, run in cell.runs.items():
            rows = [SimpleNamespace(**row) for row in run["epochs"]]
            move, *_ = max(alarms.moves(recipe, rows, run["epochs"]), default=(None,))
            runs.append({
                "half": half, "groups": GROUPS[:1 + (cell.control is not None and recipe.lr == 1.6)],
                "collapsed": cell.fell[seed], "alarms": run["alarms"], "move": move, "dead": rows[-1].dead_classes / CLASSES})
    return runs


def count(alarm: str, runs: list[dict]) -> dict:
    raised, silent = ([(alarm in run["alarms"]) == collapsed for run in runs if run["collapsed"] == collapsed]
                      for collapsed in (True, False))
    return {"raised": sum(raised), "collapsed": len(raised), "sensitivity": round(sum(raised) / len(raised), 3),
            "silent": sum(silent), "others": len(silent), "specificity": round(sum(silent) / len(silent), 3)}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=FOLDER / "alarms.csv", help="default: beside this script")
    output, runs, rows = parser.parse_args(arguments).output, read_runs(), []
    names = sorted({name for run in runs for name in run["alarms"]})
    for half, group, alarm in product(HALVES, GROUPS, names):
        chosen = [run for run in runs if run["half"] == half and group in run["groups"]]
        rows.append({"half": half, "runs": group, "alarm": alarm} | count(alarm, chosen))
        if (half, group) == (HALVES[0], GROUPS[0]) and alarm in ("move", "dead"):
            values = [run[alarm] for run in chosen if not run["collapsed"] and run[alarm] is not None]
            rows[-1]["calibrated"] = round(float(np.quantile(values, 0.9, method="higher")), 4)
    write_csv(output, rows)
    print(output.read_text(), end="")


if __name__ == "__main__":
    main()
