"""How many images a second the batch augmentation makes beside what people use today, side by side in one process.

    python -m benchmarks.augmentation                 the table -> benchmarks/results/augmentation-<gpu or cpu>.csv and .png
    python -m benchmarks.augmentation --quick         one batch size, few repeats
    python -m benchmarks.augmentation --device cpu    the plain-PyTorch reference: without a GPU there is no kernel to measure

Images are 32x32.  "pipeline" is crop, flip, AutoAugment, normalise, Random Erasing and Mixup/CutMix; "policy" is AutoAugment
alone, after which ours normalises; "erase and mix" leaves AutoAugment out (timm's is given floats).  Ours runs a whole epoch,
with the draws or the upload that an epoch begins with.  Contenders take turns, repeat by repeat, and the ratio to the first is
taken within each repeat, so it holds where the machine's speed drifts.  A rival that works image by image is timed on at most
64 of them.  `step_share` is the time of a batch over that of a training step of ResNet-18 on it, fp16 on a GPU; `launches`
counts what one batch starts on the GPU.
"""
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchvision
import triton
from matplotlib.ticker import LogLocator, NullLocator
from torchvision import transforms as v1
from torchvision.transforms import v2

import kernels
from augment import BatchAugmenter
from benchmarks import table
from benchmarks.augmentation_rivals import IMAGE_BY_IMAGE, MEAN, STD, image_by_image, loading, optional, torchvision_pipeline
from data.synthetic import CLASSES, generate
from rundir import errors

SIZES = ("128", "512", "2048")
ALONE = {"crop_pad": 0, "flip": False, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}


@dataclass(frozen=True)
class Row:
    """One contender at one batch size, median and extremes over the repeats; `times_first` is its time over the first's."""
    hardware: str
    torch: str
    torchvision: str
    triton: str
    stage: str
    batch_size: int
    contender: str
    repeats: int
    images_per_s: float
    images_per_s_min: float
    images_per_s_max: float
    times_first: float
    times_first_min: float
    times_first_max: float
    step_share: float
    launches: int | None


def ours(kernel: str, images, labels, batch_size: int, **options):
    """A call that makes a whole epoch and returns how many images that is."""
    kernels.choose(kernel)
    augmenter = BatchAugmenter(images, labels, batch_size=batch_size, seed=0, mean=MEAN, std=STD,
                               dtype=torch.float16 if images.is_cuda else torch.float32, **options)
    kernels.choose("auto")
    epochs = itertools.count()

    def call():
        augmenter.set_epoch(next(epochs))
        for step in range(augmenter.steps):
            augmenter(step)
        return augmenter.steps * batch_size
    return augmenter, call


def captured(augmenter):
    """The same from a CUDA graph that counts its steps itself."""
    step, stream = torch.zeros((), dtype=torch.int64, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        augmenter(step)
    torch.cuda.synchronize()
    graph, epochs = torch.cuda.CUDAGraph(), itertools.count()
    with torch.cuda.graph(graph, stream=stream):
        augmenter(step)
        step += 1

    def call():
        augmenter.set_epoch(next(epochs))
        step.zero_()
        for _ in range(augmenter.steps):
            graph.replay()
        return augmenter.steps * augmenter.batch_size
    return call


def contenders(images, labels, batch_size: int) -> dict:
    """stage -> name -> call, the first of each is ours."""
    device, name = images.device, "ours, reference"
    kinds = {"policy": ALONE, "pipeline": {}, "erase and mix": {"policy": "none", "crop_pad": 0, "flip": False}}
    stages = {stage: {} for stage in kinds}
    for stage, options in kinds.items():
        if device.type == "cuda":
            augmenter, call = ours("triton", images, labels, batch_size, **options)
            stages[stage] |= {"ours, fused": call, "ours, fused, CUDA graph": captured(augmenter)}
        stages[stage][name] = ours("reference", images, labels, batch_size, **options)[1]

    some, some_labels = images[:batch_size], labels[:batch_size]
    few = some[:IMAGE_BY_IMAGE].permute(0, 3, 1, 2).contiguous()
    few_labels = some_labels[:IMAGE_BY_IMAGE]
    pictures = [v1.functional.to_pil_image(image.cpu()) for image in few]
    to_float = {"v1": (v1, [v1.ConvertImageDtype(torch.float32)]), "v2": (v2, [v2.ToDtype(torch.float32, scale=True)])}
    for version, (module, conversion) in to_float.items():
        policy, what = module.AutoAugment(v1.AutoAugmentPolicy.CIFAR10), f"torchvision {version}, "
        stages["policy"][what + "tensor"] = lambda policy=policy: len([policy(image) for image in few])
        stages["pipeline"][what + "tensor"] = image_by_image(torchvision_pipeline(module, conversion), few, few_labels)
        if device.type == "cpu":
            from_pil = [v1.ToTensor()] if version == "v1" else [v2.ToImage(), *conversion]
            stages["policy"][what + "PIL"] = lambda policy=policy: len([policy(picture) for picture in pictures])
            stages["pipeline"][what + "PIL"] = image_by_image(torchvision_pipeline(module, from_pil), pictures, few_labels)
    many = min(4096, len(images)) // batch_size * batch_size
    repeated = [pictures[index % len(pictures)] for index in range(many)]
    loader_name, loader = loading(repeated, labels[:many].cpu(), batch_size, device)
    stages["pipeline"][loader_name] = loader
    for stage, found in optional(device, some, some_labels).items():
        stages[stage] |= found
    return {stage: calls for stage, calls in stages.items() if any("ours" not in name for name in calls)}


def timed(call, device) -> float:
    """Seconds per image."""
    table.synchronize(device)
    started = time.perf_counter()
    images = call()
    table.synchronize(device)
    return (time.perf_counter() - started) / images


def step_seconds(batch_size: int, device) -> float:
    """A training step of ResNet-18 on a batch, median of three."""
    half = device.type == "cuda"
    model = torchvision.models.resnet18(num_classes=len(CLASSES)).to(device, memory_format=torch.channels_last)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.01), torch.amp.GradScaler(device.type, enabled=half)
    images = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def step():
        with torch.autocast(device.type, torch.float16, enabled=half):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return batch_size

    step()
    return median(timed(step, device) for _ in range(3)) * batch_size


def count_launches(call, batch_size: int, device) -> int | None:
    """What one batch starts on the GPU."""
    if device.type == "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        images = call()
        table.synchronize(device)
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]  # not the CPU's part
    return round(len(on_gpu) * batch_size / images)


def benchmark(images, labels, batch_size: int, repeats: int, hardware: str):
    device = images.device
    step = step_seconds(batch_size, device)
    for stage, calls in contenders(images, labels, batch_size).items():
        for call in calls.values():
            call()
        times = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                times[name].append(timed(call, device))
        for name, seconds in times.items():
            ratios = [value / first for value, first in zip(seconds, next(iter(times.values())))]
            speeds = [1 / value for value in seconds]
            yield Row(hardware, torch.__version__, torchvision.__version__, triton.__version__, stage, batch_size, name, repeats,
                      *(round(pick(speeds)) for pick in (median, min, max)),
                      *(round(pick(ratios), 3) for pick in (median, min, max)),
                      round(median(seconds) * batch_size / step, 5), count_launches(calls[name], batch_size, device))


def draw(rows_of: list[Row], path: Path) -> None:
    """Images a second by batch size; one panel per stage."""
    stages, names = (list(dict.fromkeys(column)) for column in zip(*((row.stage, row.contender) for row in rows_of)))
    figure, axes = plt.subplots(len(stages), 1, figsize=(7, 2.4 * len(stages) + 0.8), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[:, 0], stages):
        here = [row for row in rows_of if row.stage == stage]
        sizes, shown = (list(dict.fromkeys(column)) for column in zip(*((row.batch_size, row.contender) for row in here)))
        width = 0.8 / len(shown)
        for index, name in enumerate(shown):
            rows = [row for row in here if row.contender == name]
            speeds = [row.images_per_s for row in rows]
            errors = [[row.images_per_s - row.images_per_s_min for row in rows],
                      [row.images_per_s_max - row.images_per_s for row in rows]]
            left = [sizes.index(row.batch_size) + (index - len(shown) / 2) * width for row in rows]
            axis.bar(left, speeds, width, align="edge", label=name, color=f"C{names.index(name)}", yerr=errors,
                     error_kw={"elinewidth": 0.7})
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.set_ylabel("images / s")
        axis.set_xticks(range(len(sizes)), map(str, sizes))
        axis.set_title(stage, fontsize=9, loc="left")
    axes[-1, 0].set_xlabel(f"batch size; {rows_of[0].hardware}")
    handles = {label: handle for axis in axes[:, 0] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def main(args) -> None:
    device = table.device(args.device)
    if device.type == "cpu":
        print("no GPU: the plain-PyTorch reference is measured, the fused kernel is not")
    sizes = SIZES[:1] if args.quick else SIZES
    count = max(map(int, args.case or sizes)) if args.quick == table.TINY else 10_000
    images, labels = (part.to(device) for part in generate(count, 0))
    if device.type == "cuda":  # as many as CIFAR has
        images, labels = images.repeat(5, 1, 1, 1), labels.repeat(5)
    found = table.Rows(args, "augmentation", table.short(device))
    for batch_size in table.chosen(args, sizes):
        for row in benchmark(images, labels, int(batch_size), table.repeats(args, 3, 10), table.hardware(device)):
            found.add(row)
            launches = "" if row.launches is None else f"  {row.launches} launches"
            print(f"{row.batch_size:5} {row.stage:13} {row.contender:30} {row.images_per_s:9} images/s "
                  f"{row.times_first:8.2f} ({row.times_first_min:.2f} to {row.times_first_max:.2f})  "
                  f"{row.step_share:.4f} of a step{launches}", flush=True)
    found.close(draw)


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "one batch size, few repeats", SIZES, tiny=True).parse_args())
