"""What writing a checkpoint after every epoch adds to the epoch, with the networks and the optimizer of the study.

    python benchmarks/checkpoint.py               both networks -> benchmarks/results/checkpoint-<gpu>.csv
    python benchmarks/checkpoint.py --quick       the student alone, fewer repeats
    python benchmarks/checkpoint.py --device cpu

Training steps (batch of 128 images of 32x32, AdamW, FP16 on a GPU) are timed with and without a checkpoint that starts before
the first of them and is written behind the others; the two take turns, and the difference is the cost.  An epoch is the steps
of 45,000 images.  The files go where the project lies, on the disk that its runs would use.
"""
import argparse
import csv
import platform
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from losses import Targets, mixed_ce  # noqa: E402
from training import checkpoint, loop, models, runlog  # noqa: E402

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
    update = step.Update(net, step.build_optimizer(net, RECIPE), machine, 1.0, 0.0)
    images = torch.randn(BATCH, 3, 32, 32, device=machine.device).to(machine.dtype, memory_format=torch.channels_last)
    label = torch.randint(CLASSES, (BATCH,), device=machine.device)
    targets = Targets(label, label, torch.ones(BATCH, device=machine.device))
    row = rundir.EpochRow(**{field.name: 1 for field in fields(rundir.EpochRow)})

    def train(steps: int) -> None:
        for _ in range(steps):
            with machine.autocast():
                logits = net(images)
            update(mixed_ce(logits, targets), 1e-6)
        update.epoch_columns()  # waits for the device

    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".benchmark-") as folder, \
            rundir.RunDirectory(folder, overwrite=True) as run, checkpoint.Writer() as writer:
        run.open({})
        state = resume.State(run, writer, {}, update=update, stop=evaluation.EarlyStop("val_loss", 0), ranks=machine.ranks)

        def save() -> None:
            state.save(row, {"model": network})

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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="the student's network alone, fewer repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args()
    machine = machine.prepare_machine(args.device, None, seed=0)
    gpu = machine.device.type == "cuda"
    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if gpu:
        hardware = torch.cuda.get_device_name(machine.device)
    table = []
    for network in NETWORKS[:1] if args.quick else NETWORKS:
        table.append(benchmark(network, machine, 3 if args.quick else 7, hardware))
        row = table[-1]
        print(f"{network}: {row.megabytes:.0f} MB, copied in {row.held_up_s:.3f} s and written in {row.written_s:.2f} s; "
              f"adds {row.extra_s:.2f} s to an epoch of {row.epoch_s:.1f} s, "
              f"{row.share_percent:.2f} % ({row.share_percent_min:.2f} to {row.share_percent_max:.2f})", flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", (hardware if gpu else "cpu").lower()).strip("-")
    output = ROOT / "benchmarks" / "results" / f"checkpoint-{name}.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)
    print(output)


if __name__ == "__main__":
    main()
