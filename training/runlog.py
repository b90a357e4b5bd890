"""The run directory: its CSV contract, its JSON files, and how a script ends.

Every expected error is one line on stderr, `error: what (path or value). what to do`, and one of the exit codes below;
anything else is a bug and keeps its traceback.  Imports nothing of ours and no torch.
"""
import csv
import errno
import io
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

DONE, BUG, USAGE, IN_USE, DATA, CHECKPOINT, DIVERGED, OUT_OF_MEMORY, DISK = range(9)
INTERRUPTED = 130
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)
OWNED = ("config.json", "env.json", "log.csv", "diagnostics.csv", "status.json", "summary.json", "last.pt", "prev.pt", "best.pt")


class Failure(Exception):
    """An error that the user can mend: exit `code`, `what` went wrong and with which file or value, and the `remedy`."""

    def __init__(self, code: int, what: str, remedy: str):
        super().__init__(f"{what}. {remedy}")
        self.code = code


class Unwritable(OSError):
    """A file or directory of ours that cannot be written, for whatever reason the system gives."""


def expected(failure: BaseException) -> tuple[int, str] | None:
    """The exit code and the line of an error that is not a bug; None for one that is."""
    if isinstance(failure, KeyboardInterrupt):
        return INTERRUPTED, "interrupted. use --overwrite to start the run again"
    if isinstance(failure, Failure):
        return failure.code, str(failure)
    if isinstance(failure, Unwritable) or isinstance(failure, OSError) and failure.errno in DISK_ERRORS:
        return DISK, f"cannot write {failure.filename or 'a file'} ({failure.strerror}). free space, or choose another --output"
    if type(failure).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
        return OUT_OF_MEMORY, "out of GPU memory. choose a smaller --batch-size or --image-size"
    return None


def run(main, args) -> None:
    """Run `main(args)` and exit by the rules above; `--debug` shows the traceback of an expected error too."""
    try:
        main(args)
    except BaseException as failure:
        outcome = expected(failure)
        if outcome is None or args.debug:
            raise
        print(f"error: {' '.join(outcome[1].split())}", file=sys.stderr)
        raise SystemExit(outcome[0]) from None


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


def write_atomic(path, data: bytes) -> None:
    """Replace `path` by `data` in one step: a reader, or a crash, sees the old file or the new one, never half of it."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    make_directory(path.parent)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as failure:
        partial.unlink(missing_ok=True)  # a failed partial would keep the space that is missing
        raise Unwritable(failure.errno, failure.strerror, str(path)) from failure


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise Unwritable(failure.errno, failure.strerror, str(path)) from failure


def write_json(path, content: dict) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


class RunDirectory:
    """`config.json`, `env.json`, `log.csv`, `status.json` and `summary.json` under one `--output`.

    `with RunDirectory(...) as run:` checks at once that the directory may be used, creates nothing before `run.open`, and
    leaves in status.json how the run ended.
    """

    def __init__(self, path, *, overwrite: bool):
        self.path, self.rows, self.opened = Path(path), [], None
        if self.path.exists() and not self.path.is_dir():
            raise Failure(USAGE, f"--output is not a directory ({self.path})", "choose another --output")
        if self.path.is_dir() and any(self.path.iterdir()) and not overwrite:
            raise Failure(USAGE, f"run directory is not empty ({self.path})", "use --overwrite, or another --output")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __enter__(self):
        return self

    def __exit__(self, kind, failure, trace):
        if self.opened and failure is not None:
            code, reason = expected(failure) or (BUG, repr(failure))
            self.status("failed", reason, code)

    def open(self, config: dict) -> None:
        """Write what the run is, before its first step."""
        make_directory(self.path)
        for name in OWNED:  # what an overwritten run left must not be read as this one's
            (self / name).unlink(missing_ok=True)
        self.opened = time.perf_counter()
        write_json(self / "config.json", config)
        write_json(self / "env.json", environment())
        self.status("running")

    def log(self, row: EpochRow) -> None:
        """Add one epoch; log.csv is rewritten from the rows, so that it never holds half a line."""
        self.rows.append(row)
        text = io.StringIO()
        table = csv.DictWriter(text, [field.name for field in fields(EpochRow)], lineterminator="\n")
        table.writeheader()
        table.writerows({name: "" if value is None else value for name, value in asdict(row).items()} for row in self.rows)
        write_atomic(self / "log.csv", text.getvalue().encode())

    def status(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        write_json(self / "status.json", {"state": state, "reason": reason, "exit_code": exit_code, "epoch": len(self.rows)})

    def close(self, summary: dict) -> None:
        """Write the result and say it; the last thing that a run does."""
        write_json(self / "summary.json", summary | {"wall_s": round(time.perf_counter() - self.opened, 1)})
        self.status("finished", summary["verdict"], DONE)
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

    def git(*words):
        try:
            done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
            return done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if cuda else None, "gpu": torch.cuda.get_device_name() if cuda else None,
        "processor": platform.machine(), "threads": torch.get_num_threads(),
        "git_commit": git("rev-parse", "HEAD") or None, "git_dirty": bool(git("status", "--porcelain")),
    }
