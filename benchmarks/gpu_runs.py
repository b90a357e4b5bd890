"""Whole runs of the scripts for benchmarks.gpu_day: all variants, which must agree, and resumable training.

    python -m benchmarks.gpu_runs variants --output DIR                                   on the embedded images
    python -m benchmarks.gpu_runs runs --output DIR --work DIR --data images.tar.xz --seconds 500

runs: the archive is unpacked once, to WORK/<its digest>/images.  Then two chains, in parallel where there are cores: a teacher,
its students and one alone.  Epochs are planned from short runs that measure one, and kept in WORK/<digest>/<chain>/plan.json: a
later call goes on with the same plan.
"""
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from csv import DictReader
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from benchmarks import table
from cli.flag_types import positive
from rundir import errors
from rundir.files import digest, make_directory, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"images_per_s", "epoch_s", "val_s", "total_s", "peak_mem_mb"}  # columns of log.csv that differ between equal runs
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
          "efficientnet": ("efficientnet_v2_s", "v2_tiny", "--lr 2e-3")}  # teacher, student, recipe
TINY_VARIANTS, TINY_CHAINS = ("deterministic", "killed"), {"tiny": ("v2_pico", "v2_pico", "--batch-size 8")}
STUDENTS, MOST_EPOCHS = ("v2", "v3", "v3.1", "alone", "v1"), 30
LEAST, GRACE = 10, 5  # seconds that a run needs, and from SIGTERM to SIGKILL


class Ended(NamedTuple):
    outcome: str
    seconds: float
    line: str  # the error, or the last line of output


def run(command: str, output: Path, end: float, kill_after: int | None = None) -> Ended:
    """A script, until `end` of time.monotonic() at most.  kill_after: it is killed after so many epochs."""
    started, text = time.monotonic(), output.with_suffix(".txt")
    if end - started < LEAST:
        return Ended("not begun", 0.0, "")
    make_directory(output.parent)
    with open(text, "wb") as log:
        process = subprocess.Popen([sys.executable, *shlex.split(command), "--output", str(output), "--resume", "auto"], cwd=ROOT,
                                   stdout=log, stderr=log)
        terminated = False
        while process.poll() is None:
            late = time.monotonic() - end
            if late > GRACE or kill_after and len(log_of(output)) >= kill_after:
                process.kill()
            elif late > 0 and not terminated:
                terminated = not process.terminate()
            time.sleep(0.1)
    lines = text.read_text(errors="replace").splitlines() or [""]
    line = next((line for line in lines if line.startswith("error:")), lines[-1])[:200]
    outcome = "ok" if process.returncode == 0 else "out of time" if terminated else f"failed ({process.returncode})"
    print(f"--- {output.name}: {outcome}", *lines[-60:], sep="\n", flush=True)
    return Ended(outcome, round(time.monotonic() - started, 1), line)


def log_of(output: Path) -> list[dict]:
    """The rows of log.csv."""
    path = output / "log.csv"
    return list(DictReader(path.read_text().splitlines())) if path.exists() else []


def difference(one: list[dict], other: list[dict], exact: bool) -> float:
    """Of two logs: exact: how many cells differ but for clocks; else the largest relative difference of a training loss."""
    if len(one) != len(other) or not one:
        return float("inf")
    if exact:
        return sum(first[name] != second[name] for first, second in zip(one, other) for name in first.keys() - CLOCKS)
    return max(abs(float(first["train_loss"]) / float(second["train_loss"]) - 1) for first, second in zip(one, other))


def variants(args) -> list[str]:
    """A row for each variant, columns of the last epoch; those that failed or differ.

    difference: from the log of the variant in compared_with.
    """
    folder, rows = args.work / "variants", table.Rows(args, "variants", table.short(args.device), "variant outcome ok line")
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
    recipe = "--dataset synthetic --epochs 3 --warmup-epochs 1 --batch-size 128 --opt sgd --lr 0.05 --patience 0"
    if args.tiny:
        pictures(args.work / "images")
        recipe = (f"--dataset imagefolder --data-dir {shlex.quote(str(args.work))}/images --epochs 2 --warmup-epochs 1 "
                  "--batch-size 8 --lr 0.01")
    recipe += f" --device {args.device}"

    def distill(name: str) -> None:
        command = (f"distill.py --student v2_pico --teacher-checkpoint {shlex.quote(str(folder))}/teacher/best.pt "
                   f"--allow-weak-teacher {recipe} {VARIANTS[name]}")
        if name == "killed" and (ended := run(command, folder / name, args.end, kill_after=1)).outcome != "failed (-9)":
            keep(name, ended._replace(outcome=f"{ended.outcome} before it was killed"))
        else:
            keep(name, run(command, folder / name, args.end))

    def keep(name: str, ended: Ended) -> None:
        other, allowed = AGREE.get(name, ("", 0.0))
        log = log_of(folder / name)
        apart = difference(log, log_of(folder / other), allowed == 0) if other else None
        columns = ("train_loss", "val_acc1", "images_per_s", "skipped_steps", "peak_mem_mb")
        rows.add(table.Row(variant=name, outcome=ended.outcome, seconds=ended.seconds, epochs=len(log),
                           **{column: log[-1].get(column, "") if log else "" for column in columns}, compared_with=other,
                           difference=apart, ok=ended.outcome == "ok" and (apart or 0.0) <= allowed, line=ended.line))

    keep("teacher", run(f"train_teacher.py --model v2_tiny {recipe}", folder / "teacher", args.end))
    bases = {other for other, _ in AGREE.values()}
    for together in (bases, AGREE, VARIANTS.keys() - bases - AGREE.keys()):  # a variant after that which it is compared with
        with ThreadPoolExecutor(min(5, os.cpu_count())) as pool:
            list(pool.map(distill, [name for name in (TINY_VARIANTS if args.tiny else VARIANTS) if name in together]))
    return [row.variant for row in rows.all if not row.ok]


def pictures(folder: Path) -> None:
    """Write two classes of noise as JPEG files."""
    for name, count in (("train/a", 20), ("train/b", 20), ("test/a", 8), ("test/b", 8)):
        make_directory(folder / name)
        for index in range(count):
            Image.frombytes("RGB", (32, 32), os.urandom(3 * 32 * 32)).save(folder / name / f"{index}.jpg")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `archive` to `folder`, once."""
    partial = folder.with_suffix(".partial")
    if not folder.exists():
        try:
            with tarfile.open(archive) as file:
                file.extractall(partial, filter="data")
        except (tarfile.TarError, EOFError, lzma.LZMAError) as failure:
            raise errors.Failure(errors.DATA, f"cannot be unpacked ({archive})", "name a whole archive") from failure
        os.replace(partial, folder)


def train_chain(args, folder: Path, seconds: float, rows: table.Rows) -> None:
    """Plan and train the chain of CHAINS that `folder` is named after, in at most so many seconds."""
    end, (teacher, student, recipe) = time.monotonic() + seconds, (CHAINS | TINY_CHAINS)[folder.name]
    images = shlex.quote(str(folder.parent / "images"))
    recipe += f" --dataset imagefolder --data-dir {images} --device {args.device} --patience 0"

    def command(which: str, epochs: int) -> str:
        flags = f"{recipe} --epochs {epochs} --warmup-epochs {min(2, epochs - 1)}"
        if which in ("teacher", "alone"):
            return f"train_teacher.py --model {teacher if which == 'teacher' else student} --no-pretrained {flags}"
        # A teacher of a probe, or of few epochs, may be weak.
        return (f"distill.py --experiment {which} --student {student} --teacher-checkpoint "
                f"{shlex.quote(str(folder))}/teacher/best.pt --allow-weak-teacher {flags}")

    def measure(which: str) -> tuple[float, float]:
        """Seconds of a run outside its epochs, and of an epoch."""
        probe = folder / "probe" / which
        shutil.rmtree(probe, ignore_errors=True)  # one that is whole would start in no time
        if (ended := run(command(which, 2), probe, end)).outcome != "ok":
            raise errors.Failure(errors.BUG, f"no epoch could be measured ({folder.name} {which}: {ended.line})", "see its log")
        epoch = sum(float(log_of(probe)[-1][column]) for column in ("epoch_s", "val_s"))
        return max(0.0, ended.seconds - 2 * epoch), epoch

    if not (folder / "plan.json").exists():  # all runs are to take four fifths of the time
        (start, teacher_s), (_, student_s) = measure("teacher"), measure("alone")
        runs = len(STUDENTS)  # those with a teacher also take its forward passes, a third of its step
        epochs = (0.8 * (end - time.monotonic()) - (1 + runs) * start) / (teacher_s * (1 + (runs - 1) / 3) + runs * student_s)
        write_json(folder / "plan.json", {"epochs": max(2, min(2 if args.tiny else MOST_EPOCHS, int(epochs))), "start_s": start,
                                          "teacher_epoch_s": teacher_s, "student_epoch_s": student_s})
    epochs = read_json(folder / "plan.json")["epochs"]
    for which in ("teacher", *STUDENTS[:1 if args.tiny else None]):
        ended, log = run(command(which, epochs), folder / which, end), log_of(folder / which)
        summary, first, last = read_json(folder / which / "summary.json") or {}, *((log[0], log[-1]) if log else ({}, {}))
        rows.add(table.Row(
            **table.versions(args.device, torch), chain=folder.name, run=which, outcome=ended.outcome, epochs=len(log),
            of_epochs=epochs, test_acc1=summary.get("test_acc1_best"), retention=summary.get("retention"),
            verdict=summary.get("verdict"), images_per_s=last.get("images_per_s"), first_epoch_s=first.get("epoch_s"),
            last_epoch_s=last.get("epoch_s"), peak_mem_mb=last.get("peak_mem_mb"), line=ended.line))


def train(args) -> list[str]:
    """A row for each run of all chains; what failed."""
    folder, chains, failures = args.work / digest(args.data)[:12], list(TINY_CHAINS if args.tiny else CHAINS), []
    unpack(args.data, folder / "images")
    rows = table.Rows(args, "runs", table.short(args.device), "chain run outcome epochs of_epochs test_acc1 verdict line")
    parallel = min(len(chains), os.cpu_count())

    def one(name: str) -> None:
        left = args.end - time.monotonic()
        try:
            train_chain(args, folder / name, left if parallel > 1 else left / (len(chains) - chains.index(name)), rows)
        except errors.Failure as failure:  # the other chain goes on
            failures.append(str(failure))

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(one, chains))
    return [*failures, *(f"{row.chain} {row.run}" for row in rows.all if row.outcome.startswith("failed"))]


def main(args) -> None:
    args.end = time.monotonic() + args.seconds - 8  # a stopped run takes some to end
    wrong = {"variants": variants, "runs": train}[args.task](args)
    print(f"{len(wrong)} runs failed or differ", *wrong, sep="; ")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    parser = table.parser(__doc__, tiny=True)
    parser.add_argument("task", choices=("variants", "runs"))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu-day", metavar="DIR", help="where the runs go")
    parser.add_argument("--data", type=Path, metavar="FILE", help="an archive of train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--seconds", type=positive, default=540)
    errors.run(main, parser.parse_args())
