"""Saving and resuming of runs: search of the checkpoint, comparison of the flags, state.

last.pt has the whole state of a run and is replaced after every epoch; prev.pt is its predecessor.  A crash loses the current
epoch and the one being written; both are recomputed, bit for bit on a CPU.
"""
import sys
from dataclasses import asdict

import torch

from rundir import checkpoint
from rundir.checkpoint import on_cpu
from rundir.errors import CHECKPOINT, USAGE, Failure
from rundir.files import existing_digest, read_json, write_atomic
from rundir.identity import NON_EXPERIMENT_FLAGS, same_flag
from rundir.run_directory import EpochRow

MAY_CHANGE_ON_RESUME = NON_EXPERIMENT_FLAGS | {"epochs", "patience"}
DERIVED = {"script", "teacher_sha256", "processes"}  # entries of a configuration that are no flags


def read_run(path) -> dict:
    content = checkpoint.read(path)
    if content.get("kind") != "run":
        raise Failure(CHECKPOINT, f"not the state of a run ({path}: its kind is {content.get('kind')})", "name a run's last.pt")
    return content


def find(run, config: dict) -> dict | None:
    """The saved state to resume, None for a new run.  run: the entered RunDirectory.

    For a damaged last.pt, prev.pt is used, with a warning; a run is never silently restarted.
    Failure CHECKPOINT: no readable checkpoint.  Failure USAGE: flags of another experiment.
    """
    if run.last is None:
        return None
    if not run.last.exists() and not run.required:
        if not any((run / name).exists() for name in ("prev.pt", "log.csv", "summary.json")):
            print(f"nothing to continue in {run.path}: starting a new run")
            return None
    last, previous = run.last, run.last.with_name("prev.pt")
    try:
        saved = read_run(last)
    except Failure as damage:
        if last.name != "last.pt":
            raise
        try:
            saved = read_run(previous)
        except Failure:
            raise damage from None
        print(f"warning: {damage}; continuing with {previous}", file=sys.stderr)
        last = previous
    # Older runs have only the SHA-256 of the images, or nothing.
    initial = saved.setdefault("began", {"data_sha256": saved["data"]} if "data" in saved else {})
    resolved = read_json(last.with_name("config.json")) or {}  # of which --config gives a value in place of None
    config |= {name: None for name, value in config.items()
               if saved["config"].get(name, value) is None and value == resolved.get(name)}
    compare(run, saved["config"], config, initial)
    return saved | {"path": last, "has_summary": (run / "summary.json").exists()}


def compare(run, old: dict, new: dict, initial: dict) -> None:
    """Failure USAGE for flags of another experiment, with the differences.  initial: what a run records of its start, `began`."""
    def sha256_of(name):
        if name == "data_dir":
            return initial.get("data_sha256")  # compared when the images are loaded
        return new["teacher_sha256"] if name == "teacher_checkpoint" else existing_digest(new[name])

    changed = sorted(name for name in (old.keys() | new.keys()) - MAY_CHANGE_ON_RESUME
                     if not same_flag(name, initial | old, new, sha256_of))
    if new["epochs"] < old["epochs"]:
        changed.append("epochs")
    if not changed:
        return
    flags = {name: name if name in DERIVED else f"--{name.replace('_', '-')}" for name in changed}
    both = ", ".join(f"{flag} {old.get(name)} -> {new.get(name)}" for name, flag in flags.items())
    raise Failure(USAGE, f"these flags differ from those of the run to continue ({run.last.parent}: {both})",
                  "repeat its flags, or start another run in another --output")


def restore(run, saved: dict | None) -> int:
    """Restore `saved`, the result of `find` -> the next epoch.

    run: a training.run.Run, whose `update` and `stop` have state_dict() and load_state_dict() of plain types.
    All processes restore and save together; the main one writes.
    """
    if saved is None:
        return 1
    directory, is_main = run.directory, run.ranks.is_main
    print(f"continuing after epoch {saved['epoch']} ({saved['path']})")
    before, now = saved["config"]["epochs"], run.config["epochs"]
    if now > before and run.config["sched"] == "cosine" and is_main:
        print(f"warning: --epochs grows from {before} to {now}: the earlier epochs used the shorter cosine schedule, so the "
              "result differs from a run of this length", file=sys.stderr)
    before, now = saved["config"]["batch_size"], run.config["batch_size"]
    if now != before and is_main:  # with another number of processes
        print(f"warning: --batch-size per process changes from {before} to {now}: BatchNorm statistics differ, so the result "
              "differs from a run with a constant number of processes", file=sys.stderr)
    run.update.load_state_dict(saved["update"])
    run.stop.load_state_dict(saved["stop"])
    for device, set_state in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        states = saved["rng"].get(device, ())
        if run.ranks.rank < len(states) and (device == "cpu" or torch.cuda.is_initialized()):
            set_state(states[run.ranks.rank])
    directory.restore([EpochRow(**row) for row in saved["rows"]], saved.get("looked", []))
    if not is_main:
        return saved["epoch"] + 1
    if saved["path"].resolve() == directory.previous.resolve():
        directory.previous = None  # the damaged last.pt must not replace it
    if saved["best"]:  # last.pt has the same weights, and best.pt may be older
        checkpoint.write(directory / "best.pt", **saved["best"], state_dict=on_cpu(run.update.evaluated.state_dict()))
    elif not directory.continues:
        best = checkpoint.read(saved["path"].with_name("best.pt"))
        del best["sha256"]
        checkpoint.write(directory / "best.pt", **best)
    return saved["epoch"] + 1


def save(run, row: EpochRow, diagnostics_row: dict, metadata: dict | None) -> None:
    """Save an epoch in the background: last.pt, best.pt, then the tables.

    run: as in `restore`.  diagnostics_row: of diagnostics.csv.  metadata: of best.pt; None if the epoch is not the best.
    """
    directory = run.directory
    directory.rows.append(row)
    directory.diagnostics_rows.append(diagnostics_row)
    rng = {"cpu": run.ranks.gather(torch.get_rng_state())}
    if torch.cuda.is_initialized():
        rng["cuda"] = run.ranks.gather(torch.cuda.get_rng_state())
    if not run.ranks.is_main:
        return
    best = metadata and {"kind": "weights", **metadata, "epoch": row.epoch, "val_acc1": row.val_acc1, "test_acc1": None}
    content = on_cpu({
        "kind": "run", "epoch": row.epoch, "config": run.config, "began": run.began, "best": best,
        "rng": rng, "rows": list(map(asdict, directory.rows)), "looked": list(directory.diagnostics_rows),
        "update": run.update.state_dict(), "stop": run.stop.state_dict()})
    weights = on_cpu(run.update.evaluated.state_dict()) if best else None
    tables, previous, directory.previous = directory.tables(), directory.previous, directory / "prev.pt"

    def job():
        checkpoint.write(directory / "last.pt", previous=previous, **content)
        directory.saved = row.epoch
        if best:
            checkpoint.write(directory / "best.pt", **best, state_dict=weights)
        for name, table in tables.items():
            write_atomic(directory / name, table)

    run.writer(job)
