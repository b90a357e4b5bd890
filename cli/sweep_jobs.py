"""One run of a sweep: its command, its process, and what it left in its directory.  Imports no torch."""
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from cli import sweep_grid
from rundir.errors import BUG, DATA, DIVERGED, IN_USE, STOPPED, USAGE, Failure
from rundir.files import digest, holds, make_directory
from rundir.identity import NON_EXPERIMENT_FLAGS

RESOLVED = (None, "auto")  # flags that a run decides itself; config.json then says what it decided
PAUSE = 1.0  # seconds until a run that another process is at is looked at again
NUMBERS = ("test_acc1_best", "test_acc1_last", "wall_s")


class Job:
    """One run of a cell, in `output`/<cell>-s<seed>; its terminal's text goes to `output`/logs.

    root: the folder of the scripts.  flags: of this run, as config.json has them.  code: the exit code of a run that failed.
    seconds: from the start of its process to its end, 0 where none was started.
    """

    def __init__(self, cell: sweep_grid.Cell, seed: int, output: Path, root: Path):
        name = f"{cell.name}-s{seed}"
        self.cell, self.seed, self.directory, self.log = cell, seed, output / name, output / "logs" / f"{name}.txt"
        self.command = [str(root / cell.script), *sweep_grid.command(cell), "--seed", str(seed), "--resume", "auto",
                        "--output", str(self.directory)]
        flags = vars(sweep_grid.parse(cell, seed))
        self.flags = {name: value for name, value in flags.items() if name not in NON_EXPERIMENT_FLAGS}
        self.process, self.code, self.seconds, self.pause_ends = None, 0, 0.0, 0.0

    def __str__(self) -> str:
        return f"{self.cell.label} seed {self.seed}"

    def shown(self) -> str:
        return shlex.join(["python", self.cell.script, *self.command[1:]])

    def outcome(self, metric: str) -> str:
        if self.code:
            return f"failed with exit code {self.code}: {self.reason()} ({self.log})"
        result = self.result()
        return f"{result['verdict']}, {result[metric]:.2f} %" if metric in result else result["verdict"]

    def result(self) -> dict | None:
        """What the run came to: its summary.json, or a verdict alone where it diverged; None while it has not ended so."""
        summary = read_json(self.directory / "summary.json")
        if summary:
            if not all(isinstance(summary.get(name), (int, float)) for name in NUMBERS) or "verdict" not in summary:
                raise damaged(self.directory / "summary.json", "numbers are missing")
            return summary
        status = read_json(self.directory / "status.json") or {}
        return {"verdict": "diverged"} if status.get("exit_code") == DIVERGED else None

    def compare(self, recorded: dict | None) -> dict:
        """Refuse a directory whose run had other flags -> the flags to record.

        recorded: the flags as an earlier sweep gave them.  Without it, one that is not given now passes, whatever it came to be.
        """
        old = read_json(self.directory / "config.json")
        if old is None:
            return self.flags
        new = {"script": self.cell.script.removesuffix(".py")} | self.flags | teacher(self.flags)
        changed = [f"{name} {old.get(name)} -> {value}" for name, value in new.items()
                   if old.get(name) != value and (name in old or value)
                   and not (value in RESOLVED and (recorded or new).get(name) == value)
                   and not self.same_content(name, old)]
        if changed:
            raise Failure(USAGE, f"another experiment is in the directory of a run ({self.directory}: {', '.join(changed)})",
                          "give it the flags that it had, or choose another --output")
        return recorded or self.flags

    def same_content(self, name: str, old: dict) -> bool:
        """Whether flag `name` spells another path than in `old`, a config.json, to the same content."""
        path = self.flags.get(name)
        if name == "teacher_checkpoint":
            return os.path.isfile(path) and digest_once(Path(path)) == old.get("teacher_sha256")
        if name == "data_dir":
            return fingerprint(self.flags["dataset"], path, self.flags["image_size"]) == old.get("data_sha256")
        return name in ("init", "student_init") and holds(path, old.get("init_sha256"))

    def ended(self, at_once: int) -> bool:
        """Whether the run has ended, however; starts it where nobody is at it.  at_once: runs that share the processor."""
        if self.process:
            code = self.process.poll()
            if code is None:
                return False
            self.process, self.seconds = None, time.monotonic() - self.started
            if code != IN_USE:
                self.code = 0 if self.result() else STOPPED - code if code < 0 else code or BUG
                return True
            self.pause()  # a process of a killed sweep was quicker
        if time.monotonic() < self.pause_ends:
            return False
        if self.result():
            return True
        if self.in_use():
            self.pause()
        else:
            self.start(max(1, len(os.sched_getaffinity(0)) // at_once))
        return False

    def pause(self) -> None:
        if not self.pause_ends:
            print(f"{self}: waiting for another process that is at it ({self.directory})", flush=True)
        self.pause_ends = time.monotonic() + PAUSE

    def in_use(self) -> bool:
        """Whether a process holds the lock of the run directory."""
        try:
            with open(self.directory / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def start(self, threads: int) -> None:
        """Start its process.  threads: OMP_NUM_THREADS, unless it is set."""
        make_directory(self.log.parent)
        with open(self.log, "ab") as log:
            log.write(f"$ {self.shown()}\n".encode())
            log.flush()
            self.begin, self.started = log.tell(), time.monotonic()
            # A process group of its own: Ctrl-C reaches it once, from the sweep, as a second signal would end it at once.
            self.process = subprocess.Popen(
                [sys.executable, *self.command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ | {"PYTHONUNBUFFERED": "1"})

    def reason(self) -> str:
        """The line of a failed run that says why."""
        with open(self.log, "rb") as log:
            log.seek(self.begin)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1]


def results(jobs: list[Job], cells: list) -> dict[str, dict[int, dict]]:
    """What the jobs came to: words of a cell -> seed -> its result.  Failure DATA: some saw other images under the same flags."""
    seen = {}
    for each in jobs:
        flags = tuple(each.flags[name] for name in ("dataset", "data_dir", "image_size"))
        images = (read_json(each.directory / "config.json") or {}).get("data_sha256")
        first = seen.setdefault(flags, (images, each))
        if images and first[0] and images != first[0]:
            raise Failure(DATA, f"runs of one table saw different images ({first[1].directory} and {each.directory})",
                          "bring the images back, or take the runs away that saw the others")
    return {cell.label: {each.seed: each.result() for each in jobs if each.cell is cell} for cell in cells}


@contextmanager
def alone(output: Path):
    """Hold the lock of a sweep's directory, which is made where it is missing.  Failure IN_USE: another sweep holds it."""
    make_directory(output)
    try:
        with open(output / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise Failure(IN_USE, f"another sweep is at work in this directory ({output})",
                      "wait for its end, or choose another --output") from None


def stop(jobs: list[Job], number: int) -> None:
    """Pass a signal on, and wait until all have ended."""
    running = [job.process for job in jobs if job.process]
    for process in running:
        process.send_signal(number)
    for process in running:
        process.wait()


def teacher(flags: dict) -> dict:
    """The digest by which a run knows its teacher, where the file is there."""
    path = Path(flags.get("teacher_checkpoint", ""))
    return {"teacher_sha256": digest_once(path)} if path.is_file() else {}


digest_once = cache(digest)  # most runs of a sweep have one teacher


@cache
def fingerprint(dataset: str, data_dir: str, image_size: int | None) -> str:
    """Of the images that these flags name; reads them, and imports torch for it."""
    from data import datasets
    return datasets.load(dataset, data_dir, val_size=0, image_size=image_size).fingerprint


def read_json(path: Path) -> dict | None:
    """An object of a JSON file; None where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as failure:
        raise damaged(path, failure) from None
    if not isinstance(content, dict):
        raise damaged(path, "it is not an object")
    return content


def damaged(path: Path, reason) -> Failure:
    return Failure(DATA, f"cannot read {path.name}: {reason} ({path})", "repair the file, or take its run away")
