"""Checks and measurements of the GPU and of both kernels for benchmarks.gpu_day.

    PYTHONPATH=tests python -m benchmarks.gpu_checks kernels --output DIR

machine: versions, clocks, and the rates of copies and matrix products.  kernels: the loss and its gradient against their
definitions in float64.  augmentation: a million images against the CPU, bit for bit.  sanitizer: every kind of launch under
compute-sanitizer, where it is installed.  bounds: each kernel beside the model of benchmarks/results/kernels-ptx-sm90.csv.
On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1).
"""
import csv
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from statistics import median

import torch
import triton

import kernels
from augment import POLICIES, BatchAugmenter
from benchmarks import clocks, table
from benchmarks.table import DTYPES, MEAN, STD
from kernels.softmax_kl import Weights, hyperparameters, softmax_kl, softmax_kl_naive
from losses import Targets
from rundir import errors

ROWS = {1: 37, 2: 37, 3: 37, 10: 513, 100: 257, 300: 65, 1000: 37, 2048: 9, 5000: 5, 32000: 3}  # by the number of classes
OBJECTIVES = {"pair": Weights(0.7, 0.3, 1.0, 8.0), "dominant": Weights(1.0, None, 1.0, 2.0),
              "first": Weights(1.0, None, 1.0, 8.0), "reverse": Weights(0.2, 1.5)}
SMOOTHING = 0.1
IMAGES = {32: (56_100, 255), 64: (4_064, 127), 224: (93, 31)}  # of each policy and type, a million in all, and of a batch
TINY = ("KD C=10", "none 32x32")  # cases of the model


def compare_loss(device: str, classes: int, kind: str) -> Iterator[tuple]:
    """Case, count, error and tolerance for each objective; the error of the loss or of its gradient, whichever is larger."""
    generator = torch.Generator().manual_seed(classes)
    z, v = (3 * torch.randn(2, ROWS[classes], classes, generator=generator)).to(DTYPES[kind])
    label, other = torch.randint(classes, (2, len(z)), generator=generator)
    lam = torch.rand(len(z), generator=generator)
    lam[::5], lam[1::7] = 1.0, 0.0
    targets, exact = Targets(label, other, lam), z.double().requires_grad_()
    # The gradient is rounded once, in the interpreter towards zero.
    allowed = 2e-5 + (kind != "float32") * torch.finfo(DTYPES[kind]).eps / (1 if device == "cpu" else 2)
    for name, weights in OBJECTIVES.items():
        how = {"split": "pair", "reverse": True} if name == "reverse" else {"split": name}
        how |= {"temperature": 4.0, "label_smoothing": SMOOTHING}
        terms = softmax_kl_naive(exact, v.double(), *targets, **how)
        total = sum(weight * term for weight, term in zip(weights, terms) if weight)
        (gradient,), expected = torch.autograd.grad(total, exact), total.item()
        leaf = z.to(device, copy=True).requires_grad_()
        got, _ = softmax_kl(leaf, v.to(device), *(part.to(device) for part in targets), weights, **how)
        got.backward()
        off = (leaf.grad.cpu().double() - gradient).abs().max() / gradient.abs().max().clamp(min=0.01)
        yield (f"{len(z)} rows of {classes} classes, {kind}, {name}", len(z),
               max(abs(got.item() - expected) / max(1.0, abs(expected)), off.item()), allowed)


def augmenter(images, kind: str, policy: str, batch: int, **options) -> BatchAugmenter:
    labels = torch.arange(len(images), device=images.device) // 3
    return BatchAugmenter(images, labels, batch_size=batch, seed=3, policy=policy, mean=MEAN, std=STD, mix_mode="elem",
                          dtype=DTYPES[kind], **options)


def compare_batches(device: str, policy: str, size: int, kind: str, count: int, batch: int) -> Iterator[tuple]:
    """Case, count, how many numbers differ from those of the CPU path, and 0."""
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    made = []
    for where, kernel in ((device, "triton"), ("cpu", "reference")):
        kernels.choose(kernel)
        made.append(augmenter(images.to(where), kind, policy, batch, random_erasing=0.5))
        made[-1].set_epoch(1)
    assert [each.fused for each in made] == [True, False]
    differ = 0
    for step in range(made[0].steps):
        for got, expected in zip(*((images, *targets) for images, targets in (each(step) for each in made))):
            bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
            differ += (got.cpu().view(bits) != expected.view(bits)).sum().item()
    yield f"{policy}, {size}x{size}, {kind}", made[0].steps * batch, differ, 0


def poisoned(compare, case) -> list[tuple]:
    """The rows of `compare` where new tensors hold NaN, which shows elements that a kernel leaves out."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    kernels.choose("triton")
    return list(compare(*case))


def compare_all(args, compare, cases) -> None:
    """A row for each comparison, in parallel, as each case compiles a kernel; exit code 1 where any is wrong."""
    rows = table.Rows(args, args.check, table.short(args.device), "ok case error failure")

    def alone(case) -> None:
        """In a process of its own: an illegal address fails every later call, and a crash would end the whole pool."""
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                found, failure = process.submit(poisoned, compare, (str(args.device), *case)).result(), ""
        except Exception as reason:  # the other cases have rows all the same
            found, failure = [(str(case), 0, None, None)], errors.first_line(reason)
        for name, count, error, allowed in found:
            rows.add(table.Row(**table.versions(args.device, torch, triton), case=name, count=count, error=error, allowed=allowed,
                               ok=not failure and error <= allowed, failure=failure))

    with ThreadPoolExecutor(1 if args.tiny else max(1, min(12, os.cpu_count() - 1))) as pool:
        list(pool.map(alone, cases))
    wrong = sum(not each.ok for each in rows.all)
    print(f"{wrong} of {len(rows.all)} comparisons are wrong; {sum(each.count for each in rows.all)} rows or images")
    raise SystemExit(bool(wrong))


def check_kernels(args) -> None:
    compare_all(args, compare_loss, [(3, "float32")] if args.tiny else itertools.product(ROWS, DTYPES))


def check_augmentation(args) -> None:
    cases = [(policy, size, kind, *IMAGES[size]) for size, kind, policy in itertools.product(IMAGES, DTYPES, POLICIES)]
    compare_all(args, compare_batches, [("none", 32, "float32", 8, 8)] if args.tiny else cases)


def check_machine(args) -> None:
    device, rows = args.device, table.Rows(args, "machine", table.short(args.device), "name value")
    on_gpu = device.type == "cuda"

    def best_s(call):
        call()
        return min(clocks.wall_us(call, 1, device) for _ in range(10)) / 1e6

    installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    facts = {"hardware": table.hardware(device), "python": platform.python_version(), "cores": os.cpu_count()}
    facts |= {name: installed.get(name, "missing") for name in "torch torchvision triton numpy pytest liger-kernel timm".split()}
    if on_gpu:
        facts |= {"properties": str(torch.cuda.get_device_properties(device)), "cuda": torch.version.cuda,
                  "cuDNN": torch.backends.cudnn.version()}
    if on_gpu and shutil.which("nvidia-smi"):
        names = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        facts[names] = subprocess.getoutput(f"nvidia-smi --query-gpu={names} --format=csv,noheader")
    size, side = (2**30, 8192) if on_gpu else (2**22, 256)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    facts["copy, GB/s read and written"] = round(2 * size / best_s(lambda: target.copy_(source)) / 1e9, 1)
    for kind in ("float32", "bfloat16"):
        matrix = torch.randn(side, side, device=device).to(DTYPES[kind])
        facts[f"matrix product, {kind}, TFLOP/s"] = round(2 * side**3 / best_s(lambda: matrix @ matrix) / 1e12, 3)
    one = torch.zeros(1, device=device)
    facts["a launch, us"] = round(clocks.wall_us(lambda: one.add_(1), 1000, device), 2)
    for name, value in facts.items():
        rows.add(table.Row(name=name, value=value))


def model(args) -> list[dict]:
    """Rows of tests/instructions.py."""
    with open(table.RESULTS / "kernels-ptx-sm90.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if not args.tiny or row["case"] in TINY]


def launch(row: dict, device, count: int):
    """A call that launches the kernel of a row of the model on so many rows or images, and does nothing else."""
    kernels.choose("triton")
    if row["kernel"] == "augment":
        policy, size = row["case"].split()[0], int(row["case"].split("x")[-1])
        images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, device=device)
        made = augmenter(images, row["dtype"], policy, count)
        return lambda: made(0)
    name, classes = row["case"].split(" C=")
    student, teacher = torch.randn(2, count, int(classes), device=device).to(DTYPES[row["dtype"]])
    targets = Targets.unmixed(torch.arange(count, device=device) % int(classes))
    weights = Weights(ce=0.3, kl=0.7) if name == "KD" else Weights(ce=1.0, tckd=1.0, nckd=8.0)
    hyper = hyperparameters(weights, 4.0, SMOOTHING, device)
    return lambda: torch.ops.fusekd.softmax_kl(student, teacher, *targets, hyper, weights.terms, "pair", False)


def check_sanitizer(args) -> None:
    inside = "FUSEKD_SANITIZED" in os.environ
    tool = None if inside or args.device.type == "cpu" else shutil.which("compute-sanitizer")
    if tool:
        # PyTorch and Triton make calls of the driver that may fail, and handle that.
        command = [tool, "--error-exitcode", "9", "--report-api-errors", "no", sys.executable, "-m", "benchmarks.gpu_checks",
                   *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env=os.environ | {"FUSEKD_SANITIZED": "1"}).returncode)
    for row in model(args):
        launch(row, args.device, 2 if args.tiny else 5)()
        clocks.synchronize(args.device)
        print(row["case"], row["dtype"], flush=True)
    print(f"{len(model(args))} launches {'under' if inside else 'without'} compute-sanitizer")


def check_bounds(args) -> None:
    """ns: of a row or image in a replayed CUDA graph; times_bound: over the larger bound."""
    device, on_gpu = args.device, args.device.type == "cuda"
    rows = table.Rows(args, "bounds", table.short(device), "kernel case dtype ns times_bound")
    gpu = "h200" if "H200" in table.hardware(device) else "h100"
    flush = torch.empty(2**28, dtype=torch.uint8, device=device) if on_gpu else None
    for row in model(args):
        loss = row["kernel"] == "softmax_kl"
        width = int(row["case"].split("=")[-1]) if loss else int(row["case"].split("x")[-1])**2
        count = 2 if args.tiny else min(2**14, max(1024, 2**26 // width)) if loss else 2**23 // width
        call = launch(row, device, count)
        call()
        replay = clocks.captured(call) if on_gpu else None
        if on_gpu and not replay:
            continue
        us = median([clocks.graph_us(replay, flush) for _ in range(22)][2:]) if on_gpu else clocks.wall_us(call, 1, device)
        ns, bounds = 1000 * us / count, {f"{bound}_ns": float(row[f"{gpu}_{bound}_ns"]) for bound in ("issue", "bytes")}
        rows.add(table.Row(**table.versions(device, torch, triton), kernel=row["kernel"], case=row["case"], dtype=row["dtype"],
                           unit=row["unit"], count=count, ns=round(ns, 3), model=gpu, **bounds,
                           times_bound=round(ns / max(bounds.values()), 2)))
        del call, replay
        torch.cuda.empty_cache()


CHECKS = {"machine": check_machine, "kernels": check_kernels, "augmentation": check_augmentation, "sanitizer": check_sanitizer,
          "bounds": check_bounds}


if __name__ == "__main__":
    parser = table.parser(__doc__, tiny=True)
    parser.add_argument("check", choices=CHECKS)
    errors.run(lambda args: CHECKS[args.check](args), parser.parse_args())
