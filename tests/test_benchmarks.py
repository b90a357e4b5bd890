"""The benchmarks without a test file of their own do what their commands say; what they measure is not judged."""
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoints
from training.machine import Machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
A_KERNEL_AND_A_STEP = """
from benchmarks import instructions
for row in (next(instructions.losses(80, {10: 8})), next(instructions.batches(80, ("none",)))):
    print(row.kernel, row.warp_instructions, row.sectors_over_ideal)
instructions.launches_per_step("resnet20", "resnet8")
"""


def python(*arguments) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": "tests"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name, line", [
    ("loss", r"128 x +100 float32 +dkd +eager reference +[\d.]+ us"),
    ("augmentation", r"128 pipeline +ours, reference +\d+ images/s +1.00"),
    ("startup", r"[\d.]+ s to the end of the first step \(interpreter")])
def test_a_quick_run_prints_a_table_and_writes_nothing(name, line):
    before = {path: path.stat().st_mtime for path in RESULTS.iterdir()}
    assert re.search(line, python("-m", f"benchmarks.{name}", "--quick", "--device", "cpu"))
    assert {path: path.stat().st_mtime for path in RESULTS.iterdir()} == before


def test_a_checkpoint_costs_something():
    row = checkpoints.benchmark("v2_pico", Machine(torch.device("cpu"), "off"), 1, "this machine")
    assert all(value > 0 for name, value in dataclasses.asdict(row).items()
               if name in ("megabytes", "step_ms", "epoch_s", "held_up_s", "written_s"))


def test_instructions_and_launches_are_counted():
    softmax_kl, augment, step = python("-c", A_KERNEL_AND_A_STEP).splitlines()
    for name, line in (("softmax_kl", softmax_kl), ("augment", augment)):
        assert line.split()[0] == name and all(float(number) > 1 for number in line.split()[1:])
    assert re.match(r"resnet20 -> resnet8, FP16, AdamW: at least \d{3} launches a step: augmentation 1, .* every 40 steps$", step)
