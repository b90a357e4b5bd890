"""What the kernels and a training step cost, counted without a GPU.

    PYTHONPATH=. python tests/instructions.py            -> benchmarks/results/kernels-ptx-sm80.csv and -sm90.csv
    PYTHONPATH=. python tests/instructions.py --quick    the two smallest sizes of the loss and one policy
    PYTHONPATH=. python tests/instructions.py --case assembled    -> kernels-sass-triton-<version>.csv beside them

The compiled kernels are executed in numpy (ptx.py), and the scripts run on fake CUDA tensors (cuda_path.py), which counts the
launches of a step: counts are exact.  What is assembled depends on Triton's version: install another one to compare.
The bounds in nanoseconds are a model and no measurement: the counts over the rates in GPUS, which are those of the vendor's data
sheets for clock and schedulers and our estimates of what can be reached for bandwidth; overlap, latency and caches are left out.
"""
import itertools
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: it is to compile

import cuda_path
import ptx
import sass
import test_sass
import torch
import triton
from kernel_cases import fused_batches, hard_logits

from benchmarks import table
from diagnostics.gradients import LOG_EVERY
from kernels import augment, softmax_kl
from losses import dkd_loss, kd_loss
from rundir import errors

# Multiprocessors, schedulers of each, clock in GHz under load, and bytes per nanosecond that a copy reaches.
GPUS = {"h100": (132, 4, 1.7, 3000.0), "h200": (132, 4, 1.7, 4200.0)}
LAUNCH_NS = 2500.0  # of an empty kernel in a CUDA graph
CLASSES, QUICK_CLASSES = {10: 64, 100: 64, 1000: 16, 2048: 4, 32000: 2}, {10: 64, 100: 64}  # and how many rows are executed
IMAGES = {32: 64, 64: 16, 224: 8}  # by their size, how many are executed
POLICIES, QUICK_POLICIES = ("none", "autoaugment", "randaugment", "trivialaugment"), ("autoaugment",)
SECTOR = 32  # bytes
CASES = ("executed", "assembled", "launches")


@dataclass(frozen=True)
class Row:
    """Counts of all launches per row of logits, or per image; warps of the first; bounds of the model in ns per row or image, and
    of the launches."""
    sm: int
    kernel: str
    case: str
    dtype: str
    unit: str
    warps: int
    warp_instructions: float
    lane_instructions_per_class: float | None
    sectors: float
    ideal_sectors: float
    sectors_over_ideal: float
    wavefronts_per_access: float | None
    barriers_per_warp: float
    h100_issue_ns: float
    h100_bytes_ns: float
    h200_issue_ns: float
    h200_bytes_ns: float
    launch_ns: float


@dataclass(frozen=True)
class Code:
    """A kernel as the assembler leaves it: registers of a thread, instructions that spill one, and how many there are in all."""
    triton: str
    sm: int
    kernel: str
    case: str
    registers: int
    spills: int
    instructions: int


def row(sm: int, kernel: str, case: str, dtype, unit: str, launches, count: int, ideal_bytes: float, classes=None) -> Row:
    counts = {name: value / count for name, value in sum((launch.counts for launch in launches), Counter()).items()}
    instructions, sectors = counts["warp instructions"], counts["load sectors"] + counts["store sectors"]
    accesses, ideal = counts.get("shared accesses", 0), ideal_bytes / SECTOR
    bounds = [bound for processors, schedulers, clock, rate in GPUS.values()
              for bound in (instructions / (processors * schedulers * clock), SECTOR * sectors / rate)]
    return Row(sm, kernel, case, str(dtype).removeprefix("torch."), unit, launches[0].warps, round(instructions, 1),
               round(32 * instructions / classes, 1) if classes else None, round(sectors, 1), round(ideal, 1),
               round(sectors / ideal, 2), round(counts["shared wavefronts"] / accesses, 2) if accesses else None,
               round(sum(launch.counts.get("barriers", 0) / (launch.grid * launch.warps) for launch in launches), 1),
               *(round(bound, 3) for bound in bounds), LAUNCH_NS * len(launches))


def losses(sm: int, sizes: dict):
    """KD and DKD, fp32 and bf16: both logits read once and the fp32 gradient written once would be ideal."""
    for classes, rows in sizes.items():
        for dtype in (torch.float32, torch.bfloat16):
            for name, function in (("KD", kd_loss), ("DKD", dkd_loss)):
                z, v, targets = hard_logits(classes, "normal", rows)
                function(z, v, targets)  # its hyperparameters are on the device before the executor watches
                with (ptx.executed(softmax_kl, sm) as launches,
                      mock.patch.object(softmax_kl, "use_triton", lambda tensor: True)):
                    function(z.to(dtype), v.to(dtype), targets)
                ideal = classes * (2 * dtype.itemsize + 4)
                yield row(sm, "softmax_kl", f"{name} C={classes}", dtype, "row", launches, rows, ideal, classes)


def batches(sm: int, policies):
    """The image's bytes read once and the batch written once would be ideal."""
    for policy in policies:
        for size, count in IMAGES.items():
            for dtype in (torch.float32, torch.float16):
                made, _ = fused_batches(policy, size, "elem", dtype, count)
                with ptx.executed(augment, sm) as launches:
                    made.batch(1, range(count))
                ideal = 3 * size * size * (1 + dtype.itemsize)
                yield row(sm, "augment", f"{policy} {size}x{size}", dtype, "image", launches, count, ideal)


def assembled(quick: bool):
    for kernel, cases in (("softmax_kl", test_sass.losses()), ("augment", test_sass.batches())):
        for about, function, call in itertools.islice(cases, 1 if quick else None):
            case = " ".join(f"{name}={value}" for name, value in about.items())
            for sm in sass.ARCHITECTURES:
                code = sass.describe(sass.compile_for(sm, function, call))
                yield Code(triton.__version__, sm, kernel, case, code["registers"], code["spills"], code["instructions"])


def launches_per_step(teacher: str, student: str) -> None:
    with tempfile.TemporaryDirectory() as folder, cuda_path.CudaPath(Path(folder), teacher, student) as path:
        with open(os.devnull, "w") as silent, mock.patch.object(sys, "stdout", silent):
            path.distill("--method dkd --amp fp16 --no-cuda-graph")
    launches = path.watch.launches
    look = launches.pop("diagnostics") * (path.watch.steps - 1)  # of the one step counted that is looked at
    print(f"{teacher} -> {student}, FP16, AdamW: at least {sum(launches.values()):.0f} launches a step: "
          + ", ".join(f"{phase} {count:.3g}" for phase, count in launches.items())
          + f"; diagnostics {look:.0f} every {LOG_EVERY} steps")


def execute(args) -> None:
    sizes, policies = (QUICK_CLASSES, QUICK_POLICIES) if args.quick else (CLASSES, POLICIES)
    for sm in (80, 90):
        found = table.Rows(args, "kernels-ptx", f"sm{sm}")
        for each in (*losses(sm, sizes), *batches(sm, policies)):
            found.add(each)
            print(f"sm_{sm} {each.kernel:10} {each.case:22} {each.dtype:8} {each.warp_instructions:9.0f} warp instructions per "
                  f"{each.unit}, {each.sectors_over_ideal:5.2f} of the ideal sectors", flush=True)


def assemble(args) -> None:
    found = table.Rows(args, "kernels-sass", f"triton {triton.__version__}")
    for each in assembled(args.quick):
        found.add(each)
        print(f"sm_{each.sm:<3} {each.kernel:10} {each.case:52} {each.registers:3} registers, {each.spills:2} spills, "
              f"{each.instructions} instructions", flush=True)


def main(args) -> None:
    torch.set_num_threads(1)
    for case in args.case or CASES:
        if case == "executed":
            execute(args)
        elif case == "assembled":
            assemble(args)
        else:
            for pair in (("resnet32x4", "resnet8x4"), ("efficientnet_v2_l", "efficientnet_v2_s")):
                launches_per_step(*pair)


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "the two smallest sizes of the loss and one policy", CASES).parse_args())
