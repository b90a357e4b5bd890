"""The run directory: its lock, its CSV contract, its JSON files, and how a script ends.

Every expected error is one line on stderr, `error: what (path or value). what to do`, and one of the exit codes below;
anything else is a bug and keeps its traceback.  Imports nothing of ours and no torch.
"""
import csv
import errno
import fcntl
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

DONE, BUG, USAGE, IN_USE, DATA, CHECKPOINT, DIVERGED, OUT_OF_MEMORY, DISK = range(9)
STOPPED = 128  # plus the signal's number: 130 is SIGINT, 143 SIGTERM
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)
OWNED = ("config.json", "env.json", "log.csv", "diagnostics.csv", "status.json", "summary.json", "last.pt", "prev.pt", "best.pt")


class Failure(Exception):
    """An error that the user can mend: exit `code`, `what` went wrong and with which file or value, and the `remedy`."""

    def __init__(self, code: int, what: str, remedy: str):
        super().__init__(f"{what}. {remedy}")
        self.code = code


class Unwritable(OSError):
    """A file or directory of ours that cannot be written, for whatever reason the system gives.

    `needed` and `free` are bytes, `saved` the epoch of the last good checkpoint; 0 where there is none.
    """
    needed = free = saved = 0


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM asked the process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def expected(failure: BaseException, batch_size: int | None = None) -> tuple[int, str] | None:
    """The exit code and the line of an error that is not a bug; None for one that is."""
    if isinstance(failure, Stopped):
        return STOPPED + failure.number, f"stopped ({failure}). the same command with --resume auto continues"
    if isinstance(failure, Failure):
        return failure.code, str(failure)
    if isinstance(failure, Unwritable) or isinstance(failure, OSError) and failure.errno in DISK_ERRORS:
        room, remedy = "", "free space, or choose another --output"
        if getattr(failure, "needed", 0):
            room = f"; needs {failure.needed / 1e6:.1f} MB, {failure.free / 1e6:.1f} MB free"
        if getattr(failure, "saved", 0):
            remedy = f"free space and continue with --resume auto: the last good checkpoint is of epoch {failure.saved}"
        return DISK, f"cannot write {failure.filename or 'a file'} ({failure.strerror}{room}). {remedy}"
    if type(failure).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
        from torch import cuda
        used = f"--batch-size {batch_size}"
        if cuda.is_available():
            peak, total = cuda.max_memory_allocated() / 2**30, cuda.mem_get_info()[1] / 2**30
            used += f", {peak:.1f} of {total:.1f} GiB at the peak"
        remedy = f"try --batch-size {max(2, (batch_size or 0) // 2)}, or a smaller --image-size"
        return OUT_OF_MEMORY, f"out of GPU memory ({used}). {remedy}"
    if type(failure).__name__.startswith("Dist") or isinstance(failure, RuntimeError) and "gloo/transport" in str(failure):
        reason = str(failure).partition(". ")[0].rpartition("] ")[2]
        return BUG, f"another process of this run does not answer ({reason}). the same command with --resume auto continues"
    if isinstance(failure, RuntimeError) and "does not have a deterministic implementation" in str(failure):
        return USAGE, f"an operation without a deterministic form here ({str(failure).split()[0]}). leave out --deterministic"
    return None


def run(main, args) -> None:
    """Run `main(args)` and exit by the rules above; `--debug` shows the traceback of an expected error too.

    Of several processes on one run only the first to fail says why: the others fail because of it, or as it did.
    """
    attempt = ended_by_the_rules
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's report shows the traceback of a bug
        from torch.distributed.elastic.multiprocessing.errors import record
        attempt = record(attempt)
    attempt(main, args)


def ended_by_the_rules(main, args) -> None:
    with stopping_on_signals() as stopped:
        try:
            main(args)
        except BaseException as failure:
            # Whatever the interrupted code made of the exception, the signal is what ended the run.
            outcome, first = expected(stopped[0] if stopped else failure, vars(args).get("batch_size")), first_to_fail()
            if first and (outcome is None or args.debug):
                raise
            code, line = outcome or (BUG, "")
            if first:
                print(f"error: {' '.join(line.split())}", file=sys.stderr)
            raise SystemExit(code) from None


def first_to_fail() -> bool:
    """Whether no other process of this run has asked this before; alone, always."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    from torch.distributed import TCPStore
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"fusekd/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # the store has ended with the process that kept it
        return True


@contextmanager
def stopping_on_signals():
    """SIGINT and SIGTERM raise Stopped wherever the main thread is, a second signal ends the process at once.

    That drops the epoch in flight; the epochs before it are in last.pt or being written by another thread, which is waited
    for.  Under torchrun a handler would only delay its own shutdown.  Yields the list of what was raised.
    """
    stopped, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number, frame):
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        stopped.append(Stopped(number))
        raise stopped[0]

    if "RANK" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    else:
        for number in numbers:
            signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One row of log.csv, in column order; None is an empty cell, 'not applicable'.

    Accuracies in percent; val_ece, teacher_agree and clip_frac as fractions; losses unweighted means over the samples
    seen; the last five columns are clock and memory and differ from run to run.
    """
    epoch: int
    lr: float
    train_loss: float
    train_loss_ce: float
    train_loss_kl: float | None = None
    train_loss_tckd: float | None = None
    train_loss_nckd: float | None = None
    train_acc1: float
    val_loss: float
    val_acc1: float
    val_acc5: float
    val_ece: float
    teacher_agree: float | None = None
    best_val_loss: float
    best_epoch: int
    bad_epochs: int
    grad_norm_mean: float
    grad_norm_max: float
    clip_frac: float
    amp_scale: float | None = None
    skipped_steps: int
    steps: int
    samples: int
    images_per_s: float
    epoch_s: float
    val_s: float
    total_s: float
    peak_mem_mb: float | None = None


def write_atomic(path, content, previous=None) -> None:
    """Replace `path` by `content` in one step: a reader, or a crash, sees the old file or the new one, never half of it.

    content: bytes, or what writes to the open file that it is called with, and has a length, then or after a failure.
    previous: a name under which the old file is kept.
    """
    path = Path(path)
    partial, link = (Path(f"{name}.tmp") for name in (path, previous or path))
    make_directory(path.parent)
    try:
        with open(partial, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            link.unlink(missing_ok=True)
            os.link(path, link)
            os.replace(link, previous)
            link.unlink(missing_ok=True)  # where both were one file already, replacing leaves both names
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power failure could undo the replacement
        finally:
            os.close(folder)
    except OSError as failure:
        for leftover in (partial, link):  # they would keep the space that is missing
            leftover.unlink(missing_ok=True)
        raise unwritable(path, failure, len(content)) from failure


def unwritable(path: Path, failure: OSError, needed: int) -> Unwritable:
    """The failure to write `needed` bytes to `path`, with the room that there is."""
    named = Unwritable(failure.errno, failure.strerror, str(path))
    named.needed, named.free = needed, shutil.disk_usage(path.parent).free
    return named


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise Unwritable(failure.errno, failure.strerror, str(path)) from failure


def write_json(path, content: dict) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


class RunDirectory:
    """The files of one run under its `--output`, in use by one process at a time.

    `with RunDirectory(...) as run:` locks the directory and checks that it may be used, writes nothing before `run.open`, and
    leaves in status.json how the run ended.  The kernel frees the lock however the process ends.
    rows: the epochs so far.  saved: the epoch of the last checkpoint that is safely on disk, 0 where there is none.
    writes: whether this is the process that writes; of several on one run the others neither lock nor touch anything.
    """

    def __init__(self, path, *, overwrite: bool, resume: str | None = None, writes: bool = True):
        self.path, self.overwrite, self.rows, self.saved, self.opened = Path(path), overwrite, [], 0, None
        self.writes = writes
        self.config, self.last = {}, None
        if resume:  # the last.pt to continue from
            source = self.path if resume == "auto" else Path(resume)
            self.last = source / "last.pt" if resume == "auto" or source.is_dir() else source
        self.required = resume not in (None, "auto")
        self.continues = self.last is not None and self.last.parent.resolve() == self.path.resolve()
        if self.path.exists() and not self.path.is_dir():
            raise Failure(USAGE, f"--output is not a directory ({self.path})", "choose another --output")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __enter__(self):
        if not self.writes:
            return self
        self.made = not self.path.exists()
        make_directory(self.path)
        try:
            self.lock = open(self / ".lock", "ab")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(IN_USE, f"run directory is in use by another run ({self.path})",
                          "wait for its end, or choose another --output") from None
        except OSError as failure:
            raise Unwritable(failure.errno, failure.strerror, str(self / ".lock")) from failure
        if not (self.overwrite or self.continues) and any(entry.name != ".lock" for entry in self.path.iterdir()):
            self.lock.close()
            raise Failure(USAGE, f"run directory is not empty ({self.path})",
                          "use --resume auto to continue its run, --overwrite to replace it, or another --output")
        return self

    def __exit__(self, kind, failure, trace):
        if not self.writes:
            return
        if self.opened and failure is not None:
            if isinstance(failure, Unwritable):
                failure.saved = self.saved
            code, reason = expected(failure, self.config.get("batch_size")) or (BUG, repr(failure))
            with suppress(Unwritable):  # the disk may be what failed
                self.status("stopped" if isinstance(failure, Stopped) else "failed", reason, code)
        elif self.made and not self.opened:
            with suppress(OSError):
                (self / ".lock").unlink()
                self.path.rmdir()
        self.lock.close()

    def open(self, config: dict, checkpoint_bytes: int = 0) -> None:
        """Write what the run is, before its first step.

        Unwritable: no room for three checkpoints, which is what there is while one is written and two are kept.
        """
        if self.writes:
            there = sum((self / name).stat().st_size for name in ("last.pt", "prev.pt") if (self / name).exists())
            needed = 3 * checkpoint_bytes - there
            if shutil.disk_usage(self.path).free < needed:
                raise unwritable(self / "last.pt", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), needed)
        self.config, self.opened = config, time.perf_counter()
        if not self.writes:
            return
        stale = ["summary.json"] if self.continues else OWNED  # what an overwritten run left must not be read as this one's
        for name in stale:
            (self / name).unlink(missing_ok=True)
        write_json(self / "config.json", config)
        write_json(self / "env.json", environment())
        self.status("running")

    def elapsed(self) -> float:
        """Seconds that the run has taken, those before an interruption included as far as they were logged."""
        return time.perf_counter() - self.opened

    def restore(self, rows: list) -> None:
        """Take over the epochs of an interrupted run; log.csv is derived from them."""
        self.rows, self.saved, self.opened = rows, len(rows) if self.continues else 0, self.opened - rows[-1].total_s
        if self.writes:
            write_atomic(self / "log.csv", self.table())

    def table(self) -> bytes:
        """The content of log.csv: always the whole file, so that it never holds half a line."""
        text = io.StringIO()
        table = csv.DictWriter(text, [field.name for field in fields(EpochRow)], lineterminator="\n")
        table.writeheader()
        table.writerows({name: "" if value is None else value for name, value in asdict(row).items()} for row in self.rows)
        return text.getvalue().encode()

    def status(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        write_json(self / "status.json", {"state": state, "reason": reason, "exit_code": exit_code, "epoch": len(self.rows)})

    def close(self, summary: dict) -> None:
        """Write the result and say it; the last thing that a run does, and summary.json its last file: it marks a whole run."""
        if not self.writes:
            return
        self.status("finished", summary["verdict"], DONE)
        write_json(self / "summary.json", summary | {"wall_s": round(self.elapsed(), 1)})
        print(f"{summary['verdict']}: test accuracy {summary['test_acc1_best']:.2f} % with the weights of the best epoch, "
              f"{summary['best_epoch']}, {summary['test_acc1_last']:.2f} % with the last -> {self / 'best.pt'}")


def announce(config: dict, objective: str) -> None:
    """Print what is about to run: every flag as it was resolved, and what is minimised."""
    settings = "  ".join(f"{name}={shown(value)}" for name, value in config.items() if value is not None)
    print(textwrap.fill(settings, width=120, break_long_words=False, break_on_hyphens=False), objective, sep="\n", flush=True)


def shown(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def verdict(rows: list, classes: int, stopped_early: bool) -> str:
    """"collapsed" where validation accuracy never left twice chance, or ended below half of its best; else how the run ended."""
    best = max(row.val_acc1 for row in rows)
    if best <= 200 / classes or rows[-1].val_acc1 < best / 2:
        return "collapsed"
    return "early stop" if stopped_early else "completed"


def environment() -> dict:
    """Versions, hardware and git state: what a reader needs to repeat the run, and nothing about the person or machine name."""
    import torch
    import torchvision

    def answer(*command):
        try:
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
            return done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    cuda = torch.cuda.is_available()
    driver = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else ""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if cuda else None, "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": driver.partition("\n")[0] or None, "gpu": torch.cuda.get_device_name() if cuda else None,
        "processor": platform.machine(), "threads": torch.get_num_threads(),
        "git_commit": answer("git", "rev-parse", "HEAD") or None, "git_dirty": bool(answer("git", "status", "--porcelain")),
    }
