"""How long a whole distillation step takes beside the loop that people write, and where its time goes.

    python -m benchmarks.step                 the table -> benchmarks/results/step-<gpu or cpu>.csv and .png
    python -m benchmarks.step --quick         the smallest pair, few repeats, nothing compiled
    python -m benchmarks.step --case resnet20-resnet8-128 --seconds 60 --output DIR

All contenders train the same pair on 32x32 images with DKD at beta 8 under AutoAugment, Random Erasing, Mixup and CutMix, with
SGD and clipping at norm 1; in fp16 on a GPU, on a CPU in fp32 and, where it has the instructions, ours in bf16, too.  Ours is the
loop of distill.py with its objects; on a GPU also recorded as a CUDA graph.  The plain loop is a DataLoader whose workers take
PIL images through torchvision v1 and mix where they collate; then the published loss on the label with the larger share, an
optimizer that is not fused, and the loss read after every step, but no means or diagnostics.  channels_last, which ours has
everywhere, is one more line in it and a contender of its own.

Every main process has all cores, as PyTorch does by itself.  The plain loop has `workers` processes besides: two, on a GPU 16.

Contenders take turns, block by block, and the ratio to the plain loop is taken within each repeat, so it holds where the
machine's speed drifts.  Before each block come steps that are not timed, as many as the loader holds batches, one without a
loader: it fills its queue while others run.  Where a block has fewer steps, a step is so long that the queue is always full.  A
block of ours is an epoch, with its draws and with what is read at its end, which a run pays once in hundreds of steps; the
loader's epoch never ends.  The shares are those of one more block, with a clock read after each phase; inside of a graph there
is none to read.  On a GPU a profile of a few more steps counts the kernels and adds up how long they keep the GPU busy.
"""
import os
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import triton

from benchmarks import table
from benchmarks.our_loop import Ours, networks, recipe
from benchmarks.plain_loop import PREFETCH, PlainLoop
from data.synthetic import generate
from rundir import errors
from training.cuda_graph import WARM_UP
from training.device import setup_context

CASES = ("v2_tiny-v2_pico-128", "resnet20-resnet8-128", "resnet32x4-resnet8x4-128")  # teacher, student, images of a batch
GPU_CASES = (*CASES, "resnet32x4-resnet8x4-64", "resnet32x4-resnet8x4-512", "efficientnet_v2_l-efficientnet_v2_s-128")
PROFILED = 10  # steps
BLOCK_S, BLOCK_STEPS = 2.0, 64  # a block of the plain loop takes about so long, and has at most so many steps
BASE = "plain loop"


@dataclass(frozen=True)
class Row:
    """One contender on one pair, median and extremes over the repeats; `times_base` is how many times as fast as `base` it is.

    steps: of a block.  peak_mb, reserved_mb: of the GPU's memory, what its tensors took at the most, and what its first steps
    made PyTorch reserve, CUDA graphs included.  begin_s: seconds of its first step, in which networks are compiled.  kernels,
    busy: on a GPU how many a step has, and the share of its time in which one runs.  share_*: parts of a step's time; waiting
    is for the loader and the copy to the device.
    """
    hardware: str
    torch: str
    triton: str
    case: str
    batch_size: int
    contender: str
    precision: str
    threads: int
    workers: int
    repeats: int
    steps: int
    ms: float
    ms_min: float
    ms_max: float
    images_per_s: float
    base: str
    times_base: float | None
    times_base_min: float | None
    times_base_max: float | None
    peak_mb: float | None
    reserved_mb: float | None
    begin_s: float
    kernels: float | None
    busy: float | None
    share_waiting: float | None
    share_augment: float | None
    share_teacher: float | None
    share_student: float | None
    share_objective: float | None
    share_backward: float | None
    share_update: float | None
    share_bookkeeping: float | None


PHASES = [field.name.removeprefix("share_") for field in fields(Row) if field.name.startswith("share_")]


class Laps:
    """Seconds by phase; a call ends the phase that it names."""

    def __init__(self, device):
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)
        self.last = self.now()

    def now(self) -> float:
        table.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = self.now()
        self.seconds[phase] += now - self.last
        self.last = now

    def shares(self) -> list[float]:
        return [round(seconds / sum(self.seconds.values()), 4) for seconds in self.seconds.values()]


def workers_of(device) -> int:
    """Of the plain loop."""
    return min(16, max(2, os.cpu_count() - 1)) if device.type == "cuda" else 2


def step_ms(contender, steps: int) -> float:
    clock = Laps(contender.context.device)
    contender.run(steps)
    return 1000 * (clock.now() - clock.last) / steps


def contenders(context, compiled: bool, plain, ours):
    """Of each: its name, what makes it, the memory format of its networks, and its machine; the base first."""
    on_gpu, channels_last = context.device.type == "cuda", torch.channels_last
    half = not on_gpu and torch.cpu.get_capabilities().get("avx512_bf16")
    yield BASE, plain, torch.contiguous_format, machine
    yield "plain loop, channels_last", partial(plain, layout=channels_last), channels_last, machine
    if compiled:
        yield "plain loop, compiled", partial(plain, compiled=True), torch.contiguous_format, machine
    yield "ours", ours, channels_last, machine
    if on_gpu:
        yield "ours, graph", partial(ours, captured=True), channels_last, machine
    if half:
        yield "ours, bf16", ours, channels_last, replace(context, precision="bf16")
    if compiled:
        made = replace(context, compiled=True)
        yield "ours, compiled", ours, channels_last, made
        if on_gpu:
            yield "ours, compiled, graph", partial(ours, captured=True), channels_last, made
        if half:
            yield "ours, compiled, bf16", ours, channels_last, replace(made, precision="bf16")


def profile(contender, ms: float) -> tuple[float, float]:
    """Kernels of a step, and the share of its time, `ms`, in which one of them runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        contender.run(PROFILED)
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy_us = sum(event.time_range.elapsed_us() for event in kernels)
    return round(len(kernels) / PROFILED, 1), round(busy_us / PROFILED / 1000 / ms, 3)


def benchmark(case, context, images, labels, batch_size: int, repeats: int, compiled: bool, steps: int | None = None):
    """A row for each contender.  case: teacher and student.  steps: of a block; by default as many as the plain loop takes
    BLOCK_S for."""
    device, args = context.device, recipe(batch_size)
    on_gpu, running, held, began = device.type == "cuda", {}, {}, {}

    def memory() -> tuple[int, int]:
        return (torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)) if on_gpu else (0, 0)

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # contenders share the classes of their layers
    plain = partial(PlainLoop, images=images, labels=labels, workers=workers_of(device))
    if not steps:
        base = plain(*networks(case, device, torch.contiguous_format), args, context)
        base.run(2)
        steps = min(BLOCK_STEPS, max(1, round(1000 * BLOCK_S / step_ms(base, 2))))
        del base
    ours = partial(Ours, images=images[:steps * batch_size], labels=labels[:steps * batch_size])
    for name, make, layout, its_machine in contenders(context, compiled, plain, ours):
        before = memory()
        try:
            contender = make(*networks(case, device, layout), args, its_machine)
            began[name] = step_ms(contender, 1) / 1000
            if on_gpu:  # a graph is recorded of both kinds of steps
                for count in (WARM_UP + 1, 1):
                    contender.run(count)
        except (RuntimeError, errors.Failure) as failure:  # out of memory, no graph, and what torch.compile raises
            print(f"  {name} failed and is left out: {' '.join(str(failure).splitlines()[:2])}")
            continue
        running[name], held[name] = contender, [after - earlier for after, earlier in zip(memory(), before)]

    def fill_queue(contender) -> None:
        contender.run(min(steps, PREFETCH * contender.workers) or 1)

    times = {name: [] for name in running}
    for _ in range(repeats):
        for name, contender in running.items():
            fill_queue(contender)
            times[name].append(step_ms(contender, steps))
    for name, contender in running.items():
        fill_queue(contender)
        (before, _), unwatched = memory(), contender.lap
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        contender.lap = laps = Laps(device)
        contender.run(steps)
        contender.lap = unwatched
        taken = [None, None]
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device) - before + held[name][0]
            taken = [round(size / 1e6, 1) for size in (peak, held[name][1])]
        ratios = [base / ms for base, ms in zip(times.get(BASE, ()), times[name])]
        ms, times_base = ([round(pick(column), 3) if column else None for pick in (median, min, max)]
                          for column in (times[name], ratios))
        shares = [None] * len(PHASES) if name.endswith("graph") else laps.shares()
        yield Row(table.hardware(device), torch.__version__, triton.__version__, " to ".join(case), batch_size, name,
                  contender.context.precision, torch.get_num_threads(), contender.workers, repeats, steps, *ms,
                  round(1000 * batch_size / ms[0], 1), BASE, *times_base, *taken, round(began[name], 2),
                  *(profile(contender, ms[0]) if on_gpu else (None, None)), *shares)


def draw(rows_of: list[Row], path: Path) -> None:
    """How many times as fast as the plain loop each contender is, and below what its step is made of."""
    def case(row):
        return f"{row.case}, {row.batch_size}"

    rows_of = [row for row in rows_of if row.times_base]
    if {row.contender for row in rows_of} <= {BASE}:
        return
    cases, names = (list(dict.fromkeys(column)) for column in zip(*((case(row), row.contender) for row in rows_of)))
    watched = [row for row in rows_of if row.share_teacher is not None]
    heights = (2.8, 0.5 + 0.3 * len(watched))
    figure, (bars, shares) = plt.subplots(2, 1, figsize=(8, sum(heights) + 1.5), layout="constrained", height_ratios=heights)
    width = 0.8 / (len(names) - 1)
    for index, name in enumerate(names[1:]):
        rows = [row for row in rows_of if row.contender == name]
        left = [cases.index(case(row)) + (index - (len(names) - 1) / 2) * width for row in rows]
        spread = [[row.times_base - row.times_base_min for row in rows], [row.times_base_max - row.times_base for row in rows]]
        drawn = bars.bar(left, [row.times_base for row in rows], width, align="edge", yerr=spread, error_kw={"elinewidth": 0.8},
                         label=name, color=f"{0.9 - 0.12 * index:.2f}")
        bars.bar_label(drawn, [f"{row.times_base:.2f}" for row in rows], label_type="center", fontsize=8, rotation=90,
                       color="white" if index > 2 else "black")
    bars.axhline(1, color="black", linewidth=0.8)
    bars.set(xticks=range(len(cases)), xticklabels=cases, ylabel=f"speed / that of the {BASE}")
    bars.set_title(f"a whole step, teacher to student, images of a batch; {rows_of[0].hardware}", fontsize=9, loc="left")
    bars.legend(fontsize=8, ncols=3, loc="upper left")
    bars.margins(y=0.3)  # room for the legend above the bars

    places = [index + 0.6 * cases.index(case(row)) for index, row in enumerate(watched)]
    left = [0.0] * len(watched)
    for index, phase in enumerate(PHASES):
        parts = [100 * getattr(row, f"share_{phase}") for row in watched]
        shares.barh(places, parts, 0.8, left=left, label=phase, color=f"C{index}")
        left = [start + part for start, part in zip(left, parts)]
    shares.set_yticks(places, [f"{case(row)}\n{row.contender}, {row.ms:.0f} ms" for row in watched], fontsize=7)
    shares.invert_yaxis()
    shares.set(xlim=(0, 100), xlabel="% of a step")
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)


def main(args) -> None:
    context = setup_context(str(table.device(args.device)), None, seed=0)
    steps = 1 if args.quick == table.TINY else None
    usual = CASES[:1] if args.quick else GPU_CASES if context.device.type == "cuda" else CASES
    found = table.Rows(args, "step", table.short(context.device))
    for name in table.chosen(args, usual):
        *case, batch = name.split("-")
        images, labels = generate((steps or BLOCK_STEPS) * int(batch), 0)
        for row in benchmark(case, context, images, labels, int(batch), table.repeats(args, 3, 9), not args.quick, steps):
            found.add(row)
            shares = {phase: getattr(row, f"share_{phase}") for phase in PHASES}
            made_of = ", ".join(f"{phase} {100 * share:.1f}" for phase, share in shares.items() if share is not None)
            times = f"{row.times_base:6.2f} ({row.times_base_min:.2f} to {row.times_base_max:.2f})" if row.times_base else ""
            print(f"{row.case:24} {batch:>4} {row.contender:25} {row.ms:8.2f} ms {times}  %: {made_of}", flush=True)
    found.close(draw)


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "the smallest pair, few repeats, nothing compiled", GPU_CASES, tiny=True).parse_args())
