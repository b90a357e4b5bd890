"""How long it takes from the command of a run to the end of its first step, and where the time goes.

    python -m benchmarks.startup              the table -> benchmarks/results/startup-<gpu or cpu>.csv
    python -m benchmarks.startup --quick      once; nothing is written

A student alone on the embedded images, which are drawn anew in each run, in a process of its own each time.  The parts are in
their order: the interpreter; the imports, PyTorch's above all; the data; network, memory estimate, files; the first step.
"""
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks import table

REPEATS = 7
FLAGS = "train_teacher.py --model v2_pico --dataset synthetic --batch-size 64"
CHILD = """
import json, runpy, sys, time
begun, marks = float(sys.argv.pop(1)), []
def mark():
    marks.append(time.time() - begun)
sys.argv.pop(0)
mark()
from training import capture, run
mark()
load, take = run.Run.load_data, capture.Step.__call__
def load_data(self):
    found = load(self)
    mark()
    return found
def step(self, *where):
    mark()
    take(self, *where)
    mark()
    print(json.dumps(marks))
    raise SystemExit
run.Run.load_data, capture.Step.__call__ = load_data, step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Row:
    """Seconds, each a median over the repeats; total is the median of their sums."""
    hardware: str
    torch: str
    command: str
    repeats: int
    interpreter_s: float
    imports_s: float
    data_s: float
    setup_s: float
    first_step_s: float
    total_s: float


def parts(device: str) -> list[float]:
    """Seconds of each part of one start."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, str(time.time()), *FLAGS.split(), "--device", device, "--output", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=table.ROOT)
    ends = json.loads(done.stdout.splitlines()[-1])
    return [end - begin for begin, end in zip([0.0, *ends], ends)]


def main() -> None:
    args = table.flags(__doc__, quick="once")
    repeats = 1 if args.quick else REPEATS
    found = [parts(args.device) for _ in range(repeats)]
    seconds = [round(median(column), 2) for column in (*zip(*found), map(sum, found))]
    device = torch.device(args.device)
    row = Row(table.hardware(device), torch.__version__, f"python {FLAGS}", repeats, *seconds)
    print(f"{row.command}: {row.total_s} s to the end of the first step (interpreter {row.interpreter_s}, "
          f"imports {row.imports_s}, data {row.data_s}, setup {row.setup_s}, first step {row.first_step_s})")
    if not args.quick:
        table.write([row], "startup", table.short(device))


if __name__ == "__main__":
    main()
