"""Time of the runs of a grid, with the teacher computed in each and with its logits stored by the first.

    python -m benchmarks.sweep                four betas, two learning rates -> benchmarks/results/sweep-<gpu or cpu>.csv
    python -m benchmarks.sweep --quick        two runs of one epoch
    python -m benchmarks.sweep --case resnet32x4-resnet8x4 --output DIR

A case is teacher-student; the teacher has random weights, on which no time depends.  Each run is a process of distill.py on the
embedded data, with all augmentations and DKD; those of a pair follow each other.  process_s: the whole process; train_s: the
training in its epochs.  times_base: the speed over that of the run that computes its teacher.
"""
import csv
import itertools
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import models
from benchmarks import table
from benchmarks.loops import networks
from benchmarks.table import MEAN, STD
from rundir import errors
from rundir.errors import BUG, Failure

ROOT = Path(__file__).resolve().parent.parent
CASES = ("v2_tiny-v2_pico", "resnet20-resnet8", "resnet32x4-resnet8x4")
BETAS, RATES, EPOCHS = (1, 2, 4, 8), (0.05, 0.1), 3
BASE = "computed"


def seconds(line: str) -> dict:
    """Run distill.py with these flags: seconds of the process, and of the training in its epochs."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "distill.py", *shlex.split(line)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise Failure(BUG, f"a run failed (distill.py {line}: {done.stderr.strip()})", "run it by itself")
    process_s = time.perf_counter() - began
    with open(Path(shlex.split(line)[-1], "log.csv"), newline="") as file:
        return {"process_s": process_s, "train_s": sum(float(row["epoch_s"]) for row in csv.DictReader(file))}


def benchmark(case: str, args, folder: Path):
    """A row for each run of the grid and contender."""
    (teacher, student), device, quoted = case.split("-"), args.device, shlex.quote(str(folder))
    net, _ = networks((teacher, student), torch.device("cpu"))
    models.save(folder / "teacher.pt", net, **net.info, mean=MEAN, std=STD, dataset="synthetic", test_acc1=None, amp="off")
    grid = list(itertools.product(BETAS, RATES))[:2 if args.quick else None]
    for number, (beta, lr) in enumerate(grid):
        common = (f"--dataset synthetic --method dkd --beta {beta} --lr {lr} --opt sgd --epochs {1 if args.quick else EPOCHS} "
                  f"--device {device} --student {student} --teacher-checkpoint {quoted}/teacher.pt --allow-weak-teacher")
        took = {name: seconds(f"{common} {flags} --output {quoted}/{name}-{beta}-{lr}")
                for name, flags in ((BASE, ""), ("stored", f"--teacher-logits {quoted}/logits"))}
        for name, each in took.items():
            times = {f"times_base_{part}": round(took[BASE][part] / value, 3) for part, value in each.items()}
            yield table.Row(
                **table.versions(device, torch), case=case.replace("-", " to "), beta=beta, lr=lr, contender=name,
                run="later" if number else "first", base=BASE, **{part: round(value, 2) for part, value in each.items()}, **times)


def main(args) -> None:
    found = table.Rows(args, "sweep", table.short(args.device),
                       "case beta lr contender run process_s train_s times_base_process_s times_base_train_s")
    for case in args.case or CASES[:1]:
        with tempfile.TemporaryDirectory() as folder:
            for row in benchmark(case, args, Path(folder)):
                found.add(row)


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "two runs of one epoch", CASES).parse_args())
