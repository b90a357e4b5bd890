"""Time of a whole distillation step beside a plain PyTorch loop, and its parts.

    python -m benchmarks.step                 the table -> benchmarks/results/step-<gpu or cpu>.csv
    python -m benchmarks.step --quick         the smallest pair, few repeats, nothing compiled
    python -m benchmarks.step --case resnet20-resnet8-128 --output DIR

A case is teacher-student-batch size.  All contenders train the same pair on 32x32 images with DKD at beta 8, AutoAugment, Random
Erasing, Mixup and CutMix, SGD and clipping; in fp16 on a GPU, in fp32 on a CPU, where ours is also run in bf16 if the CPU has it.
Ours is the step of distill.py, on a GPU also as a CUDA graph; with a stored teacher its logits are read and not computed.  The
plain loop has a DataLoader with PIL transforms in `workers` processes, mixes in the collate function, takes the published loss on
the dominant label, and reads the loss after every step.

Contenders are interleaved in blocks of `steps`, after untimed steps that empty the loader's queue; times_base is the speed over
that of the plain loop in the same repeat.  A block of ours is an epoch, with its random draws and columns.  share_*: parts of
another block, synchronized after each phase; waiting is for the loader and the copy to the device.  peak_mb: the peak of
allocated memory.  begin_s: the first step, with compilation.  kernels, busy: of a step on a GPU, and the share of its time in
which one runs.
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
TINY = ("v2_tiny-v2_pico-8",)
PHASES = ("waiting", "augment", "teacher", "student", "objective", "backward", "update", "bookkeeping")
PROFILED = 10  # steps at most
BLOCK_S, BLOCK_STEPS = 2.0, 64  # how long a block of the plain loop takes, and the most steps it has
BASE = "plain loop"


def contenders(context, compiled: bool, plain, ours):
    """Of each: its name, constructor, memory format and device setup; the base first."""
    on_gpu, channels_last = context.device.type == "cuda", torch.channels_last
    half = not on_gpu and torch.cpu.get_capabilities().get("avx512_bf16")
    yield BASE, plain, torch.contiguous_format, context
    yield f"{BASE}, channels_last", partial(plain, layout=channels_last), channels_last, context
    if compiled:
        yield f"{BASE}, compiled", partial(plain, compiled=True), torch.contiguous_format, context
    for suffix, setup in {"": context, ", compiled": replace(context, compiled=True)}.items():
        if setup.compiled and not compiled:
            continue
        yield f"ours{suffix}", ours, channels_last, setup
        yield f"ours{suffix}, stored teacher", partial(ours, stored=True, captured=on_gpu), channels_last, setup
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
    """A row for each contender.  case: teacher and student.  steps: of a block; default: what the plain loop does in BLOCK_S."""
    device, args = context.device, recipe(batch_size)
    on_gpu, running, began = device.type == "cuda", {}, {}

    def memory() -> int:
        return torch.cuda.memory_allocated(device) if on_gpu else 0

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
    for name, make, layout, setup in contenders(context, compiled, plain, ours):
        before = memory()
        try:
            contender = make(*networks(case, device, layout), args, setup)
            begin_s = block_ms(contender, 1) / 1000
            for count in (WARM_UP + 1, 1) * on_gpu:  # a graph is captured of both kinds of steps
                contender.run(min(count, steps))
            for _ in range(2 * contender.stored):  # whole epochs: the first stores, the second reads and is captured
                contender.run(steps)
        except (RuntimeError, errors.Failure) as failure:  # out of memory, no graph, and what torch.compile raises
            print(f"  {name} failed and is left out: {' '.join(str(failure).splitlines()[:2])}")
            continue
        running[name], began[name] = contender, (begin_s, memory() - before)

    times = interleaved(running, timed, repeats)
    for name, contender in running.items():
        drain(contender)
        before, (begin_s, held) = memory(), began[name]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        parts, spread = shares(contender, steps), table.spread("ms", times[name])
        cost = {"peak_mb": None, "begin_s": round(begin_s, 2), "kernels": None, "busy": None}
        if on_gpu:
            cost["peak_mb"] = round((torch.cuda.max_memory_allocated(device) - before + held) / 1e6, 1)
            profiled = min(PROFILED, steps)
            count, busy_us = kernels_of(partial(contender.run, profiled))
            cost |= {"kernels": round(count / profiled, 1), "busy": round(busy_us / profiled / 1000 / spread["ms"], 3)}
        yield table.Row(
            **table.versions(device, torch, triton), case=" to ".join(case), batch_size=batch_size, contender=name,
            precision=contender.context.precision, threads=torch.get_num_threads(), workers=contender.workers, repeats=repeats,
            steps=steps, **spread, images_per_s=round(1000 * batch_size / spread["ms"], 1), base=BASE,
            **table.spread("times_base", [base / ms for base, ms in zip(times.get(BASE, ()), times[name])]), **cost,
            **(dict.fromkeys(parts) if contender.captured else parts))


def main(args) -> None:
    context = setup_context(str(args.device), None, seed=0)
    steps, quick = 1 if args.tiny else None, args.quick or args.tiny
    usual = TINY if args.tiny else CASES[:1] if quick else GPU_CASES if context.device.type == "cuda" else CASES
    found = table.Rows(args, "step", table.short(context.device), "case batch_size contender ms times_base share_teacher")
    for name in args.case or usual:
        *case, batch = name.split("-")
        images, labels = generate((steps or BLOCK_STEPS) * int(batch), 0)
        for row in benchmark(case, context, images, labels, int(batch), table.repeats(args, 3, 9), not quick, steps):
            found.add(row)


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "the smallest pair, few repeats, nothing compiled", GPU_CASES, tiny=True).parse_args())
