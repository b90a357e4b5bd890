"""Weights and whole runs on disk: written in one step, read back only after every byte is checked.

torch.load does not check the archive's CRCs (a flipped bit loads as a wrong weight), and they do not cover its directory
(one flip in 25,000 there exchanges tensors).  So `write` seals the whole file with its SHA-256, as the zip archive's comment,
and reading checks that, or the CRCs of a file without one, and always uses weights_only=True: a file holds data, never code.

A run keeps all that it needs to go on in last.pt, replaced after every epoch, and the one before it in prev.pt.  Whatever
is lost in a crash is the epoch in flight and the one being written; both are computed again, to the same bits on a CPU.
"""
import hashlib
import io
import sys
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from training.runlog import CHECKPOINT, USAGE, EpochRow, Failure, write_atomic

FORMAT = 1
SEAL = b"sha256:"
SEALED = len(SEAL) + 64  # bytes, with the digest
FREE = {"output", "epochs", "patience", "device", "resume", "overwrite", "debug", "dry_run"}  # what a resumed run may change
NO_FLAGS = {"script", "teacher_sha256", "processes"}
REMEDY = "restore it from a copy or make it again"


def write(path, *, previous=None, **content) -> None:
    """Save `content` (tensors and plain Python types) as a checkpoint of ours, atomically; `previous` as in write_atomic."""
    write_atomic(path, Sealed({"format": FORMAT, **content}), previous)


class Sealed:
    """A checkpoint that is serialised and hashed while it is written to a file, and sealed at its end.

    Serialising to memory first would hold the interpreter, and with it the training loop.  The last two bytes are held back: a
    zip archive ends with the length of its comment, which will be the seal's.  torch.save would replace the reason of a failed
    write by one of its own, so from there on nothing is written any more, only counted, and the reason is raised at the end.
    """

    def __init__(self, content: dict):
        self.content, self.sha256, self.held, self.size, self.failure = content, hashlib.sha256(), b"", 0, None

    def __call__(self, file) -> None:
        self.file = file
        torch.save(self.content, self)
        self._put(self.held[:-2] + SEALED.to_bytes(2, "little"))
        self._put(SEAL + self.sha256.hexdigest().encode())
        if self.failure:
            raise self.failure

    def __len__(self) -> int:
        return self.size

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        if len(data) < 2:
            self.held += bytes(data)
        else:
            self._put(self.held)
            self._put(data[:-2])
            self.held = bytes(data[-2:])
        return len(data)

    def flush(self) -> None:
        """torch.save wants it; whoever opened the file flushes it."""

    def _put(self, data) -> None:
        self.size += len(data)
        try:
            if self.failure is None:
                self.sha256.update(data)
                self.file.write(data)
        except OSError as failure:
            self.failure = failure


def read_tensors(path, code: int = CHECKPOINT):
    """Whatever plain data a `torch.save` file holds, every byte checked; exit `code` where it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise Failure(code, f"no such file ({path})", "check the path")
    try:
        data = io.BytesIO(path.read_bytes())
        with data.getbuffer() as content:
            seal = bytes(content[-SEALED:])
            if seal.startswith(SEAL) and seal != SEAL + hashlib.sha256(content[:-SEALED]).hexdigest().encode():
                raise Failure(code, f"damaged file ({path}: wrong checksum)", REMEDY)
        damaged = None if seal.startswith(SEAL) else zipfile.ZipFile(data).testzip()
        if damaged:
            raise Failure(code, f"damaged file ({path}: wrong checksum in {damaged})", REMEDY)
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=True)
    except PermissionError:
        raise Failure(code, f"cannot read ({path}): permission denied", "change its permissions") from None
    except Failure:
        raise
    except Exception as failure:  # zipfile and the unpickler raise a dozen types on hostile bytes
        reason = "truncated, or not made by torch.save of torch 1.6 or newer"
        if "Unsupported" in str(failure) or "WeightsUnpickler" in str(failure):
            reason = "it holds more than plain data"
        raise Failure(code, f"unreadable file ({path}: {reason})", REMEDY) from failure


def read(path) -> dict:
    """The content of a checkpoint that `write` made, with the keys it was given."""
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Failure(CHECKPOINT, f"not a checkpoint of this project ({path})", "use a run's best.pt, or --init for bare weights")
    return content


def digest(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as failure:
        raise Failure(CHECKPOINT, f"cannot read ({path}: {failure.strerror})", "check the path and its permissions") from failure


def read_run(path) -> dict:
    """The content of a last.pt or prev.pt."""
    content = read(path)
    if content.get("kind") != "run":
        raise Failure(CHECKPOINT, f"not the state of a run ({path}: its kind is {content.get('kind')})", "name a run's last.pt")
    return content


def find(run, config: dict) -> dict | None:
    """What `--resume` asks to continue, None to start; prints which.

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
    compare(run, saved["config"], config)
    return saved | {"path": last, "has_summary": (run / "summary.json").exists()}


def is_finished(run, saved: dict | None, epochs: int, stop) -> bool:
    """Whether a run has nothing left to do, not even its test; says so.  stop: its EarlyStop, with the patience of now."""
    if saved is None or not saved["has_summary"]:
        return False
    stop.load_state_dict(saved["stop"])
    if saved["epoch"] < epochs and not stop.stop:
        return False
    print(f"already finished ({run.path}): {saved['epoch']} epochs{', early stop' * stop.stop}, the best is {stop.best_epoch}")
    return True


def compare(run, old: dict, new: dict) -> None:
    """Refuse flags that differ from those of the run; shows both in a table."""
    changed = sorted(key for key in old.keys() | new.keys() if key not in FREE and old.get(key) != new.get(key))
    if new["epochs"] < old["epochs"]:
        changed.append("epochs")
    if not changed:
        return
    rows = [("flag", "its run", "now")]
    rows += [(key if key in NO_FLAGS else f"--{key.replace('_', '-')}", str(old.get(key)), str(new.get(key))) for key in changed]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(*("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows), sep="\n")
    both = ", ".join(f"{name} {before} -> {now}" for name, before, now in rows[1:])
    raise Failure(USAGE, f"these flags make another experiment than the run to continue ({run.last.parent}: {both})",
                  "give it the flags that it had, or start another run in another --output")


def on_cpu(tree):
    """A copy of nested containers whose tensors lie on the CPU and share nothing with the originals."""
    copy = queue_copy(tree)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copy


def queue_copy(tree):
    """What `on_cpu` returns, not yet filled where it comes from a GPU: copies to pinned memory, which are waited for together."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True, non_blocking=True)
    if isinstance(tree, Mapping):
        return {key: queue_copy(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(queue_copy, tree))
    return tree


class Writer:
    """One thread that writes while training goes on; `writer(job)` first waits for the job before it.

    An error of a job is raised by the next call, by `wait`, or at the end of the `with` block.
    """

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(max_workers=1), None

    def __call__(self, job) -> None:
        self.wait()
        self.pending = self.pool.submit(job)

    def wait(self) -> None:
        if self.pending:
            self.pending.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, failure, trace):
        self.pool.shutdown()
        if failure is None:
            self.wait()


class State:
    """All that decides how a run goes on: saved after every epoch, restored from what `find` found.

    update, stop: have state_dict() and load_state_dict() of plain types.  config: what must be the same when it is resumed.
    ranks: training.distributed's; all processes restore and save together, the first one writes.
    """

    def __init__(self, run, writer: Writer, config: dict, *, update, stop, ranks):
        self.run, self.writer, self.config, self.update, self.stop, self.ranks = run, writer, config, update, stop, ranks
        self.previous = run / "prev.pt"

    def restore(self, saved: dict | None) -> int:
        """Go back to the end of the epoch that was saved -> the epoch to run next."""
        if saved is None:
            return 1
        print(f"continuing after epoch {saved['epoch']} ({saved['path']})")
        before, now = saved["config"]["epochs"], self.config["epochs"]
        if now > before and self.config["sched"] == "cosine":
            print(f"warning: --epochs grows from {before} to {now}: the epochs so far followed the shorter cosine, so the "
                  "result is not that of a run planned so long", file=sys.stderr)
        self.update.load_state_dict(saved["update"])
        self.stop.load_state_dict(saved["stop"])
        torch.set_rng_state(saved["rng"]["cpu"][self.ranks.rank])
        if "cuda" in saved["rng"] and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(saved["rng"]["cuda"][self.ranks.rank])
        self.run.restore([EpochRow(**row) for row in saved["rows"]])
        if not self.ranks.first:
            return saved["epoch"] + 1
        if saved["path"].resolve() == self.previous.resolve():
            self.previous = None  # last.pt is damaged: it must not take the place of the good one
        if saved["best"]:  # last.pt is written before best.pt, and holds the same weights
            write(self.run / "best.pt", **saved["best"], state_dict=on_cpu(self.update.evaluated.state_dict()))
        elif not self.run.continues:
            write(self.run / "best.pt", **read(saved["path"].with_name("best.pt")))
        return saved["epoch"] + 1

    def save(self, row: EpochRow, card: dict | None) -> None:
        """End an epoch: last.pt, then best.pt where `card` says what is in it (None: not the best epoch), then log.csv."""
        self.run.rows.append(row)
        generators = {"cpu": self.ranks.gather(torch.get_rng_state())}
        if torch.cuda.is_initialized():
            generators["cuda"] = self.ranks.gather(torch.cuda.get_rng_state())
        if not self.ranks.first:
            return
        best = card and {"kind": "weights", **card, "epoch": row.epoch, "val_acc1": row.val_acc1, "test_acc1": None}
        content = on_cpu({
            "kind": "run", "epoch": row.epoch, "config": self.config, "best": best, "rng": generators,
            "rows": list(map(asdict, self.run.rows)), "update": self.update.state_dict(), "stop": self.stop.state_dict()})
        weights = on_cpu(self.update.evaluated.state_dict()) if best else None
        table, previous, self.previous = self.run.table(), self.previous, self.run / "prev.pt"

        def job():
            write(self.run / "last.pt", previous=previous, **content)
            self.run.saved = row.epoch
            if best:
                write(self.run / "best.pt", **best, state_dict=weights)
            write_atomic(self.run / "log.csv", table)

        self.writer(job)
