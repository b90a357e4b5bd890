"""Time of a whole distillation step beside a plain PyTorch loop, and its parts.

    python -m benchmarks.step                 the table -> benchmarks/results/step-<gpu or cpu>.csv
    python -m benchmarks.step --quick         the smallest pair, few repeats, nothing compiled
    python -m benchmarks.step --case resnet20-resnet8-128 --seconds 60 --output DIR

A case is teacher-student-batch size.  All contenders train the same pair on 32x32 images with DKD at beta 8 under AutoAugment,
Random Erasing, Mixup and CutMix, with SGD and clipping at norm 1; in fp16 on a GPU, in fp32 on a CPU, and there ours in bf16,
too, where the CPU has the instructions.  Ours is the step of distill.py, on a GPU also as a CUDA graph.  The plain loop has a
DataLoader with PIL transforms of torchvision v1 in `workers` processes (2, or 16 on a GPU) besides the main process, which has
all cores; it mixes in the collate function, takes the published loss on the dominant label, and reads the loss after every step.

Contenders are interleaved in blocks of `steps`; times_base is the speed over that of the plain loop in the same repeat, so
drifting clocks cancel.  Untimed steps before each block empty the queue that the loader filled while others ran.  A block of
ours is an epoch, with its random draws and the columns at its end, which a run pays once in hundreds of steps.  share_*: parts
of another block, synchronized after each phase (none in a CUDA graph); waiting is for the loader and the copy to the device.
peak_mb, reserved_mb: the peak of allocated memory, and what the first steps reserved, CUDA graphs included.  begin_s: the first
step, with compilation.  kernels, busy: of a step on a GPU, and the share of its time in which one runs.
"""
import os
import time
from dataclasses import replace
from functools import partial

import torch
import triton

from benchmarks import table
from benchmarks.clocks import interleaved, kernels_of, synchronize, wall_us
from benchmarks.loops import PREFETCH, Ours, PlainLoop, networks, recipe
from data.synthetic import generate
from rundir import errors
from training.cuda_graph import WARM_UP
from training.device import setup_context

CASES = ("v2_tiny-v2_pico-128", "resnet20-resnet8-128", "resnet32x4-resnet8x4-128")
GPU_CASES = (*CASES, "resnet32x4-resnet8x4-64", "resnet32x4-resnet8x4-512", "efficientnet_v2_l-efficientnet_v2_s-128")
PHASES = ("waiting", "augment", "teacher", "student", "objective", "backward", "update", "bookkeeping")
PROFILED = 10  # steps
BLOCK_S, BLOCK_STEPS = 2.0, 64  # how long a block of the plain loop takes, and the most steps it has
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
    yield BASE, plain, torch.contiguous_format, context
    yield f"{BASE}, channels_last", partial(plain, layout=channels_last), channels_last, context
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
            yield f"ours{suffix}, graph", partial(ours, captured=True), channels_last, setup
        if half:
            yield f"ours{suffix}, bf16", ours, channels_last, replace(setup, precision="bf16")


def shares(contender, steps: int) -> dict:
    """The part of each phase in the time of a block."""
    device = contender.context.device
    seconds, last = dict.fromkeys(PHASES, 0.0), time.perf_counter()

    def lap(phase):
        nonlocal last
        synchronize(device)
        now = time.perf_counter()
        seconds[phase], last = seconds[phase] + now - last, now

    unwatched, contender.lap = contender.lap, lap
    contender.run(steps)
    contender.lap = unwatched
    return {f"share_{phase}": round(seconds[phase] / sum(seconds.values()), 4) for phase in PHASES}


def benchmark(case, context, images, labels, batch_size: int, repeats: int, compiled: bool, steps: int | None = None):
    """A row for each contender.  case: teacher and student.  steps: of a block; by default as many as the plain loop takes
    BLOCK_S for."""
    device, args = context.device, recipe(batch_size)
    on_gpu, running, held, began = device.type == "cuda", {}, {}, {}

    def memory() -> tuple[int, int]:
        return (torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)) if on_gpu else (0, 0)

    def block_ms(contender, steps: int) -> float:
        return wall_us(lambda: contender.run(steps), 1, device) / 1000 / steps

    def drain(contender) -> None:
        contender.run(min(steps, PREFETCH * contender.workers) or 1)

    def timed(contender) -> float:
        drain(contender)
        return block_ms(contender, steps)

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # contenders share the classes of their layers
    workers = min(16, max(2, os.cpu_count() - 1)) if on_gpu else 2
    plain = partial(PlainLoop, images=images, labels=labels, workers=workers)
    if not steps:
        base = plain(*networks(case, device, torch.contiguous_format), args, context)
        base.run(2)
        steps = min(BLOCK_STEPS, max(1, round(1000 * BLOCK_S / block_ms(base, 2))))
        del base
    ours = partial(Ours, images=images[:steps * batch_size], labels=labels[:steps * batch_size])
    for name, make, layout, its_machine in contenders(context, compiled, plain, ours):
        before = memory()
        try:
            contender = make(*networks(case, device, layout), args, setup)
            begin_s = block_ms(contender, 1) / 1000
            for count in (WARM_UP + 1, 1) * on_gpu:  # a graph is captured of both kinds of steps
                contender.run(count)
        except (RuntimeError, errors.Failure) as failure:  # out of memory, no graph, and what torch.compile raises
            print(f"  {name} failed and is left out: {' '.join(str(failure).splitlines()[:2])}")
            continue
        running[name], began[name] = contender, (begin_s, *(after - earlier for after, earlier in zip(memory(), before)))

    times = interleaved(running, timed, repeats)
    for name, contender in running.items():
        drain(contender)
        (before, _), (begin_s, held, reserved) = memory(), began[name]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        parts, spread = shares(contender, steps), table.spread("ms", times[name])
        cost = dict.fromkeys(("peak_mb", "reserved_mb", "begin_s", "kernels", "busy")) | {"begin_s": round(begin_s, 2)}
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
    found.close()


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "the smallest pair, few repeats, nothing compiled", GPU_CASES, tiny=True).parse_args())
