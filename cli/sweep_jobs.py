"""The runs of a sweep: commands, processes, results.  Imports no torch."""
import multiprocessing
import os
import runpy
import shlex
import shutil
import sys
import threading
import time
from collections import Counter
from contextlib import chdir, suppress
from functools import cache
from itertools import zip_longest
from multiprocessing import forkserver
from pathlib import Path

from cli import sweep_grid
from rundir.errors import BUG, DATA, DIVERGED, STOPPED, USAGE, Failure
from rundir.files import damaged, existing_digest, make_directory, read_json, write_json
from rundir.identity import DIGESTS, NON_EXPERIMENT_FLAGS, listed, same_flag, unlisted

AUTOMATIC = (None, "auto")  # values that a run resolves itself, in config.json
# Flags that say which images are read.
IMAGES = ("dataset", "data_dir", "image_size", "crop", "unreadable", "allow_empty_classes")
NUMBERS = ("test_acc1_best", "test_acc1_last", "wall_s")
server = multiprocessing.get_context("forkserver")


class Job:
    """One run of a cell of a sweep, in its folder `output`: in <cell>-s<seed>, with its terminal output in logs.

    root: the folder of the scripts.  flags: as in config.json.  code: exit code, 0 if there is a result.  seconds: wall time.
    """

    def __init__(self, sweep: "Sweep", cell: sweep_grid.Cell, seed: int, root: Path):
        name, self.sweep, self.cell, self.seed = f"{cell.name}-s{seed}", sweep, cell, seed
        self.directory, self.log = sweep.output / name, sweep.output / "logs" / f"{name}.txt"
        self.command = [str(root / cell.script), *sweep_grid.command(cell.flags), "--seed", str(seed), "--resume", "auto",
                        "--output", str(self.directory)]
        self.flags = {name: value for name, value in vars(cell.runs[seed]).items() if name not in NON_EXPERIMENT_FLAGS}
        self.process, self.stopped, self.lock = None, False, threading.Lock()
        self.code, self.seconds = 0, 0.0

    def __str__(self) -> str:
        return f"{self.sweep.name}{': ' * bool(self.sweep.name)}{self.cell.label} seed {self.seed}"

    def shown(self) -> str:
        return shlex.join(["python", self.cell.script, *self.command[1:]])

    def run(self, threads: int) -> "Job":
        """Run the process, unless `stop` was called.  threads: OMP_NUM_THREADS, unless it is set."""
        make_directory(self.log.parent)
        with open(self.log, "ab") as log, self.lock:
            if self.stopped:
                return self
            log.write(f"$ {self.shown()}\n".encode())
            log.flush()
            self.begin, started = log.tell(), time.monotonic()
            self.process = server.Process(target=run_script, args=(self.command, self.log, threads, os.getcwd()))
            self.process.start()
        self.process.join()
        code, self.seconds = self.process.exitcode, time.monotonic() - started
        with self.lock:
            self.process = None  # another process may have its number now
        self.code = 0 if self.result() else STOPPED - code if code < 0 else code or BUG
        return self

    def stop(self, number: int) -> None:
        """Send a signal to the process, and prevent a later start."""
        with self.lock:
            self.stopped = True
            if self.process:
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(self.process.pid, number)

    def outcome(self, metric: str) -> str:
        if self.code:
            return f"failed with exit code {self.code}: {self.reason()} ({self.log})"
        result = self.result()
        return f"{result['verdict']}, {result[metric]:.2f} %" if metric in result else result["verdict"]

    def reason(self) -> str:
        """The error message of a failed run, else its last line of output."""
        with open(self.log, "rb") as log:
            log.seek(self.begin)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["no output"])[-1]

    def result(self) -> dict | None:
        """summary.json, or only a verdict if the run diverged; None while it is unfinished."""
        summary = read_json(self.directory / "summary.json")
        if summary:
            if not all(isinstance(summary.get(name), (int, float)) for name in NUMBERS) or "verdict" not in summary:
                raise damaged(self.directory / "summary.json", "numbers are missing")
            return summary
        status = read_json(self.directory / "status.json") or {}
        return {"verdict": "diverged"} if status.get("exit_code") == DIVERGED else None

    def compare(self, recorded: dict | None) -> dict:
        """The flags to record.  Failure USAGE: the run in the directory had other flags.

        recorded: the flags from an earlier sweep; without them any value that the run resolved itself is accepted.
        """
        old = read_json(self.directory / "config.json")
        if old is None:
            return self.flags
        given = recorded or self.flags
        old |= {name: given.get(name) for name, value in self.flags.items() if value in AUTOMATIC}
        new = {"script": self.cell.script.removesuffix(".py")} | self.flags
        for name in DIGESTS.keys() - {"data_dir"}:  # a file may change under its name
            if (value := self.flags.get(name)) not in (None, "none", "imagenet") and (found := digests(value)):
                new[DIGESTS[name]] = found
        changed = [f"{name} {old.get(name)} -> {value}" for name, value in new.items()
                   if not same_flag(name, old, new, self.sha256_of)]
        if changed:
            raise Failure(USAGE, f"the directory has a run with other flags ({self.directory}: {', '.join(changed)})",
                          "use its flags, or choose another --output")
        return given

    def sha256_of(self, name: str) -> str | list[str] | None:
        """SHA-256 of the images or the files of flag `name`; None if there is no file."""
        if name == "data_dir":
            return fingerprint(*(self.flags[flag] for flag in IMAGES))
        return digests(self.flags[name])


def start_server(root: Path, jobs: list[Job]) -> None:
    """Start the fork server, and import there what takes its processes seconds: torch, our modules, the synthetic images."""
    embedded = any(job.flags["dataset"] == "synthetic" for job in jobs)
    server.set_forkserver_preload(["training.run", *["data.embedded"] * embedded])
    if jobs:
        with chdir(root):  # it imports from there
            forkserver.ensure_running()


def run_script(command: list[str], log: Path, threads: int, directory: str) -> None:
    """Run the script in this new process, as `OMP_NUM_THREADS=threads python COMMAND >> log 2>&1` would."""
    os.chdir(directory)
    os.setpgid(0, 0)  # Ctrl-C reaches it once, through `stop`; a second signal would kill it
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    import torch
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(threads)).partition(",")[0]))  # one for each level
    runpy.run_path(command[0], run_name="__main__")


class Sweep:
    """The runs of cells, in `output`, with one table.

    control: the cell that the others are compared with.  Runs with one teacher and one seed share its logits in `teacher_logits`,
    unless a flag names another folder.
    """

    def __init__(self, name: str, output: Path, cells: list[sweep_grid.Cell], control: sweep_grid.Cell, root: Path):
        self.name, self.output, self.cells, self.control = name, output, cells, control
        repeats = zip_longest(*(cell.runs for cell in cells))  # seed by seed, so that pairs are complete early
        self.jobs = [Job(self, cell, seed, root) for seeds in repeats for cell, seed in zip(cells, seeds) if seed is not None]
        self.teacher_logits = output / "teacher-logits"
        sizes = Counter(map(teacher_and_seed, self.jobs))
        for job in self.jobs:
            if job.cell.script == "distill.py" and sizes[teacher_and_seed(job)] > 1 and "--teacher-logits" not in job.cell.flags:
                job.command += ["--teacher-logits", str(self.teacher_logits)]

    def record(self) -> None:
        """Check the directories of all runs and record their flags in sweep.json, before any run starts; tidy an ended sweep."""
        path = self.output / "sweep.json"
        recorded = read_json(path) or {}
        if not all(isinstance(flags, dict) for flags in recorded.values()):
            raise damaged(path, "not the flags of runs")
        others = recorded.keys() - {job.directory.name for job in self.jobs}
        if others:
            print(f"{len(others)} runs of another sweep are left out of the table: {min(others)}, ...")
        write_json(path, recorded | {job.directory.name: job.compare(recorded.get(job.directory.name)) for job in self.jobs})
        self.tidy()

    def results(self) -> dict[str, dict[int, dict]]:
        """Label of a cell -> seed -> result.  Failure DATA: runs with the same flags were trained on different images."""
        seen, found = {}, {cell.label: {} for cell in self.cells}
        for job in (job for job in self.jobs if not job.code):
            flags = tuple(job.flags[name] for name in IMAGES)
            images = (read_json(job.directory / "config.json") or {}).get("data_sha256")
            first_images, first = seen.setdefault(flags, (images, job))
            if images and first_images and images != first_images:
                raise Failure(DATA, f"runs of one table have different images ({first.directory} and {job.directory})",
                              "restore the images, or remove the runs on the others")
            found[job.cell.label][job.seed] = job.result()
        return found

    def tidy(self) -> None:
        """Delete the teacher's logits once every run has a result."""
        if all(job.result() for job in self.jobs):
            shutil.rmtree(self.teacher_logits, ignore_errors=True)


def teacher_and_seed(job: Job) -> tuple[str, int]:
    return str(job.flags.get("teacher_checkpoint")), job.seed


cached_digest = cache(existing_digest)  # most runs of a sweep share one teacher


def digests(paths) -> str | list[str] | None:
    """SHA-256 of one file or each of several; None if one is missing."""
    found = [cached_digest(path) for path in listed(paths)]
    return unlisted(found) if all(found) else None


@cache
def fingerprint(dataset: str, *flags) -> str:
    """SHA-256 of the images; reads them, and imports torch.  flags: the values of IMAGES."""
    from data import datasets
    return datasets.load(dataset, val_size=0, **dict(zip(IMAGES[1:], flags))).fingerprint
