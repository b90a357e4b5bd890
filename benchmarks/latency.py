"""How fast trained networks are, how large, and how accurate: in PyTorch, compiled, and in ONNX Runtime in fp32 and int8.

    python -m benchmarks.latency runs/teacher runs/v2-s42        -> benchmarks/results/latency-<gpu or cpu>.csv and .png
    python -m benchmarks.latency --quick RUN [RUN ...]           without torch.compile and memory, few repeats; writes nothing
    python -m benchmarks.latency --device cpu RUN [RUN ...]

A RUN is the directory of a run, with its best.pt and config.json.  All contenders take uint8 images from the host's memory and
give probabilities and logits there.  PyTorch's networks have their BatchNorms folded and are channels_last; on a GPU they are
on it, and ONNX Runtime is left out.  Its files are exported here, by deploy.writers, and compared with the checkpoint
on the run's test set; PyTorch's accuracy is the one in the checkpoint.  Where onnxruntime is not installed, its rows are missing.

Contenders take turns: in each repeat every one of them, with one thread and with all, has a block of calls with one image, each
of them timed, and one block for each batch size.  Median and 95th percentile are over all calls; the throughput is the median
over repeats of the best batch size.  flops is 2 per multiply-add.  process_mb is the memory of a process that opens the network
and predicts one image, and peak_mb what it took since it had imported its runtime; of a compiled network it is not measured.
"""
import csv
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter

import models
from benchmarks import table
from deploy import check, runtime, writers
from rundir import errors
from rundir.files import digest, write_json

BATCHES = (8, 32, 128)
CALLS, BLOCK_S = 20, 0.1  # of a block of single images; a block of batches takes at least so long
MARKERS = "osD^vP*X<>"
ENGINES = {"eager": "#0072B2", "compiled": "#56B4E9", "onnxruntime fp32": "#E69F00", "onnxruntime int8": "#D55E00"}


@dataclass(frozen=True)
class Row:
    """A network in one engine with so many threads; accuracy in percent of the test set, images_per_s at best_batch."""
    hardware: str
    processor: str
    torch: str
    onnxruntime: str
    run: str
    network: str
    parameters: int
    flops: int
    engine: str
    threads: int
    file_mb: float
    process_mb: float | None
    peak_mb: float | None
    accuracy: float | None
    repeats: int
    ms_median: float
    ms_p95: float
    best_batch: int
    images_per_s: float


class Contender:
    """A network in one engine with so many threads, its times so far, and the columns of its row that are known before."""

    def __init__(self, call, side: int, threads: int, **columns):
        self.call, self.threads, self.columns = call, threads, columns | {"threads": threads}
        self.single_s, self.rates = [], {}
        self.images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), side, side, 3), dtype=np.uint8)

    def warm_up(self) -> None:
        """Everything that is compiled or allocated at the first call of a shape."""
        torch.set_num_threads(self.threads)
        for size in (1, *BATCHES, 1):
            self.call(self.images[:size])

    def take_turn(self) -> None:
        torch.set_num_threads(self.threads)
        self.call(self.images[:1])  # not timed: the threads of the one before may still be busy
        for _ in range(CALLS):
            started = time.perf_counter()
            self.call(self.images[:1])
            self.single_s.append(time.perf_counter() - started)
        for size in BATCHES:
            started, count = time.perf_counter(), 0
            while time.perf_counter() - started < BLOCK_S:
                self.call(self.images[:size])
                count += size
            self.rates.setdefault(size, []).append(count / (time.perf_counter() - started))

    def row(self) -> Row:
        rates = {1: 1 / median(self.single_s)} | {size: median(found) for size, found in self.rates.items()}
        best = max(rates, key=rates.get)
        middle, slow = median(self.single_s), quantiles(self.single_s, n=20)[-1]
        return Row(**self.columns, ms_median=round(1000 * middle, 4), ms_p95=round(1000 * slow, 4), best_batch=best,
                   images_per_s=round(rates[best], 1))


def processor() -> str:
    """The model of the CPU, and its instructions for int8."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    int8 = [flag for flag in found.get("flags", "").split() if flag in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8")]
    return ", ".join([found.get("model name", platform.processor()), *int8])


def onnxruntime_version() -> str:
    """Empty where something is missing that its contenders need."""
    try:
        runtime.require(*writers.needs("onnx", "int8"))
    except errors.Failure as failure:
        print(f"without ONNX Runtime: {failure}")
        return ""
    return importlib.metadata.version("onnxruntime")


def torch_call(checkpoint: Path, device, compiled: bool):
    net = writers.deployed(checkpoint).to(device, memory_format=torch.channels_last)
    if compiled:
        net = torch.compile(net)

    @torch.inference_mode()
    def call(images):
        return [output.cpu() for output in net(torch.from_numpy(images).to(device))]

    return call


def onnx_files(checkpoint: Path, module, folder: Path):
    """(engine, file, accuracy on the test set) in fp32 and in int8, exported to `folder`."""
    data = check.data_of_run(checkpoint, module.info["classes"])
    images, labels = (part.numpy() for part in data.test)
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


def contenders(run: Path, device, folder: Path, counts: tuple, quick: bool, common: dict):
    """Every engine for the best.pt of `run`, with each of these numbers of threads; `common` are columns of all rows."""
    checkpoint, on_cpu = run / "best.pt", device.type == "cpu"
    module = writers.deployed(checkpoint)
    info, side = module.info, module.info["image_size"]
    common = common | {"run": run.name, "network": info["model"], "parameters": module.net.size, "process_mb": None,
                       "peak_mb": None, "flops": models.flops(module.net, side)}
    engines = [(name, checkpoint, info["test_acc1"], lambda threads, compiled=compiled: torch_call(checkpoint, device, compiled))
               for name, compiled in (("eager", False), ("compiled", True))[:1 if quick else 2]]
    if common["onnxruntime"]:
        engines += [(name, path, accuracy, lambda threads, path=path: runtime.load(path, threads))
                    for name, path, accuracy in onnx_files(checkpoint, module, folder)]
    for name, path, accuracy, start in engines:
        measured = {} if quick or name == "compiled" or not on_cpu else memory(path.resolve())
        for threads in counts:
            yield Contender(start(threads), side, threads, **common | measured, engine=name, accuracy=accuracy,
                            file_mb=round(path.stat().st_size / 1e6, 3))


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (milliseconds, accuracy) those that none is both faster and at least as accurate as, from fast to slow."""
    best, kept = -1.0, []
    for ms, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if accuracy > best:
            best = accuracy
            kept.append((ms, accuracy))
    return kept


def draw(path: Path) -> None:
    """Accuracy against latency, from the CSV at `path` to the PNG beside it: a panel for each number of threads."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["accuracy"]]
    runs, counts = (list(dict.fromkeys(row[name] for row in rows)) for name in ("run", "threads"))
    figure, axes = plt.subplots(1, len(counts), figsize=(1 + 3.6 * len(counts), 3.8), squeeze=False, sharey=True,
                                layout="constrained")
    for axis, threads in zip(axes[0], counts):
        there = [row for row in rows if row["threads"] == threads]
        for row in there:
            axis.plot(float(row["ms_median"]), float(row["accuracy"]), MARKERS[runs.index(row["run"]) % len(MARKERS)],
                      markersize=7, color=ENGINES[row["engine"]], markeredgecolor="black", markeredgewidth=0.5)
        axis.plot(*zip(*front([(float(row["ms_median"]), float(row["accuracy"])) for row in there])), color="0.6", zorder=0,
                  drawstyle="steps-post")
        axis.set(xscale="log", xlabel="ms for one image, median")
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
        axis.set_title(f"{threads} thread{'s' * (threads != '1')}", fontsize=9, loc="left")
        axis.grid(color="0.9")
    axes[0, 0].set_ylabel("test accuracy (%)")
    networks = {row["run"]: row["network"] for row in rows}
    handles = [plt.Line2D([], [], linestyle="none", marker=MARKERS[index % len(MARKERS)], color="0.4",
                          label=f"{run} ({networks[run]})") for index, run in enumerate(runs)]
    handles += [plt.Line2D([], [], linestyle="none", marker="o", color=ENGINES[name], label=name)
                for name in ENGINES if any(row["engine"] == name for row in rows)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(rows[0]["processor"] if "CPU" in rows[0]["hardware"] else rows[0]["hardware"], fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def measure(args) -> None:
    device, every, repeats = table.device(args.device), torch.get_num_threads(), 1 if args.quick else 15
    counts = tuple(sorted({1, every})) if device.type == "cpu" else (every,)
    common = {"hardware": table.hardware(device), "processor": processor(), "torch": torch.__version__,
              "onnxruntime": onnxruntime_version() if device.type == "cpu" else "", "repeats": repeats}
    torch._dynamo.config.recompile_limit = 1000  # every network, number of threads and kind of batch is compiled for itself
    entered = []
    with tempfile.TemporaryDirectory() as folder:
        for run in args.runs:
            for contender in contenders(Path(run), device, Path(folder), counts, args.quick, common):
                contender.warm_up()
                entered.append(contender)
        for _ in range(repeats):
            for contender in entered:
                contender.take_turn()
    found = table.Rows(args, "latency", table.short(device))
    for contender in entered:
        found.add(contender.row())
    print(f"{'run':16} {'engine':17} threads      MB  accuracy  ms, 1 image     p95   images/s  (batch)")
    for row in found.all:
        print(f"{row.run:16} {row.engine:17} {row.threads:7d} {row.file_mb:7.2f} {row.accuracy or float('nan'):9.2f} "
              f"{row.ms_median:12.3f} {row.ms_p95:7.3f} {row.images_per_s:10.0f}  ({row.best_batch})")
    found.close(lambda rows, picture: draw(picture.with_suffix(".csv")))


def main() -> None:
    flags = table.parser(__doc__, "no torch.compile, no memory, few repeats")
    flags.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, of a teacher or a student")
    errors.run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
