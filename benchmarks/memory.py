"""The largest batch that fits into a GPU, by the estimate of training/memory.py; nothing is measured.

    python -m benchmarks.memory               the pairs of the study -> benchmarks/results/memory-estimate.csv
    python -m benchmarks.memory --quick       the smallest pair

Distillation as in experiment v2: FP16, AdamW, no moving average, all of CIFAR-100 on the GPU at 32x32; the networks enlarge the
images themselves.  Without --grad-checkpoint steps are a CUDA graph.  A batch fits where a step is estimated to take at most
90 % of the memory: the rest is for what is not counted.
"""
import argparse
import math
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from benchmarks import table
from training import memory, models
from training.machine import Machine
from training.recompute import recompute
from training.step import Update, build_optimizer

MACHINE = Machine(torch.device("cpu"), "fp16")
RECIPE = SimpleNamespace(opt="adamw", lr=1e-3, weight_decay=0.05)
CLASSES, SIZE, IMAGES = 100, 32, 60_000
CARDS = (8, 12, 24, 80)  # GiB
STEP, MOST = 8, 45_000  # images: between the batch sizes that are tried, and the largest: all that are trained on


class Pair(NamedTuple):
    teacher: str
    student: str
    image_size: int


PAIRS = (Pair("resnet20", "resnet8", 32), Pair("resnet32x4", "resnet8x4", 32),
         *(Pair("efficientnet_v2_l", "efficientnet_v2_s", size) for size in (32, 64, 128, 224)))


@dataclass(frozen=True)
class Row:
    """largest_batch: a multiple of 8, 0 where none fits.  gib_at_128: what a step of 128 images takes."""
    teacher: str
    student: str
    image_size: int
    grad_checkpoint: bool
    gpu_gib: int
    largest_batch: int
    gib_at_128: float


class Study:
    """A pair with its teacher as distill.py loads it, and its student, with and without --grad-checkpoint."""

    def __init__(self, pair: Pair):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "best.pt")
            models.save(path, models.build(pair.teacher, CLASSES, pair.image_size), model=pair.teacher,
                        classes=list(map(str, range(CLASSES))), image_size=pair.image_size, mean=[0.5] * 3, std=[0.25] * 3,
                        dataset="cifar100")
            self.teacher = models.load(path, dtype=MACHINE.dtype, folded=True)
        self.updates = {}
        for checkpoint in (False, True):
            net = models.build(pair.student, CLASSES, pair.image_size)
            if checkpoint:
                recompute(net, pair.student)
            self.updates[checkpoint] = Update(net, build_optimizer(net, RECIPE), MACHINE, clip_grad=1.0, ema_decay=0.0)
        self.total = cache(self.total)

    def total(self, checkpoint: bool, rows: int) -> int:
        """Bytes that a step of `rows` images takes."""
        return memory.Estimate.of(self.updates[checkpoint], MACHINE, rows=rows, image_size=SIZE, teacher=self.teacher,
                                  graph=not checkpoint, images=IMAGES * (3 * SIZE * SIZE + 8)).total

    def largest(self, checkpoint: bool, gib: float) -> int:
        """The largest multiple of STEP that fits.

        Each moment of a step takes memory that grows linearly with the batch, so its fullest moment takes a convex function of
        the batch: a line through two of its points, followed to smaller batches, never goes below the answer.
        """
        limit, rows = memory.USABLE * gib * memory.GIB, MOST
        while rows > 0 and (excess := self.total(checkpoint, rows) - limit) > 0:
            slope = self.total(checkpoint, rows) - self.total(checkpoint, rows - STEP) if rows > STEP else 0
            rows = rows - math.ceil(excess / slope) * STEP if slope else 0
        return max(rows, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="the smallest pair; nothing is written")
    args, found = parser.parse_args(), []
    for pair in PAIRS[:1] if args.quick else PAIRS:
        study = Study(pair)
        for checkpoint in (False, True):
            at_128 = study.total(checkpoint, 128) / memory.GIB
            rows = [Row(*pair, checkpoint, gib, study.largest(checkpoint, gib), round(at_128, 2)) for gib in CARDS]
            print(f"{pair.teacher} -> {pair.student} at {pair.image_size} pixels{', --grad-checkpoint' * checkpoint}: "
                  f"{at_128:.2f} GiB for 128 images; largest batch on",
                  ", ".join(f"{row.gpu_gib} GiB {row.largest_batch}" for row in rows), flush=True)
            found += rows
    if not args.quick:
        table.write(found, "memory", "estimate")


if __name__ == "__main__":
    main()
