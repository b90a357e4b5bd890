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
from pathlib import Path

OF_THE_PLACE = ("output", "resume", "overwrite", "dry_run", "debug")  # flags that say nothing about the result
DIVERGED = 6  # exit code


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def read_csv(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def cell(value) -> str:
    """As JSON has it, but text without quotes and None as an empty cell."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def write_csv(path: Path, rows: list[dict]) -> None:
    """With the columns that are not empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in names if any(row.get(name, "") != "" for row in rows)]
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, names, lineterminator="\n", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def collect(runs: Path, output: Path) -> None:
    """Write runs.csv, epochs.csv and settings.json of the runs in a directory."""
    ended, epochs = {}, []
    for path in sorted(config.parent for config in runs.glob("*/config.json")):
        summary = read_json(path / "summary.json")
        if not summary and read_json(path / "status.json").get("exit_code") == DIVERGED:
            summary = {"verdict": "diverged"}
        if not summary:
            continue
        flags = read_json(path / "env.json") | read_json(path / "config.json")
        flags = {name: value for name, value in flags.items() if name not in OF_THE_PLACE}
        if "alarms" in summary:
            summary["alarms"] = {alarm["name"]: alarm["value"] for alarm in summary["alarms"]}
        ended[path.name] = flags, {name: value for name, value in summary.items() if name not in flags}
        looked = {row["epoch"]: row for row in read_csv(path / "diagnostics.csv")}
        epochs += [{"run": path.name} | row | looked.get(row["epoch"], {}) for row in read_csv(path / "log.csv")]
    names = dict.fromkeys(name for flags, _ in ended.values() for name in flags)
    settings = {}
    for name in names:
        first, *others = (flags.get(name) for flags, _ in ended.values())
        if name != "seed" and all(other == first for other in others):
            settings[name] = first
    output.mkdir(parents=True, exist_ok=True)
    (output / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_csv(output / "epochs.csv", epochs)
    write_csv(output / "runs.csv", [
        {"run": run, "cell": re.sub(r"-s\d+$", "", run), "seed": flags["seed"]}
        | {name: cell(value) for name, value in (flags | summary).items() if name not in settings}
        for run, (flags, summary) in ended.items()])


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, help="the directory of the run directories")
    parser.add_argument("output", type=Path, help="where to write")
    args = parser.parse_args(arguments)
    if not any(args.runs.glob("*/config.json")):
        parser.exit(4, f"error: no runs ({args.runs}). name the directory that holds run directories\n")
    collect(args.runs, args.output)


if __name__ == "__main__":
    main()
