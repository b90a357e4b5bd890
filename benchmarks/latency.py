"""Latency, throughput, size and accuracy of trained networks in PyTorch, compiled, and in ONNX Runtime in fp32 and int8.

    python -m benchmarks.latency runs/teacher runs/v2-s42        -> benchmarks/results/latency-<gpu or cpu>.csv
    python -m benchmarks.latency --quick RUN [RUN ...]           without torch.compile and memory, one repeat; writes nothing
    python -m benchmarks.latency --device cpu RUN [RUN ...]

A RUN is the directory of a run, with its best.pt.  All contenders take uint8 images from the host's memory and return
probabilities and logits there.  PyTorch's networks have folded BatchNorms and are channels_last.  ONNX Runtime runs on a CPU
where it is installed, on files exported here and tested on the run's test set; PyTorch's accuracy is the checkpoint's.

Contenders are interleaved in blocks of each batch size.  ms_median and ms_p95 are of one image, over all calls; images_per_s is
the median over repeats at best_batch.  flops is 2 per multiply-add.  process_mb is the peak memory of a process that opens the
network and predicts one image, peak_mb what it took after importing its runtime; not measured for compiled networks.
"""
import importlib.metadata
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch

import models
from benchmarks import table
from benchmarks.clocks import wall_us
from deploy import check, runtime, writers
from rundir import errors
from rundir.files import digest, write_json
from rundir.run_directory import processor

BATCHES = (8, 32, 128)
CALLS, BLOCK_S = 20, 0.1  # of a block of single images; the least time of a block of batches
CPU = torch.device("cpu")
SHOWN = "run engine threads file_mb accuracy ms_median ms_p95 images_per_s best_batch"


def processor_with_int8() -> str:
    """The model of the CPU, and its instructions for int8."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return ", ".join([processor(), *(flag for flag in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8") if flag in flags)])


def torch_call(checkpoint: Path, device, compiled: bool):
    net = writers.from_checkpoint(checkpoint).to(device, memory_format=torch.channels_last)
    net = torch.compile(net) if compiled else net

    @torch.inference_mode()
    def call(images):
        return [output.cpu() for output in net(torch.from_numpy(images).to(device))]

    return call


def onnx_files(checkpoint: Path, module, folder: Path):
    """(engine, file, accuracy on the test set) in fp32 and in int8, exported to `folder`."""
    data = check.data_of_run(checkpoint, module.info["classes"])
    images, labels = data.test.images.numpy(), data.test.labels.numpy()
    for precision in ("fp32", "int8"):
        path = folder / f"{checkpoint.parent.name}-{precision}.onnx"
        writers.export(module, "onnx", precision, check.calibration(data), path)
        metadata = writers.metadata(module, "onnx", precision, digest(checkpoint)) | {"sha256": digest(path)}
        write_json(runtime.metadata_path(path), metadata)
        predictions = runtime.load(path)(images)[1].argmax(1)
        yield f"onnxruntime {precision}", path, round(100 * float(np.mean(predictions == labels)), 2)


def memory(path: Path) -> dict:
    """process_mb and peak_mb of a process of its own that opens `path`."""
    result = subprocess.run([sys.executable, "-m", "benchmarks.peak_memory", path], capture_output=True, text=True, check=True,
                            cwd=table.RESULTS.parent.parent)
    return dict(zip(("process_mb", "peak_mb"), map(float, result.stdout.split())))


def contenders(run: Path, device, folder: Path, quick: bool, common: dict):
    """A contender for every engine for the best.pt of `run`, on a CPU with one thread and with all.

    Its times are empty so far: milliseconds of an image alone, and images a second by batch size.
    """
    checkpoint = run / "best.pt"
    module = writers.from_checkpoint(checkpoint)
    info, side, every = module.info, module.info["image_size"], torch.get_num_threads()
    images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), side, side, 3), dtype=np.uint8)
    common = common | {"run": run.name, "network": info["model"], "parameters": module.net.size,
                       "flops": models.flops(module.net, side)}
    engines = [(name, checkpoint, info["test_acc1"], lambda threads, compiled=compiled: torch_call(checkpoint, device, compiled))
               for name, compiled in (("eager", False), ("compiled", True))[:1 if quick else 2]]
    if common["onnxruntime"]:
        engines += [(name, path, accuracy, lambda threads, path=path: runtime.load(path, threads))
                    for name, path, accuracy in onnx_files(checkpoint, module, folder)]
    for name, path, accuracy, start in engines:
        measured = {"process_mb": None, "peak_mb": None}
        if device.type == "cpu" and not quick and name != "compiled":
            measured = memory(path.resolve())
        for threads in sorted({1, every}) if device.type == "cpu" else [every]:
            columns = common | {"engine": name, "threads": threads, "file_mb": round(path.stat().st_size / 1e6, 3)} | measured
            yield table.Row(call=start(threads), images=images, columns=columns | {"accuracy": accuracy}, ms=[],
                            rates={size: [] for size in BATCHES})


def measure(entered: list[table.Row], repeats: int):
    """A row for each contender; they take turns."""
    for each in entered:
        torch.set_num_threads(each.columns["threads"])
        for size in (1, *BATCHES, 1):  # what is compiled or allocated at the first call of a shape
            each.call(each.images[:size])
    for _ in range(repeats):
        for each in entered:
            torch.set_num_threads(each.columns["threads"])
            one = partial(each.call, each.images[:1])
            one()  # not timed: the threads of the one before may still be busy
            each.ms += [wall_us(one, 1, CPU) / 1000 for _ in range(CALLS)]
            for size, found in each.rates.items():
                started, count = time.perf_counter(), 0
                while time.perf_counter() - started < BLOCK_S:
                    each.call(each.images[:size])
                    count += size
                found.append(count / (time.perf_counter() - started))
    for each in entered:
        rates = {1: 1000 / median(each.ms)} | {size: median(found) for size, found in each.rates.items()}
        best = max(rates, key=rates.get)
        yield table.Row(**each.columns, repeats=repeats, ms_median=round(median(each.ms), 4),
                        ms_p95=round(quantiles(each.ms, n=20)[-1], 4), best_batch=best, images_per_s=round(rates[best], 1))


def main(args) -> None:
    device, onnxruntime = args.device, ""
    if device.type == "cpu":
        try:
            runtime.require(*writers.needs("onnx", "int8"))
            onnxruntime = importlib.metadata.version("onnxruntime")
        except errors.Failure as failure:
            print(f"without ONNX Runtime: {failure}")
    common = {"hardware": table.hardware(device), "processor": processor_with_int8(), "torch": torch.__version__,
              "onnxruntime": onnxruntime}
    torch._dynamo.config.recompile_limit = 1000  # every network, number of threads and kind of batch is compiled for itself
    found = table.Rows(args, "latency", table.short(device), SHOWN)
    with tempfile.TemporaryDirectory() as folder:
        entered = [each for run in args.runs for each in contenders(Path(run), device, Path(folder), args.quick, common)]
        for row in measure(entered, table.repeats(args, 1, 15)):
            found.add(row)


if __name__ == "__main__":
    flags = table.parser(__doc__, "no torch.compile, no memory, one repeat")
    flags.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, of a teacher or a student")
    errors.run(main, flags.parse_args())
