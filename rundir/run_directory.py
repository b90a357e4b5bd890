"""The run directory: its lock, the columns of log.csv, its JSON files."""
import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import textwrap
import time
from contextlib import suppress
from dataclasses import asdict, fields, make_dataclass
from pathlib import Path

from losses.methods import TERMS
from rundir.errors import BUG, DONE, IN_USE, USAGE, Failure, Stopped, Unwritable, expected
from rundir.files import as_csv, make_directory, unwritable, write_atomic, write_json

OWNED = ("config.json", "env.json", "log.csv", "diagnostics.csv", "status.json", "summary.json", "last.pt", "prev.pt", "best.pt")

# One row of log.csv, in column order; None is an empty cell, 'not applicable'.  Accuracies in percent; val_ece, teacher_agree
# and clip_frac as fractions; losses unweighted means over the samples seen; the last five columns are clock and memory and
# differ from run to run.
EpochRow = make_dataclass("EpochRow", (
    ("epoch", int), ("lr", float), ("train_loss", float),
    *((f"train_loss_{term}", float | None, None) for term in TERMS),
    ("train_acc1", float), ("val_loss", float), ("val_acc1", float), ("val_acc5", float), ("val_ece", float),
    ("teacher_agree", float | None, None), ("best_val_loss", float), ("best_epoch", int), ("bad_epochs", int),
    ("grad_norm_mean", float), ("grad_norm_max", float), ("clip_frac", float), ("amp_scale", float | None, None),
    ("skipped_steps", int), ("steps", int), ("samples", int), ("images_per_s", float), ("epoch_s", float), ("val_s", float),
    ("total_s", float), ("peak_mem_mb", float | None, None),
), frozen=True, kw_only=True)


class RunDirectory:
    """The files of one run under its `--output`, in use by one process at a time.

    `with RunDirectory(...) as run:` locks the directory and checks that it may be used, writes nothing before `run.open`, and
    leaves in status.json how the run ended.  The kernel frees the lock however the process ends.
    rows, diagnostics_rows: of log.csv and diagnostics.csv, one per epoch.  saved: the epoch of the last checkpoint on disk, or 0.
    writes: whether this process writes; of several on one run the others neither lock nor touch anything.
    """

    def __init__(self, path, *, overwrite: bool, resume: str | None = None, writes: bool = True):
        self.path, self.overwrite, self.writes = Path(path), overwrite, writes
        self.rows, self.diagnostics_rows, self.saved = [], [], 0
        self.config, self.last, self.opened = {}, None, None
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

    def open(self, config: dict, checkpoint_bytes: int = 0, epochs: int = 0) -> None:
        """Write what the run is, before its first step or the next one after so many `epochs`.

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
        write_json(self / "env.json", self.environments(epochs))
        self.status("running")

    def environments(self, epochs: int) -> dict:
        """What env.json holds: where the run is, since how many `epochs`, and in "earlier" where else it was, oldest first."""
        now = environment() | {name: self.config.get(name) for name in ("processes", "batch_size")}
        try:
            last = json.loads((self / "env.json").read_text())
            earlier = list(last.pop("earlier", []))
            same = last | now == last
        except (OSError, ValueError, AttributeError, TypeError):  # a run that starts, or a file that somebody broke
            return now | {"after_epoch": epochs, "earlier": []}
        return (last if same else now | {"after_epoch": epochs}) | {"earlier": earlier if same else [*earlier, last]}

    def elapsed(self) -> float:
        """Seconds that the run has taken, those before an interruption included as far as they were logged."""
        return time.perf_counter() - self.opened

    def restore(self, rows: list, diagnostics_rows: list) -> None:
        """Take over the epochs of an interrupted run; its tables are derived from them."""
        self.rows, self.diagnostics_rows = rows, diagnostics_rows
        self.saved = len(rows) if self.continues else 0
        self.opened -= rows[-1].total_s  # the clock of a resumed run goes on
        if self.writes:
            for name, content in self.tables().items():
                write_atomic(self / name, content)

    def tables(self) -> dict[str, bytes]:
        """The content of log.csv and diagnostics.csv: always the whole file, so that it never holds half a line."""
        tables, rows = {}, self.diagnostics_rows
        if rows:
            tables["diagnostics.csv"] = as_csv(list(rows[0]), rows)
        return tables | {"log.csv": as_csv([field.name for field in fields(EpochRow)], list(map(asdict, self.rows)))}

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
        print(*(f"alarm: {alarm['text']}" for alarm in summary["alarms"]), sep="\n", end="\n" * bool(summary["alarms"]))


def refuse_to_overwrite(output, starts) -> None:
    """Failure USAGE where --overwrite would delete a file of weights that the run begins with.  starts: their paths, or None."""
    for path in starts:
        if path and Path(path).resolve().parent == Path(output).resolve():
            raise Failure(USAGE, f"--overwrite would delete what the run begins with ({path})", "choose another --output")


def announce(config: dict, objective: str) -> None:
    """Print what is about to run: every flag as it was resolved, and what is minimised."""
    settings = "  ".join(f"{name}={shown(value)}" for name, value in config.items() if value is not None)
    print(textwrap.fill(settings, width=120, break_long_words=False, break_on_hyphens=False), objective, sep="\n", flush=True)


def shown(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


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
