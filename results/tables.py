"""Two tables of many runs, small enough to keep: runs.csv, one row per run, and epochs.csv, one row per run and epoch.

    python results/tables.py runs/ablation-small/high results/ablation-small/high

runs.csv has the run's name, its cell (the name without the seed), its seed, what differs in config.json and env.json, and
summary.json.  settings.json has what is equal for all runs.  epochs.csv has log.csv and diagnostics.csv.  Values are copied as
they are, without empty columns.  A run that diverged has the verdict "diverged" and no accuracy.  Unfinished runs are left out.
"""
import argparse
import csv
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from rundir.errors import DIVERGED
from rundir.files import as_csv, read_json, write_atomic, write_json

OF_THE_PLACE = ("output", "resume", "overwrite", "dry_run", "debug")  # flags that say nothing about the result


def read_csv(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def cell(value) -> str:
    """As JSON has it, but text without quotes and None as an empty cell."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def write_csv(path: Path, rows: list[dict]) -> None:
    """With the columns that are not empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in names if any(row.get(name, "") != "" for row in rows)]
    write_atomic(path, as_csv(names, [{name: row.get(name) for name in names} for row in rows]))


def collect(runs: Path, output: Path) -> bool:
    """Write runs.csv, epochs.csv and settings.json of the runs in a directory, if any of them has ended."""
    ended, epochs = {}, []
    for path in sorted(config.parent for config in runs.glob("*/config.json")):
        flags, summary, status = (read_json(path / f"{name}.json") or {} for name in ("env", "summary", "status"))
        if not summary and status.get("exit_code") == DIVERGED:
            summary = {"verdict": "diverged"}
        if not summary:
            continue
        flags = {name: value for name, value in (flags | read_json(path / "config.json")).items() if name not in OF_THE_PLACE}
        if "alarms" in summary:
            summary["alarms"] = {alarm["name"]: alarm["value"] for alarm in summary["alarms"]}
        ended[path.name] = flags, {name: value for name, value in summary.items() if name not in flags}
        diagnostics = {row["epoch"]: row for row in read_csv(path / "diagnostics.csv")}
        epochs += [{"run": path.name} | row | diagnostics.get(row["epoch"], {}) for row in read_csv(path / "log.csv")]
    if not ended:
        return False
    values = {name: [flags.get(name) for flags, _ in ended.values()] for flags, _ in ended.values() for name in flags}
    settings = {name: first for name, (first, *others) in values.items()
                if name != "seed" and all(other == first for other in others)}
    write_json(output / "settings.json", settings)
    write_csv(output / "epochs.csv", epochs)
    write_csv(output / "runs.csv", [
        {"run": run, "cell": re.sub(r"-s\d+$", "", run), "seed": flags["seed"]}
        | {name: cell(value) for name, value in (flags | summary).items() if name not in settings}
        for run, (flags, summary) in ended.items()])
    return True


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, help="the directory of the run directories")
    parser.add_argument("output", type=Path, help="where to write")
    args = parser.parse_args(arguments)
    if not collect(args.runs, args.output):
        parser.exit(4, f"error: no runs that have ended ({args.runs}). name the directory that holds run directories\n")


if __name__ == "__main__":
    main()
