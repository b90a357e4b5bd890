"""The run directory: lock, columns of log.csv, JSON files."""
import errno
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
from rundir.errors import BUG, DONE, USAGE, Failure, Stopped, Unwritable, expected
from rundir.files import as_csv, lock, unwritable, write_atomic, write_json

UNREADABLE = "unreadable.csv"
RESULTS = ("summary.json", "classes.csv", "confusion.csv", "confusion.png")  # of a complete run
OWNED = ("config.json", "env.json", "log.csv", "diagnostics.csv", "status.json", *RESULTS, "last.pt", "prev.pt", "best.pt")

# A row of log.csv; None is an empty cell, 'not applicable'.  Accuracies in percent; val_ece, teacher_agree and clip_frac as
# fractions; losses are unweighted means over the samples.  The last five columns, time and memory, differ between equal runs.
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
    """The files of a run in `--output`, with an exclusive lock.

    `with RunDirectory(...) as run:` locks and checks the directory, writes nothing before `run.open`, and records the end of the
    run in status.json.
    rows, diagnostics_rows: of log.csv and diagnostics.csv, one per epoch.  saved: epoch of the last checkpoint on disk, or 0.
    writes: True for the main process; the others neither lock nor write.
    """

    def __init__(self, path, *, overwrite: bool, resume: str | None = None, writes: bool = True):
        self.path, self.overwrite, self.writes = Path(path), overwrite, writes
        self.rows, self.diagnostics_rows, self.saved, self.previous = [], [], 0, self.path / "prev.pt"
        self.config, self.last, self.started = {}, None, None
        if resume:
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
        self.created = not self.path.exists()
        self.lock = lock(self.path, "run")
        present = {entry.name for entry in self.path.iterdir()} - {".lock", UNREADABLE}
        if present and not (self.overwrite or self.continues):
            self.lock.close()
            raise Failure(USAGE, f"run directory is not empty ({self.path})",
                          "use --resume auto to continue, --overwrite to replace it, or another --output")
        return self

    def __exit__(self, kind, failure, trace):
        if not self.writes:
            return
        if self.started and failure is not None:
            if isinstance(failure, Unwritable):
                failure.saved = self.saved
            code, reason = expected(failure, self.config.get("batch_size")) or (BUG, repr(failure))
            with suppress(Unwritable):  # the disk may be full
                self.status("stopped" if isinstance(failure, Stopped) else "failed", reason, code)
        elif self.created and not self.started:
            with suppress(OSError):
                (self / ".lock").unlink()
                self.path.rmdir()
        self.lock.close()

    def open(self, config: dict, checkpoint_bytes: int = 0, epochs: int = 0) -> None:
        """Start the clock and write config.json, env.json and status.json.  epochs: finished ones, of a resumed run.

        Unwritable: no space for three checkpoints, two kept and one being written.
        """
        if self.writes:
            existing = sum((self / name).stat().st_size for name in ("last.pt", "prev.pt") if (self / name).exists())
            needed = 3 * checkpoint_bytes - existing
            if shutil.disk_usage(self.path).free < needed:
                raise unwritable(self / "last.pt", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), needed)
        self.config, self.started = config, time.perf_counter()
        if not self.writes:
            return
        for name in RESULTS if self.continues else OWNED:  # stale files of an overwritten or resumed run
            (self / name).unlink(missing_ok=True)
        write_json(self / "config.json", config)
        write_json(self / "env.json", self.environments(epochs))
        self.status("running")

    def environments(self, epochs: int) -> dict:
        """The content of env.json: the environment since `epochs`, and in "earlier" the previous ones, oldest first."""
        now = environment() | {name: self.config.get(name) for name in ("processes", "batch_size")}
        try:
            last = json.loads((self / "env.json").read_text())
            earlier = list(last.pop("earlier", []))
            same = last | now == last
        except (OSError, ValueError, AttributeError, TypeError):  # missing or damaged
            return now | {"after_epoch": epochs, "earlier": []}
        return (last if same else now | {"after_epoch": epochs}) | {"earlier": earlier if same else [*earlier, last]}

    def list_unreadable(self, files: list[tuple[str, str]]) -> Path:
        """Write unreadable.csv, with path and reason of each image file that cannot be read; no file without any."""
        path = self / UNREADABLE
        if self.writes and files:
            write_atomic(path, as_csv(["path", "reason"], [dict(zip(("path", "reason"), file)) for file in files]))
        elif self.writes:
            path.unlink(missing_ok=True)
        return path

    def elapsed(self) -> float:
        """Seconds of training, including the logged time before an interruption."""
        return time.perf_counter() - self.started

    def restore(self, rows: list, diagnostics_rows: list) -> None:
        """Restore the rows of an interrupted run and rewrite its tables."""
        self.rows, self.diagnostics_rows = rows, diagnostics_rows
        self.saved = len(rows) if self.continues else 0
        self.started -= rows[-1].total_s
        if self.writes:
            for name, content in self.tables().items():
                write_atomic(self / name, content)

    def tables(self) -> dict[str, bytes]:
        """The complete content of log.csv and diagnostics.csv by file name."""
        tables, rows = {}, self.diagnostics_rows
        if rows:
            tables["diagnostics.csv"] = as_csv(list(dict.fromkeys(name for row in rows for name in row)), rows)
        return tables | {"log.csv": as_csv([field.name for field in fields(EpochRow)], list(map(asdict, self.rows)))}

    def status(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        write_json(self / "status.json", {"state": state, "reason": reason, "exit_code": exit_code, "epoch": len(self.rows)})

    def close(self, summary: dict) -> None:
        """Write and print the result.  summary.json is the last file of a run: it marks a complete run."""
        if not self.writes:
            return
        self.status("finished", summary["verdict"], DONE)
        write_json(self / "summary.json", summary | {"wall_s": round(self.elapsed(), 1)})
        print(f"{summary['verdict']}: test accuracy {summary['test_acc1_best']:.2f} % with the weights of the best epoch, "
              f"{summary['best_epoch']}, {summary['test_acc1_last']:.2f} % with those of the last -> {self / 'best.pt'}")
        print(*(f"alarm: {alarm['text']}" for alarm in summary["alarms"]), sep="\n", end="\n" * bool(summary["alarms"]))


def announce(config: dict, *lines: str) -> None:
    """Print the resolved flags, and `lines`."""
    settings = "  ".join(f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
                         for name, value in config.items() if value is not None)
    print(textwrap.fill(settings, width=120, break_long_words=False, break_on_hyphens=False), *lines, sep="\n", flush=True)


def environment() -> dict:
    """Versions, hardware and git state for reproduction, without user and host name."""
    import torch
    import torchvision

    def output(*command):
        try:
            result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
            return result.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    cuda = torch.cuda.is_initialized()  # a run on a CPU takes no memory of a GPU
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else ""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if cuda else None, "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": driver.partition("\n")[0] or None, "gpu": torch.cuda.get_device_name() if cuda else None,
        "processor": processor(), "threads": torch.get_num_threads(),
        "git_commit": output("git", "rev-parse", "HEAD") or None, "git_dirty": bool(output("git", "status", "--porcelain")),
    }


def processor() -> str:
    """The model of the CPU, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
