"""Saving and resuming of runs: search of the checkpoint, comparison of the flags, state.

last.pt has the whole state of a run and is replaced after every epoch; prev.pt is its predecessor.  A crash loses the current
epoch and the one being written; both are recomputed, bit for bit on a CPU.
"""
import sys
from dataclasses import asdict

import torch

from rundir import checkpoint
from rundir.checkpoint import on_cpu
from rundir.errors import CHECKPOINT, DATA, USAGE, Failure
from rundir.files import existing_digest, write_atomic
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
    compare(run, saved["config"], config, initial)
    return saved | {"path": last, "has_summary": (run / "summary.json").exists()}


def is_finished(saved: dict | None, epochs: int, stop) -> bool:
    """Whether a run is complete, including its test.  stop: its EarlyStop, with the present --patience."""
    if saved is None or not saved["has_summary"]:
        return False
    stop.load_state_dict(saved["stop"])
    return saved["epoch"] >= epochs or stop.stop


def compare(run, old: dict, new: dict, initial: dict) -> None:
    """Failure USAGE for flags of another experiment, with the differences.  initial: see State."""
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


def check_data(initial: dict, data) -> None:
    """Failure DATA for other images than at the start of the run: the validation split would differ."""
    if initial.setdefault("data_sha256", data.fingerprint) != data.fingerprint:
        raise Failure(DATA, f"images, labels or classes differ from those at the start of the run ({data.name})",
                      "restore them, or start another run in another --output")


class State:
    """The state of a run, saved after every epoch and restored from the result of `find`.

    config: flags and further entries that a resumed run must share.  initial: SHA-256 of the images and of the weights of --init
    or --student-init, and the number of threads.
    update, stop: objects with state_dict() and load_state_dict() of plain types.
    ranks: of training.distributed; all processes restore and save together, the main process writes.
    """

    def __init__(self, run, writer: checkpoint.Writer, config: dict, initial: dict, *, update, stop, ranks):
        self.run, self.writer, self.config, self.initial = run, writer, config, initial
        self.update, self.stop, self.ranks = update, stop, ranks
        self.previous = run / "prev.pt"

    def restore(self, saved: dict | None) -> int:
        """Restore `saved`, if any; returns the next epoch."""
        if saved is None:
            return 1
        print(f"continuing after epoch {saved['epoch']} ({saved['path']})")
        before, now = saved["config"]["epochs"], self.config["epochs"]
        if now > before and self.config["sched"] == "cosine" and self.ranks.is_main:
            print(f"warning: --epochs grows from {before} to {now}: the earlier epochs used the shorter cosine schedule, so the "
                  "result differs from a run of this length", file=sys.stderr)
        before, now = saved["config"]["batch_size"], self.config["batch_size"]
        if now != before and self.ranks.is_main:  # with another number of processes
            print(f"warning: --batch-size per process changes from {before} to {now}: BatchNorm statistics differ, so the result "
                  "differs from a run with a constant number of processes", file=sys.stderr)
        self.update.load_state_dict(saved["update"])
        self.stop.load_state_dict(saved["stop"])
        for device, set_state in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
            states = saved["rng"].get(device, ())
            if self.ranks.rank < len(states) and (device == "cpu" or torch.cuda.is_initialized()):
                set_state(states[self.ranks.rank])
        self.run.restore([EpochRow(**row) for row in saved["rows"]], saved.get("looked", []))
        if not self.ranks.is_main:
            return saved["epoch"] + 1
        if saved["path"].resolve() == self.previous.resolve():
            self.previous = None  # the damaged last.pt must not replace it
        if saved["best"]:  # last.pt has the same weights, and best.pt may be older
            checkpoint.write(self.run / "best.pt", **saved["best"], state_dict=on_cpu(self.update.evaluated.state_dict()))
        elif not self.run.continues:
            best = checkpoint.read(saved["path"].with_name("best.pt"))
            del best["sha256"]
            checkpoint.write(self.run / "best.pt", **best)
        return saved["epoch"] + 1

    def save(self, row: EpochRow, diagnostics_row: dict, metadata: dict | None) -> None:
        """Save an epoch in the background: last.pt, best.pt, then the tables.

        diagnostics_row: of diagnostics.csv.  metadata: of best.pt; None if the epoch is not the best.
        """
        self.run.rows.append(row)
        self.run.diagnostics_rows.append(diagnostics_row)
        rng = {"cpu": self.ranks.gather(torch.get_rng_state())}
        if torch.cuda.is_initialized():
            rng["cuda"] = self.ranks.gather(torch.cuda.get_rng_state())
        if not self.ranks.is_main:
            return
        best = metadata and {"kind": "weights", **metadata, "epoch": row.epoch, "val_acc1": row.val_acc1, "test_acc1": None}
        content = on_cpu({
            "kind": "run", "epoch": row.epoch, "config": self.config, "began": self.initial, "best": best,
            "rng": rng, "rows": list(map(asdict, self.run.rows)), "looked": list(self.run.diagnostics_rows),
            "update": self.update.state_dict(), "stop": self.stop.state_dict()})
        weights = on_cpu(self.update.evaluated.state_dict()) if best else None
        tables, previous, self.previous = self.run.tables(), self.previous, self.run / "prev.pt"

        def job():
            checkpoint.write(self.run / "last.pt", previous=previous, **content)
            self.run.saved = row.epoch
            if best:
                checkpoint.write(self.run / "best.pt", **best, state_dict=weights)
            for name, table in tables.items():
                write_atomic(self.run / name, table)

        self.writer(job)
