"""What writing a checkpoint after every epoch adds to the epoch, with the networks and the optimizer of the study.

    python -m benchmarks.checkpoints               both networks -> benchmarks/results/checkpoints-<gpu or cpu>.csv
    python -m benchmarks.checkpoints --quick       the student alone, fewer repeats
    python -m benchmarks.checkpoints --device cpu

Training steps (batch of 128 images of 32x32, AdamW, FP16 on a GPU) are timed with and without a checkpoint that starts before
the first of them and is written behind the others; the two take turns, and the difference is the cost.  An epoch is the steps
of 45,000 images.  The files go where the project lies, on the disk that its runs would use.
"""
import tempfile
import time
from dataclasses import dataclass, fields
from statistics import median
from types import SimpleNamespace

import torch

from benchmarks import table
from losses import Targets, mixed_ce
from training import models
from training.checkpoint import Writer
from training.evaluation import EarlyStop
from training.machine import prepare_machine
from training.resume import State
from training.rundir import EpochRow, RunDirectory
from training.step import Update, build_optimizer

NETWORKS = ("efficientnet_v2_s", "efficientnet_v2_l")
BATCH, IMAGES, CLASSES = 128, 45_000, 100
RECIPE = SimpleNamespace(opt="adamw", lr=1e-3, weight_decay=0.05)


@dataclass(frozen=True)
class Row:
    """Medians over the repeats. share_percent: extra_s of epoch_s, which is what checkpoints cost a run."""
    hardware: str
    torch: str
    network: str
    repeats: int
    megabytes: float  # of last.pt and best.pt, which are both written
    step_ms: float
    epoch_s: float
    held_up_s: float  # how long the loop waits for the copy
    written_s: float  # how long the thread behind it writes
    extra_s: float
    share_percent: float
    share_percent_min: float
    share_percent_max: float


def clocked(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def benchmark(network: str, machine, repeats: int, hardware: str) -> Row:
    net = models.build(network, CLASSES).to(machine.device).train()
    update = Update(net, build_optimizer(net, RECIPE), machine, 1.0, 0.0)
    images = torch.randn(BATCH, 3, 32, 32, device=machine.device).to(machine.dtype, memory_format=torch.channels_last)
    label = torch.randint(CLASSES, (BATCH,), device=machine.device)
    targets = Targets(label, label, torch.ones(BATCH, device=machine.device))
    row = EpochRow(**{field.name: 1 for field in fields(EpochRow)})

    def train(steps: int) -> None:
        for _ in range(steps):
            with machine.autocast():
                logits = net(images)
            update.backward(mixed_ce(logits, targets))
            norm = update(1e-6).norm
        norm.item()  # waits for the device

    with tempfile.TemporaryDirectory(dir=table.ROOT, prefix=".benchmark-") as folder, \
            RunDirectory(folder, overwrite=True) as run, Writer() as writer:
        run.open({})
        state = State(run, writer, {}, "", update=update, stop=EarlyStop("val_loss", 0), ranks=machine.ranks)

        def save() -> None:
            state.save(row, {}, {"model": network})

        train(3)  # allocates
        save()
        writer.wait()
        held_up, written = zip(*[(clocked(save), clocked(writer.wait)) for _ in range(repeats)])
        steps = max(3, round(1.5 * median(written) / (clocked(lambda: train(3)) / 3)))
        plain, with_one = [], []
        for _ in range(repeats):
            plain.append(clocked(lambda: train(steps)))
            with_one.append(clocked(lambda: (save(), train(steps))))
            writer.wait()
        megabytes = sum((run / name).stat().st_size for name in ("last.pt", "best.pt")) / 1e6
    step = median(plain) / steps
    epoch, extra = IMAGES // BATCH * step, [one - none for one, none in zip(with_one, plain)]
    shares = [100 * each / epoch for each in extra]
    return Row(hardware, torch.__version__, network, repeats, round(megabytes, 1), round(1000 * step, 2), round(epoch, 2),
               *(round(median(each), 3) for each in (held_up, written, extra)),
               *(round(each, 2) for each in (median(shares), min(shares), max(shares))))


def main() -> None:
    args = table.flags(__doc__, "the student's network alone, fewer repeats")
    machine, found = prepare_machine(args.device, None, seed=0), []
    for network in NETWORKS[:1] if args.quick else NETWORKS:
        row = benchmark(network, machine, 3 if args.quick else 7, table.hardware(machine.device))
        found.append(row)
        print(f"{network}: {row.megabytes:.0f} MB, copied in {row.held_up_s:.3f} s and written in {row.written_s:.2f} s; "
              f"adds {row.extra_s:.2f} s to an epoch of {row.epoch_s:.1f} s, "
              f"{row.share_percent:.2f} % ({row.share_percent_min:.2f} to {row.share_percent_max:.2f})", flush=True)
    if not args.quick:
        table.write(found, "checkpoints", table.short(machine.device))


if __name__ == "__main__":
    main()
