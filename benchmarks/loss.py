"""Time and memory of the fused loss with its gradient, beside published code, torch.compile, Liger and a copy.

    python -m benchmarks.loss                  the whole table -> benchmarks/results/loss-<gpu or cpu>.csv
    python -m benchmarks.loss --quick          two sizes, few repeats
    python -m benchmarks.loss --device cpu     the reference alone: the fused kernel needs a GPU
    python -m benchmarks.loss --case 128x100 512x100 --output DIR

A case is rows x classes.  Contenders are interleaved; times_base is the time over that of the published code in the same repeat,
so drifting clocks cancel.  Mode `eager` is wall time with Python, autograd and launches; `graph` replays the same work from a
CUDA graph, each time after the L2 cache was overwritten.  peak_mb is the most that PyTorch allocates during a call.
"""
import torch
import torch.nn.functional as F
import triton

import kernels
from benchmarks import table
from benchmarks.clocks import captured, graph_us, interleaved, peak_bytes, wall_us
from losses import Targets, dkd_loss, kd_loss
from rundir import errors

SIZES = ("128x100", "512x100", "1024x1000", "4096x8192", "4096x32000", "8192x128256")
CPU_SIZES = ("128x100", "128x1000", "4096x8000")
BASE = "published"
T, ALPHA, BETA, EPS = 4.0, 1.0, 8.0, 0.1


def published_kd(student, teacher, label):
    divergence = F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction="batchmean") * T * T
    return 0.3 * F.cross_entropy(student, label, label_smoothing=EPS) + 0.7 * divergence


def published_dkd(student, teacher, label):
    return F.cross_entropy(student, label, label_smoothing=EPS) + decoupled(student, teacher, label)


def decoupled(student, teacher, label):
    """DKD without cross-entropy, as published: masks, concatenated pairs, -1000 on the target."""
    hot = torch.zeros_like(student, dtype=torch.bool).scatter_(1, label[:, None], True)
    q, p = F.softmax(student / T, 1), F.softmax(teacher / T, 1)
    q_pair, p_pair = (torch.cat([(x * hot).sum(1, keepdim=True), (x * ~hot).sum(1, keepdim=True)], 1) for x in (q, p))
    tckd = F.kl_div(q_pair.log(), p_pair, reduction="sum") * T * T / len(label)
    q_rest, p_rest = F.log_softmax(student / T - 1000.0 * hot, 1), F.softmax(teacher / T - 1000.0 * hot, 1)
    nckd = F.kl_div(q_rest, p_rest, reduction="sum") * T * T / len(label)
    return ALPHA * tckd + BETA * nckd


def contenders(loss: str, student, teacher, label) -> dict:
    """name -> a call that computes the loss and its gradient; those that fail, as for want of memory, are left out."""
    targets, function = Targets.unmixed(label), kd_loss if loss == "kd" else dkd_loss
    published = published_kd if loss == "kd" else published_dkd

    def ours(kernel):
        def compute(*logits):
            kernels.choose(kernel)
            try:
                return function(*logits[:2], targets, temperature=T, label_smoothing=EPS)[0]
            finally:
                kernels.choose("auto")
        return compute

    def copy():  # as many bytes as reading both logits and writing the gradient
        gradient.detach().copy_(teacher)
        half.detach().copy_(teacher[: len(half)])

    torch._dynamo.reset()  # or torch.compile would assume dynamic shapes from the second size on
    computes, found = {"reference": ours("reference"), BASE: published}, {}
    if student.is_cuda:
        computes = {"fused": ours("auto"), **computes, "torch.compile": torch.compile(published, dynamic=False)}
        if loss == "kd" and (liger := liger_kd()):
            computes["liger"] = liger
        gradient, half = torch.empty_like(student, dtype=torch.float32), torch.empty_like(student[: len(student) // 2])
        found["copy"] = copy
    for name, compute in computes.items():
        def call(compute=compute):
            student.grad = None
            compute(student, teacher, label).backward()
        try:
            call()
            found[name] = call
        except (RuntimeError, ImportError) as failure:  # out of memory is a RuntimeError
            print(f"  {name} failed and is left out: {errors.first_line(failure)}")
    return found


def liger_kd():
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:
        return print("liger-kernel is not installed: left out")
    divergence = LigerKLDIVLoss(reduction="batchmean")

    def compute(student, teacher, label):
        kl = divergence(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1))
        return 0.3 * F.cross_entropy(student, label, label_smoothing=EPS) + 0.7 * T * T * kl
    return compute


def benchmark(rows: int, classes: int, dtype: str, loss: str, device, repeats: int):
    """A row for each contender and mode."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((3 * torch.randn(rows, classes, generator=generator)).to(device, table.DTYPES[dtype]) for _ in range(2))
    label = torch.randint(classes, (rows,), generator=generator).to(device)
    calls = contenders(loss, student.requires_grad_(), teacher, label)
    if not calls:
        return
    memory = {}  # before graphs hold some
    for name, call in calls.items():
        student.grad = None  # of the call before, which would be freed in this one
        memory[name] = peak_bytes(call, device)
    once = max(1.0, wall_us(calls.get(BASE) or next(iter(calls.values())), 1, device))
    modes = {"eager": interleaved(calls, lambda call: wall_us(call, max(1, int(2e4 / once)), device), repeats)}
    if device.type == "cuda":
        flush, pool = torch.empty(256 * 2**20, dtype=torch.uint8, device=device), torch.cuda.graph_pool_handle()
        replays = {name: replay for name, call in calls.items() if (replay := captured(call, pool))}
        modes["graph"] = interleaved(replays, lambda replay: graph_us(replay, flush), repeats)
    for mode, times in modes.items():
        for name, us in times.items():
            ratios = [value / base for value, base in zip(us, times.get(BASE, ()))]
            yield table.Row(**table.versions(device, torch, triton), rows=rows, classes=classes, dtype=dtype, loss=loss,
                            contender=name, mode=mode, repeats=repeats, **table.spread("us", us), base=BASE,
                            **table.spread("times_base", ratios), peak_mb=round(memory[name] / 1e6, 3),
                            memory_times_base=round(memory[name] / memory[BASE], 3) if BASE in memory else None)


def main(args) -> None:
    device, on_gpu = args.device, args.device.type == "cuda"
    sizes = (SIZES if on_gpu else CPU_SIZES)[:1 if args.tiny else 2 if args.quick else None]
    found = table.Rows(args, "loss", table.short(device), "rows classes dtype loss mode contender us times_base peak_mb")
    for size in args.case or sizes:
        for dtype in ("float32", "bfloat16")[:2 if on_gpu else 1]:
            for loss in ("kd", "dkd"):
                try:
                    for row in benchmark(*map(int, size.split("x")), dtype, loss, device, table.repeats(args, 10, 30)):
                        found.add(row)
                except torch.OutOfMemoryError:
                    print(f"{size} {dtype} {loss}: out of memory, left out")
                torch.cuda.empty_cache()


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "two sizes, few repeats", dict.fromkeys(SIZES + CPU_SIZES), tiny=True).parse_args())
