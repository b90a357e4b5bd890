"""How long the fused loss takes beside what people use today, side by side in one process.

    python -m benchmarks.loss                  the whole table -> benchmarks/results/loss-<gpu or cpu>.csv and .png
    python -m benchmarks.loss --quick          two sizes, few repeats
    python -m benchmarks.loss --device cpu     the references alone: without a GPU there is no kernel to measure
    python -m benchmarks.loss --case 128x100 512x100 --seconds 60 --output DIR

Every number is one loss with its gradient with respect to the student's logits.  Contenders take turns, repeat by repeat, and
the ratio to the published code is taken within each repeat, so it holds where the machine's speed drifts.  Memory is the most
that PyTorch has allocated at a time during one call, beyond what was there before.  `eager` is wall time with Python,
autograd and launches; `graph` is the same work replayed from a CUDA graph, which is what the GPU itself needs.  Before every
graph repeat the second-level cache is overwritten.
"""
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import triton

import kernels
from benchmarks import table
from benchmarks.clocks import captured, graph_us, peak_bytes, wall_us
from kernels.softmax_kl import Weights, hyperparameters
from losses import Targets, dkd_loss, kd_loss
from rundir import errors
from rundir.errors import first_line

SIZES = ("128x100", "512x100", "1024x1000", "4096x8192", "4096x32000", "8192x128256")
CPU_SIZES = ("128x100", "128x1000", "4096x8000")
BASE = "published"
T, ALPHA, BETA, EPS = 4.0, 1.0, 8.0, 0.1


@dataclass(frozen=True)
class Row:
    """One contender at one size: microseconds per call and megabytes, both also as multiples of those of `base`, if it ran."""
    hardware: str
    torch: str
    triton: str
    rows: int
    classes: int
    dtype: str
    loss: str
    contender: str
    mode: str
    repeats: int
    us: float
    us_min: float
    us_max: float
    base: str
    times_base: float | None
    times_base_min: float | None
    times_base_max: float | None
    peak_mb: float
    memory_times_base: float | None


def published_kd(student, teacher, label):
    divergence = F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction="batchmean") * T * T
    return 0.3 * F.cross_entropy(student, label, label_smoothing=EPS) + 0.7 * divergence


def published_dkd(student, teacher, label):
    return F.cross_entropy(student, label, label_smoothing=EPS) + decoupled(student, teacher, label)


def decoupled(student, teacher, label):
    """DKD without cross-entropy in the form in which it was published: masks, concatenated pairs, -1000 on the target."""
    hot = torch.zeros_like(student, dtype=torch.bool).scatter_(1, label[:, None], True)
    q, p = F.softmax(student / T, 1), F.softmax(teacher / T, 1)
    q_pair, p_pair = (torch.cat([(x * hot).sum(1, keepdim=True), (x * ~hot).sum(1, keepdim=True)], 1) for x in (q, p))
    tckd = F.kl_div(q_pair.log(), p_pair, reduction="sum") * T * T / len(label)
    q_rest, p_rest = F.log_softmax(student / T - 1000.0 * hot, 1), F.softmax(teacher / T - 1000.0 * hot, 1)
    nckd = F.kl_div(q_rest, p_rest, reduction="sum") * T * T / len(label)
    return ALPHA * tckd + BETA * nckd


@triton.jit
def _nothing():
    pass


def contenders(loss: str, student, teacher, label) -> dict:
    """name -> a call that makes the loss and the gradient; ours comes first, fused where there is a GPU."""
    targets = Targets.unmixed(label)
    published = published_kd if loss == "kd" else published_dkd

    def ours(student, teacher, label):
        numbers = {"temperature": T, "label_smoothing": EPS}
        return (kd_loss if loss == "kd" else dkd_loss)(student, teacher, targets, **numbers)[0]

    def with_backward(function):
        def call():
            student.grad = None
            function(student, teacher, label).backward()
        return call

    def reference():
        kernels.choose("reference")
        try:
            with_backward(ours)()
        finally:
            kernels.choose("auto")

    torch._dynamo.reset()  # or torch.compile would make its code for any shape from the second size on
    if not student.is_cuda:
        return {"reference": with_backward(ours), "published": with_backward(published)}
    found = {"fused": with_backward(ours), "reference": reference, "published": with_backward(published)}

    weights = Weights(ce=0.3, kl=0.7) if loss == "kd" else Weights(ce=1.0, tckd=ALPHA, nckd=BETA)
    hyper = hyperparameters(weights, T, EPS, student.device)

    def operator():  # a script that gives the gradient to logits.backward needs no more
        torch.ops.fusekd.softmax_kl(student.detach(), teacher, *targets, hyper, weights.terms, "pair", False)

    gradient, half = torch.empty_like(student, dtype=torch.float32), torch.empty_like(student[: len(student) // 2])

    def copy():  # as many bytes as reading both logits and writing the gradient
        gradient.detach().copy_(teacher)
        half.detach().copy_(teacher[: len(half)])

    found |= {"fused operator alone": operator, "copy": copy,
              "torch.compile": with_backward(torch.compile(published, dynamic=False)), "empty launch": lambda: _nothing[(1,)]()}
    if loss == "kd":
        try:
            from liger_kernel.transformers import LigerKLDIVLoss
        except ImportError:
            print("liger-kernel is not installed: left out")
        else:
            divergence = LigerKLDIVLoss(reduction="batchmean")

            def liger(student, teacher, label):
                kl = divergence(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1))
                return 0.3 * F.cross_entropy(student, label, label_smoothing=EPS) + 0.7 * T * T * kl

            found["liger"] = with_backward(liger)
    return found


def measure(calls: dict, time_one, repeats: int) -> dict:
    """name -> the times of all repeats; the contenders take turns."""
    for call in calls.values():
        time_one(call)
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(time_one(call))
    return times


def benchmark(rows: int, classes: int, dtype, loss: str, device, repeats: int, hardware: str):
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((3 * torch.randn(rows, classes, generator=generator)).to(device, dtype) for _ in range(2))
    label = torch.randint(classes, (rows,), generator=generator).to(device)
    calls = contenders(loss, student.requires_grad_(), teacher, label)
    calls = {name: call for name, call in calls.items() if works(name, call)}
    if not calls:
        return
    once = max(wall_us(calls.get(BASE) or next(iter(calls.values())), 1, device), 1.0)
    memory = {name: peak_bytes(call, device) for name, call in calls.items()}  # before graphs hold some
    modes = {"eager": measure(calls, lambda call: wall_us(call, max(1, int(2e4 / once)), device), repeats)}
    if device.type == "cuda":
        flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
        pool = torch.cuda.graph_pool_handle()
        replays = {name: replay for name, call in calls.items() if (replay := captured(call, pool))}
        modes["graph"] = measure(replays, lambda replay: graph_us(replay, flush), repeats)
    for mode, times in modes.items():
        for name, values in times.items():
            ratios = [value / base for value, base in zip(values, times.get(BASE, ()))]
            spread = [[round(pick(column), 3) if column else None for pick in (median, min, max)] for column in (values, ratios)]
            yield Row(hardware, torch.__version__, triton.__version__, rows, classes, str(dtype).removeprefix("torch."),
                      loss, name, mode, repeats, *spread[0], BASE, *spread[1], round(memory[name] / 1e6, 3),
                      round(memory[name] / memory[BASE], 3) if BASE in memory else None)


def works(name: str, call) -> bool:
    """Whether a contender can be called; one that cannot does not keep the others from it."""
    try:
        call()
    except (RuntimeError, ImportError) as failure:  # out of memory is a RuntimeError
        print(f"  {name} failed and is left out: {first_line(failure)}")
        return False
    return True


def draw(rows_of: list[Row], path: Path) -> None:
    """How many times the time of the published code each takes, by size, where that ran; one panel per loss, mode and dtype."""
    rows_of = [row for row in rows_of if row.times_base]
    if not rows_of:
        return
    panels = sorted({(row.loss, row.mode, row.dtype) for row in rows_of})
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 2.1 * len(panels)), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(row.contender for row in rows_of))
    for axis, panel in zip(axes[:, 0], panels):
        here = [row for row in rows_of if (row.loss, row.mode, row.dtype) == panel]
        sizes = list(dict.fromkeys((row.rows, row.classes) for row in here))
        for index, name in enumerate(names):
            points = {(row.rows, row.classes): row for row in here if row.contender == name}
            width = 0.8 / len(names)
            left = [place + (index - len(names) / 2) * width for place, size in enumerate(sizes) if size in points]
            rows = [points[size] for size in sizes if size in points]
            heights = [row.times_base for row in rows]
            errors = [[row.times_base - row.times_base_min for row in rows],
                      [row.times_base_max - row.times_base for row in rows]]
            axis.bar(left, heights, width, align="edge", label=name, color=f"C{index}", yerr=errors, error_kw={"elinewidth": 0.7})
        axis.axhline(1, color="black", linewidth=0.8)
        if max(row.times_base for row in here) > 20 * min(row.times_base for row in here):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.set_xticks(range(len(sizes)), [f"{rows} x {classes}" for rows, classes in sizes])
        axis.set_ylabel(f"time / {here[0].base}")
        axis.set_title(", ".join(panel), fontsize=9, loc="left")
    axes[-1, 0].set_xlabel(f"rows x classes; {rows_of[0].hardware}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def main(args) -> None:
    device = table.device(args.device)
    if device.type == "cpu":
        print("no GPU: the reference is measured, the fused kernel is not")
    sizes = SIZES if device.type == "cuda" else CPU_SIZES
    found = table.Rows(args, "loss", table.short(device))
    for size in table.chosen(args, sizes[:1] if args.quick == table.TINY else sizes[:2] if args.quick else sizes):
        rows, classes = map(int, size.split("x"))
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
            for loss in ("kd", "dkd"):
                try:
                    for row in benchmark(rows, classes, dtype, loss, device, table.repeats(args, 10, 30), table.hardware(device)):
                        found.add(row)
                        times = "" if row.times_base is None else (
                            f"{row.times_base:7.2f} ({row.times_base_min:.2f} to {row.times_base_max:.2f})")
                        print(f"{rows:5} x {classes:6} {row.dtype:8} {loss:3} {row.mode:5} {row.contender:20} {row.us:10.1f} us "
                              f"{times:22}  {row.peak_mb:9.2f} MB", flush=True)
                except torch.OutOfMemoryError:
                    print(f"{rows:5} x {classes:6} {dtype} {loss}: out of memory, left out")
                torch.cuda.empty_cache()
    found.close(draw)


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "two sizes, few repeats", dict.fromkeys(SIZES + CPU_SIZES), tiny=True).parse_args())
