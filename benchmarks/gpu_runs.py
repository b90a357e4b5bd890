"""Whole runs of the scripts for benchmarks.gpu_day: in all their variants, which must agree, and real training that can go on.

    python -m benchmarks.gpu_runs variants --output DIR                                   on the embedded images
    python -m benchmarks.gpu_runs unpack --output DIR/unpack --data images.tar.xz         once, to DIR/<its digest>/images
    python -m benchmarks.gpu_runs runs --output DIR/runs --data images.tar.xz --seconds 500

runs: two chains, side by side where there are cores: a teacher, then its students and one alone.  Epochs and seeds are planned
from short runs that measure an epoch, and kept in DIR/<digest>/plan.json: called again, it goes on with the same plan.
"""
import csv
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch

from benchmarks import table
from cli.flag_types import positive
from cli.options import debug_flag
from data import datasets
from rundir import errors
from rundir.files import as_csv, digest, make_directory, write_atomic, write_json

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"images_per_s", "epoch_s", "val_s", "total_s", "peak_mem_mb"}  # columns of log.csv that no two runs share
VARIANTS = {  # of a student of v2_pico, after the teacher; fp16 and a CUDA graph are the default on a GPU
    "dkd": "--method dkd", "dkd-eager": "--method dkd --no-cuda-graph", "fp32": "--method dkd --amp off",
    "fp32-eager": "--method dkd --amp off --no-cuda-graph", "deterministic": "--method dkd --deterministic",
    "deterministic-2": "--method dkd --deterministic", "killed": "--method dkd --deterministic", "kd": "--method kd",
    "bf16": "--method kd --amp bf16", "adamw-ema": "--method kd --opt adamw --lr 1e-3 --model-ema 0.99",
    "v2-s": "--method kd --student efficientnet_v2_s --opt adamw --lr 1e-3", "dkd-warmup": "--method dkd --dkd-warmup 2",
    "accum": "--method kd --grad-accum 2", "checkpoint": "--method kd --grad-checkpoint", "dist": "--method dist",
    "reference": "--method kd --kernels reference", "compiled": "--method dkd --compile"}
AGREE = {"dkd-eager": ("dkd", 0.05), "fp32-eager": ("fp32", 0.05), "deterministic-2": ("deterministic", 0.0),
         "killed": ("deterministic", 0.0)}  # with which one, and how far losses may be apart, relative; 0 is the same text
CHAINS = {"resnet": ("resnet32x4", "resnet8x4", "--opt sgd --lr 0.1 --weight-decay 5e-4"),
          "efficientnet": ("efficientnet_v2_s", "v2_tiny", "--lr 2e-3")}
TINY_VARIANTS, TINY_CHAINS = ("deterministic", "killed"), {"tiny": ("v2_pico", "v2_pico", "--batch-size 8")}
STUDENTS, MOST_EPOCHS, SEEDS = ("v2", "v3", "v3.1", "alone", "v1"), 30, (42, 43, 44)
LEAST, GRACE = 10, 5  # seconds that a run needs, and that one that is stopped may take to end


class Ended(NamedTuple):
    outcome: str
    seconds: float
    line: str  # the error, or the last that it printed


def run(command: str, output: Path, end: float, kill_after: int | None = None) -> Ended:
    """A script, until `end` of time.monotonic() at most.  kill_after: it is killed after so many epochs."""
    started, text = time.monotonic(), output.with_suffix(".txt")
    if end - started < LEAST:
        return Ended("not begun", 0.0, "")
    make_directory(output.parent)
    with open(text, "wb") as log:
        process = subprocess.Popen([sys.executable, *command.split(), "--output", str(output), "--resume", "auto"], cwd=ROOT,
                                   stdout=log, stderr=log)
        asked = False
        while process.poll() is None:
            late = time.monotonic() - end
            if late > GRACE or kill_after and len(log_of(output)) >= kill_after:
                process.kill()
            elif late > 0 and not asked:
                asked = not process.terminate()
            time.sleep(0.1)
    lines = text.read_text(errors="replace").splitlines() or [""]
    line = next((line for line in lines if line.startswith("error:")), lines[-1])[:200]
    outcome = "ok" if process.returncode == 0 else "out of time" if asked else f"failed ({process.returncode})"
    print(f"--- {output.name}: {outcome}", *lines[-60:], sep="\n", flush=True)
    return Ended(outcome, round(time.monotonic() - started, 1), line)


def log_of(output: Path) -> list[dict]:
    """The rows of log.csv."""
    path = output / "log.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


@dataclass(frozen=True)
class Variant:
    """Columns of its last epoch; difference: from the log of another variant, see AGREE."""
    variant: str
    outcome: str
    seconds: float
    epochs: int
    train_loss: str
    val_acc1: str
    images_per_s: str
    skipped_steps: str
    peak_mem_mb: str
    compared_with: str
    difference: float | None
    ok: bool
    line: str


def difference(one: list[dict], other: list[dict], exact: bool) -> float:
    """Of two logs: exact: how many cells differ but for clocks; else the largest relative difference of a training loss."""
    if len(one) != len(other) or not one:
        return float("inf")
    if exact:
        return sum(first[name] != second[name] for first, second in zip(one, other) for name in first.keys() - CLOCKS)
    return max(abs(float(first["train_loss"]) / float(second["train_loss"]) - 1) for first, second in zip(one, other))


def variants(args) -> None:
    end, folder, rows = args.end, args.output / "variants", table.Rows(args, "variants", table.short(args.device))
    recipe = "--dataset synthetic --epochs 3 --warmup-epochs 1 --batch-size 128 --opt sgd --lr 0.05 --patience 0"
    if args.tiny:
        pictures(args.output / "images")
        recipe = f"--dataset imagefolder --data-dir {args.output}/images --epochs 2 --warmup-epochs 1 --batch-size 8 --lr 0.01"
    recipe += f" --device {args.device}"

    def one(name: str, flags: str) -> None:
        command = f"distill.py --student v2_pico --teacher-checkpoint {folder}/teacher/best.pt {recipe} {flags}"
        if name == "killed" and (ended := run(command, folder / name, end, kill_after=1)).outcome != "failed (-9)":
            keep(name, ended._replace(outcome=f"{ended.outcome} before it was killed"))
        else:
            keep(name, run(command, folder / name, end))

    def keep(name: str, ended: Ended) -> None:
        other, allowed = AGREE.get(name, ("", 0.0))
        log = log_of(folder / name)
        apart = difference(log, log_of(folder / other), allowed == 0) if other else None
        last = log[-1] if log else {}
        columns = (last.get(column, "") for column in ("train_loss", "val_acc1", "images_per_s", "skipped_steps", "peak_mem_mb"))
        rows.add(Variant(name, ended.outcome, ended.seconds, len(log), *columns, other, apart,
                         ended.outcome == "ok" and (apart or 0.0) <= allowed, ended.line))

    keep("teacher", run(f"train_teacher.py --model v2_tiny {recipe}", folder / "teacher", end))
    chosen = {name: VARIANTS[name] for name in (TINY_VARIANTS if args.tiny else VARIANTS)}
    bases = {other for other, _ in AGREE.values()}
    for together in (bases, AGREE, chosen.keys() - bases - AGREE.keys()):  # what others are compared with is there before them
        with ThreadPoolExecutor(min(5, os.cpu_count())) as pool:
            list(pool.map(lambda name: one(name, chosen[name]), [name for name in chosen if name in together]))
    wrong = [row.variant for row in rows.all if not row.ok]
    print(f"{len(wrong)} of {len(rows.all)} variants failed or differ", *wrong, sep="; ")
    raise SystemExit(bool(wrong))


def pictures(folder: Path) -> None:
    """Two classes of noise, as JPEG."""
    from PIL import Image
    for name, count in (("train/a", 20), ("train/b", 20), ("test/a", 8), ("test/b", 8)):
        make_directory(folder / name)
        for index in range(count):
            Image.frombytes("RGB", (32, 32), os.urandom(3 * 32 * 32)).save(folder / name / f"{index}.jpg")


def kept(args) -> Path:
    return args.output.parent / digest(args.data)[:12]


def unpack(args) -> None:
    whole, partial = kept(args) / "images", kept(args) / "images.partial"
    if not whole.exists():
        try:
            with tarfile.open(args.data) as archive:
                archive.extractall(partial, filter="data")
        except (tarfile.TarError, EOFError, lzma.LZMAError) as failure:
            raise errors.Failure(errors.DATA, f"cannot be unpacked ({args.data})", "name a whole archive") from failure
        os.replace(partial, whole)
    print(datasets.load("imagefolder", whole))  # which decodes them


@dataclass(frozen=True)
class Trained:
    """images_per_s, last_epoch_s and peak_mem_mb: of the last epoch; the first one includes what is compiled and chosen."""
    hardware: str
    torch: str
    chain: str
    run: str
    seed: int
    outcome: str
    epochs: int
    of_epochs: int
    test_acc1: float | None
    retention: float | None
    verdict: str | None
    images_per_s: str | None
    first_epoch_s: str | None
    last_epoch_s: str | None
    peak_mem_mb: str | None
    line: str


class Chain:
    """A teacher and its students in `folder`/<name>."""

    def __init__(self, args, name: str, networks: tuple, folder: Path):
        self.args, self.name, self.folder = args, name, folder / name
        self.teacher, self.student, recipe = networks
        self.flags = f"--dataset imagefolder --data-dir {folder / 'images'} --device {args.device} --patience 0 {recipe}"

    def command(self, which: str, seed: int, epochs: int, folder: Path) -> str:
        flags = f"{self.flags} --seed {seed} --epochs {epochs} --warmup-epochs {min(2, epochs - 1)}"
        if which in ("teacher", "alone"):
            return f"train_teacher.py --model {self.teacher if which == 'teacher' else self.student} --no-pretrained {flags}"
        teacher = folder / f"teacher-s{SEEDS[0]}" / "best.pt"
        return f"distill.py --experiment {which} --student {self.student} --teacher-checkpoint {teacher} {flags}"

    def measure(self, which: str, end: float) -> tuple[float, float]:
        """Seconds before the epochs of a run, and of an epoch."""
        probe = self.folder / "probe" / which
        shutil.rmtree(probe, ignore_errors=True)  # one that is whole would start in no time
        if (ended := run(self.command(which, SEEDS[0], 2, probe.parent), probe, end)).outcome != "ok":
            raise errors.Failure(errors.BUG, f"no epoch could be measured ({self.name} {which}: {ended.line})", "see its log")
        epoch = sum(float(log_of(probe)[-1][name]) for name in ("epoch_s", "val_s"))
        return max(0.0, ended.seconds - 2 * epoch), epoch

    def plan(self, seconds: float) -> dict:
        """Epochs and seeds with which all runs take at most so many seconds, in four fifths of them: kept once it is made.

        The step of a student takes its own time and that of the teacher's forward pass, a third of the teacher's step.
        """
        path, end = self.folder / "plan.json", time.monotonic() + seconds
        if not path.exists():
            (before, long), (_, short) = (self.measure(which, end) for which in ("teacher", "alone"))
            budget = 0.8 * (end - time.monotonic())
            once, each = long, len(STUDENTS) * short + (len(STUDENTS) - 1) * long / 3  # an epoch of all of a seed
            most = 2 if self.args.tiny else MOST_EPOCHS
            epochs = max(2, min(most, int((budget - (1 + len(STUDENTS)) * before) / (once + each))))
            more = (budget - before - epochs * once) / (len(STUDENTS) * before + epochs * each)
            write_json(path, {"epochs": epochs, "seeds": SEEDS[:1 if self.args.tiny else max(1, int(more))], "start_s": before,
                              "teacher_epoch_s": long, "student_epoch_s": short})
        found = json.loads(path.read_text())
        print(f"plan of {self.name}: {found}", flush=True)
        return found

    def go(self, seconds: float, keep) -> None:
        """Every run of the plan; keep: is called with the row of each."""
        end, plan = time.monotonic() + seconds, self.plan(seconds)
        epochs, students = plan["epochs"], STUDENTS[:1 if self.args.tiny else None]
        for which, seed in [("teacher", SEEDS[0]), *((which, seed) for seed in plan["seeds"] for which in students)]:
            output = self.folder / f"{which}-s{seed}"
            keep(self.row(which, seed, epochs, output, run(self.command(which, seed, epochs, self.folder), output, end)))

    def row(self, which: str, seed: int, epochs: int, output: Path, ended: Ended) -> Trained:
        log, summary = log_of(output), output / "summary.json"
        found = json.loads(summary.read_text()) if summary.exists() else {}
        first, last = (log[0], log[-1]) if log else ({}, {})
        return Trained(table.hardware(self.args.device), torch.__version__, self.name, which, seed, ended.outcome, len(log),
                       epochs, *map(found.get, ("test_acc1_best", "retention", "verdict")), last.get("images_per_s"),
                       first.get("epoch_s"), last.get("epoch_s"), last.get("peak_mem_mb"), ended.line)


def train(args) -> None:
    if not (kept(args) / "images").exists():
        raise errors.Failure(errors.DATA, f"not unpacked yet ({args.data})", "begin with the part unpack")
    rows, lock, failures = [], Lock(), []

    def keep(row: Trained) -> None:
        with lock:
            rows.append(asdict(row))
            write_atomic(args.output / "runs.csv", as_csv(list(rows[0]), rows))
        print(*asdict(row).values(), flush=True)

    chains = [Chain(args, name, networks, kept(args)) for name, networks in (TINY_CHAINS if args.tiny else CHAINS).items()]
    together = min(len(chains), os.cpu_count())

    def go(chain: Chain) -> None:
        try:
            left = args.end - time.monotonic()
            chain.go(left if together > 1 else left / (len(chains) - chains.index(chain)), keep)
        except errors.Failure as failure:  # the other chain goes on
            failures.append(str(failure))

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(go, chains))
    bad = [*failures, *(f"{row['chain']} {row['run']}" for row in rows if row["outcome"].startswith("failed"))]
    print(f"{sum(row['outcome'] == 'ok' for row in rows)} of {len(rows)} runs are whole", *bad, sep="; ")
    raise SystemExit(bool(bad))


def main(args) -> None:
    args.device, args.end = table.device(args.device), time.monotonic() + args.seconds - 8  # a stopped run takes some to end
    {"variants": variants, "unpack": unpack, "runs": train}[args.task](args)


if __name__ == "__main__":
    parser = errors.Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("task", choices=("variants", "unpack", "runs"))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="FILE", help="an archive of train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--seconds", type=positive, default=540)
    table.device_flag(parser.add_argument)
    parser.add_argument("--tiny", action="store_true", help="the smallest networks on a few images")
    debug_flag(parser.add_argument)
    errors.run(main, parser.parse_args())
