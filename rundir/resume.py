"""Resuming: finding the state of a run, comparing its flags, saving and restoring it.

last.pt holds the whole state of a run.  It is replaced after every epoch; prev.pt is the one before.  A crash loses the epoch in
flight and the one being written; both are computed again, to the same bits on a CPU.
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
DERIVED = {"script", "teacher_sha256", "processes"}  # of a configuration: no flags


def read_run(path) -> dict:
    """The content of a last.pt or prev.pt."""
    content = checkpoint.read(path)
    if content.get("kind") != "run":
        raise Failure(CHECKPOINT, f"not the state of a run ({path}: its kind is {content.get('kind')})", "name a run's last.pt")
    return content


def find(run, config: dict) -> dict | None:
    """The state that `--resume` continues, None to start; prints which.

    run: the entered RunDirectory.  A damaged last.pt gives way to prev.pt, with a warning; a run is never silently started
    again.  Failure CHECKPOINT: nothing readable.  Failure USAGE: flags that make another experiment than the run's.
    """
    if run.last is None:
        return None
    if not run.last.exists() and not run.required:
        left = [name for name in ("prev.pt", "log.csv", "summary.json") if (run / name).exists()]
        if not left:
            print(f"nothing to continue in {run.path}: a new run starts")
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
    # A run from before this was kept knew its images alone, if at all.
    began = saved.setdefault("began", {"data_sha256": saved["data"]} if "data" in saved else {})
    compare(run, saved["config"], config, began)
    return saved | {"path": last, "has_summary": (run / "summary.json").exists()}


def is_finished(saved: dict | None, epochs: int, stop) -> bool:
    """Whether a run has nothing left to do, not even its test.  stop: its EarlyStop, with the patience of now."""
    if saved is None or not saved["has_summary"]:
        return False
    stop.load_state_dict(saved["stop"])
    return saved["epoch"] >= epochs or stop.stop


def compare(run, old: dict, new: dict, began: dict) -> None:
    """Refuse flags that make another experiment than the run's; prints both in a table.  began: see State."""
    def sha256_of(name):
        if name == "data_dir":
            return began.get("data_sha256")  # compared when the images are loaded
        return new["teacher_sha256"] if name == "teacher_checkpoint" else existing_digest(new[name])

    changed = sorted(name for name in (old.keys() | new.keys()) - MAY_CHANGE_ON_RESUME
                     if not same_flag(name, began | old, new, sha256_of))
    if new["epochs"] < old["epochs"]:
        changed.append("epochs")
    if not changed:
        return
    rows = [("flag", "its run", "now")]
    rows += [(name if name in DERIVED else f"--{name.replace('_', '-')}", str(old.get(name)), str(new.get(name)))
             for name in changed]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(*("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows), sep="\n")
    both = ", ".join(f"{name} {before} -> {now}" for name, before, now in rows[1:])
    raise Failure(USAGE, f"these flags differ from those of the run to continue ({run.last.parent}: {both})",
                  "repeat its flags, or start another run in another --output")


def check_data(began: dict, data) -> None:
    """Refuse to go on with other images than the run began with: another split would be drawn from them."""
    if began.setdefault("data_sha256", data.fingerprint) != data.fingerprint:
        raise Failure(DATA, f"the images, labels or classes are not those that the run began with ({data.name})",
                      "bring them back, or start another run in another --output")


class State:
    """The state of a run: saved after every epoch, restored from the result of `find`.

    config: flags, and what else must be the same in a resumed run.  began: the SHA-256 of its images and of the weights of --init
    or --student-init, and the number of threads.
    update, stop: have state_dict() and load_state_dict() of plain types.
    ranks: training.distributed's; all processes restore and save together, the first one writes.
    """

    def __init__(self, run, writer: checkpoint.Writer, config: dict, began: dict, *, update, stop, ranks):
        self.run, self.writer, self.config, self.began = run, writer, config, began
        self.update, self.stop, self.ranks = update, stop, ranks
        self.previous = run / "prev.pt"

    def restore(self, saved: dict | None) -> int:
        """Go back to the end of the epoch that was saved -> the epoch to run next."""
        if saved is None:
            return 1
        print(f"continuing after epoch {saved['epoch']} ({saved['path']})")
        before, now = saved["config"]["epochs"], self.config["epochs"]
        if now > before and self.config["sched"] == "cosine" and self.ranks.is_main:
            print(f"warning: --epochs grows from {before} to {now}: the epochs so far followed the shorter cosine, so the "
                  "result is not that of a run planned so long", file=sys.stderr)
        before, now = saved["config"]["batch_size"], self.config["batch_size"]
        if now != before and self.ranks.is_main:  # and so is the number of processes
            print(f"warning: each process takes {now} images of a step and not {before}: BatchNorm normalises over other images, "
                  "so the result is not that of a run that kept its processes", file=sys.stderr)
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
            self.previous = None  # last.pt is damaged: it must not take the place of the good one
        if saved["best"]:  # last.pt is written before best.pt, and holds the same weights
            checkpoint.write(self.run / "best.pt", **saved["best"], state_dict=on_cpu(self.update.evaluated.state_dict()))
        elif not self.run.continues:
            best = checkpoint.read(saved["path"].with_name("best.pt"))
            del best["sha256"]
            checkpoint.write(self.run / "best.pt", **best)
        return saved["epoch"] + 1

    def save(self, row: EpochRow, diagnostics_row: dict, card: dict | None) -> None:
        """End an epoch: last.pt, then best.pt where `card` says what is in it (None: not the best epoch), then the tables.

        diagnostics_row: of diagnostics.csv.
        """
        self.run.rows.append(row)
        self.run.diagnostics_rows.append(diagnostics_row)
        generators = {"cpu": self.ranks.gather(torch.get_rng_state())}
        if torch.cuda.is_initialized():
            generators["cuda"] = self.ranks.gather(torch.cuda.get_rng_state())
        if not self.ranks.is_main:
            return
        best = card and {"kind": "weights", **card, "epoch": row.epoch, "val_acc1": row.val_acc1, "test_acc1": None}
        content = on_cpu({
            "kind": "run", "epoch": row.epoch, "config": self.config, "began": self.began, "best": best,
            "rng": generators,
            "rows": list(map(asdict, self.run.rows)), "looked": list(self.run.diagnostics_rows),
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
