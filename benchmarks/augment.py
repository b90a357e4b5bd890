"""How many images a second the batch augmentation makes beside what people use today, side by side in one process.

    python benchmarks/augment.py                  the whole table -> benchmarks/results/augment-<gpu or cpu>.csv and .png
    python benchmarks/augment.py --quick          one batch size, few repeats
    python benchmarks/augment.py --device cpu     the plain-PyTorch reference: without a GPU there is no kernel to measure

Images are 32x32.  "pipeline" is crop, flip, AutoAugment, normalise, Random Erasing and Mixup/CutMix; "policy" is AutoAugment
alone, after which ours normalises; "erase and mix" leaves AutoAugment out (timm's is given floats).  Ours runs a whole epoch,
with the draws or the upload that an epoch begins with.  Contenders take turns, repeat by repeat, and the ratio to the first is
taken within each repeat, so it holds where the machine's speed drifts.  A rival that works image by image is timed on at most
64 of them.  `step_share` is the time of a batch over that of a training step of ResNet-18 on it, fp16 on a GPU; `launches`
counts what one batch starts on the GPU.
"""
import argparse
import csv
import itertools
import os
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402
from torchvision import transforms as v1  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

import kernels  # noqa: E402
from augment import BatchAugmenter  # noqa: E402
from training.synthetic import CLASSES, generate  # noqa: E402

SIZES = (128, 512, 2048)
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGE_BY_IMAGE = 64  # so many at most for one timing
ALONE = {"crop_pad": 0, "flip": False, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}


@dataclass(frozen=True)
class Row:
    """One contender at one batch size, median and extremes over the repeats; `times_first` is its time over the first's."""
    hardware: str
    torch: str
    torchvision: str
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


def torchvision_pipeline(version, to_float):
    """torchvision's own order; what comes out of it is one image."""
    return version.Compose([version.RandomCrop(32, padding=4), version.RandomHorizontalFlip(),
                            version.AutoAugment(v1.AutoAugmentPolicy.CIFAR10), *to_float, version.Normalize(MEAN, STD),
                            version.RandomErasing(0.25)])


def image_by_image(transform, images, labels):
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(CLASSES)), v2.CutMix(alpha=1.0, num_classes=len(CLASSES))])

    def call():
        mix(torch.stack([transform(image) for image in images]), labels)
        return len(images)
    return call


class Pictures(torch.utils.data.Dataset):
    def __init__(self, pictures, labels, transform):
        self.pictures, self.labels, self.transform = pictures, labels, transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.transform(self.pictures[index]), self.labels[index]


def loading(pictures, labels, batch_size: int, device):
    """The usual DataLoader, with a worker for each core, up to the device."""
    workers = min(16, os.cpu_count())
    loader = torch.utils.data.DataLoader(
        Pictures(pictures, labels.tolist(), torchvision_pipeline(v1, [v1.ToTensor()])), batch_size=batch_size, shuffle=True,
        drop_last=True, num_workers=workers, persistent_workers=True, pin_memory=device.type == "cuda")

    def call():
        return sum(len(images.to(device)) for images, _ in loader)
    return f"DataLoader, PIL, {workers} workers", call


def optional(device, images, labels) -> dict:
    """stage -> name -> call, of packages that may not be installed."""
    found = {"policy": {}, "erase and mix": {}}
    floats = images.permute(0, 3, 1, 2).float().div(255).contiguous()
    try:
        from timm.data.mixup import Mixup
        from timm.data.random_erasing import RandomErasing
    except ImportError:
        print("timm is not installed: left out")
    else:
        erase = RandomErasing(0.25, device=device.type)
        for mode in ("batch", "elem"):
            mix = Mixup(0.8, 1.0, mode=mode, num_classes=len(CLASSES))

            def call(mix=mix):
                mix(erase(floats.clone()), labels)
                return len(floats)
            found["erase and mix"][f"timm, {mode}"] = call
    try:
        from kornia.augmentation.auto import AutoAugment
    except ImportError:
        print("kornia is not installed: left out")
    else:
        policy = AutoAugment("cifar10").to(device)

        def one_by_one():
            for image in floats[:IMAGE_BY_IMAGE]:
                policy(image.unsqueeze(0))
            return len(floats[:IMAGE_BY_IMAGE])

        def whole_batch():
            policy(floats)
            return len(floats)
        found["policy"] |= {"kornia, per image": one_by_one, "kornia, one draw for the batch": whole_batch}
    return found


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
    many = 4096 // batch_size * batch_size
    repeated = [pictures[index % len(pictures)] for index in range(many)]
    loader_name, loader = loading(repeated, labels[:many].cpu(), batch_size, device)
    stages["pipeline"][loader_name] = loader
    for stage, found in optional(device, some, some_labels).items():
        stages[stage] |= found
    return {stage: calls for stage, calls in stages.items() if any("ours" not in name for name in calls)}


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call, device) -> float:
    """Seconds per image."""
    synchronize(device)
    started = time.perf_counter()
    images = call()
    synchronize(device)
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
        synchronize(device)
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
            yield Row(hardware, torch.__version__, torchvision.__version__, stage, batch_size, name, repeats,
                      *(round(pick(speeds)) for pick in (median, min, max)),
                      *(round(pick(ratios), 3) for pick in (median, min, max)),
                      round(median(seconds) * batch_size / step, 5), count_launches(calls[name], batch_size, device))


def draw(table: list[Row], path: Path) -> None:
    """Images a second by batch size; one panel per stage."""
    stages, names = (list(dict.fromkeys(column)) for column in zip(*((row.stage, row.contender) for row in table)))
    figure, axes = plt.subplots(len(stages), 1, figsize=(7, 2.4 * len(stages) + 0.8), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[:, 0], stages):
        here = [row for row in table if row.stage == stage]
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
    axes[-1, 0].set_xlabel(f"batch size; {table[0].hardware}")
    handles = {label: handle for axis in axes[:, 0] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="one batch size, few repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args()
    device = torch.device(args.device)
    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        print("no GPU: the plain-PyTorch reference is measured, the fused kernel is not")
    images, labels = (part.to(device) for part in generate(10_000, 0))
    if device.type == "cuda":  # as many as CIFAR has
        images, labels = images.repeat(5, 1, 1, 1), labels.repeat(5)
    table = []
    for batch_size in SIZES[:1] if args.quick else SIZES:
        for row in benchmark(images, labels, batch_size, 3 if args.quick else 10, hardware):
            table.append(row)
            launches = "" if row.launches is None else f"  {row.launches} launches"
            print(f"{row.batch_size:5} {row.stage:13} {row.contender:30} {row.images_per_s:9} images/s "
                  f"{row.times_first:8.2f} ({row.times_first_min:.2f} to {row.times_first_max:.2f})  "
                  f"{row.step_share:.4f} of a step{launches}", flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", (hardware if device.type == "cuda" else "cpu").lower()).strip("-")
    output = ROOT / "benchmarks" / "results" / f"augment-{name}.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)
    draw(table, output.with_suffix(".png"))
    print(output, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
