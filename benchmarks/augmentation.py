"""Images a second of the batch augmentation beside torchvision, timm, kornia and a DataLoader.

    python -m benchmarks.augmentation                 the table -> benchmarks/results/augmentation-<gpu or cpu>.csv
    python -m benchmarks.augmentation --quick         one batch size, few repeats
    python -m benchmarks.augmentation --device cpu    the plain-PyTorch reference: the fused kernel needs a GPU

Images are 32x32.  Stage "pipeline" is crop, flip, AutoAugment, normalisation, Random Erasing and Mixup/CutMix; "policy" is
AutoAugment alone, with normalisation in ours; "erase and mix", where timm is installed, is normalisation, Random Erasing and
Mixup/CutMix.  The case "photographs" is the pipeline with resized crops: images of 256 pixels, windows of 224, and the policy of
ImageNet, in batches of 128.  Ours runs a whole epoch with its random draws.  Contenders are interleaved; times_first is the time
over that of the stage's first contender in the same repeat, so drifting clocks cancel.  What works image by image is timed on at
most 64 of them.
"""
import itertools

import torch
import torch.nn.functional as F
import torchvision
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

import kernels
from augment import BatchAugmenter
from benchmarks import table
from benchmarks.augmentation_rivals import kornia_pipeline, loading, mixing, timm_mixing, timm_pipeline, torchvision_pipeline
from benchmarks.clocks import captured, interleaved, wall_us
from benchmarks.table import MEAN, STD
from data.synthetic import generate
from rundir import errors

SIZES = ("128", "512", "2048")
PHOTOGRAPHS = "photographs"
IMAGE_BY_IMAGE = 64  # most images of a timing
VERSIONS = ("v1", v1, v1.ConvertImageDtype(torch.float32)), ("v2", v2, v2.ToDtype(torch.float32, True))
STAGES = {"policy": {"crop_pad": 0, "flip": False, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}, "pipeline": {},
          "erase and mix": {"policy": "none", "crop_pad": 0, "flip": False},
          PHOTOGRAPHS: {"policy": "autoaugment-imagenet", "crop": "resized", "image_size": 224}}


def ours(images, labels, batch_size: int, **options) -> dict:
    """name -> a call that makes an epoch and returns how many images that is."""
    def make(kernel):
        kernels.choose(kernel)
        augmenter = BatchAugmenter(images, labels, batch_size=batch_size, seed=0, mean=MEAN, std=STD,
                                   dtype=torch.float16 if images.is_cuda else torch.float32, **options)
        kernels.choose("auto")
        return augmenter

    def epochs(augmenter, batch, begin=lambda: None):
        numbers = itertools.count()

        def call():
            augmenter.set_epoch(next(numbers))
            begin()
            for position in range(augmenter.steps):
                batch(position)
            return augmenter.steps * batch_size
        return call

    reference, found = make("reference"), {}
    if images.is_cuda:
        fused, step = make("triton"), torch.zeros((), dtype=torch.int64, device=images.device)

        def one():
            fused(step)
            step.add_(1)

        found["ours, fused"] = epochs(fused, fused)
        if replay := captured(one, warm_ups=1):
            found["ours, fused, CUDA graph"] = epochs(fused, lambda position: replay(), step.zero_)
    return found | {"ours, reference": epochs(reference, reference)}


def rivals(images, labels, batch_size: int) -> dict:
    """stage -> name -> a call that returns how many images it made."""
    few, mix = images[:min(batch_size, IMAGE_BY_IMAGE)].permute(0, 3, 1, 2).contiguous(), mixing()
    found = {"policy": {}, "pipeline": {}, "erase and mix": timm_mixing(images[:batch_size], labels[:batch_size])}
    for name, module, _ in VERSIONS:
        policy = module.AutoAugment(v1.AutoAugmentPolicy.CIFAR10)
        found["policy"][f"torchvision {name}, tensor"] = lambda each=policy: len([each(image) for image in few])
    found["pipeline"] |= one_by_one(tensor_pipelines(), few, labels, mix) | loading(few, labels, batch_size)
    return found


def photographs(images, labels, batch_size: int) -> dict:
    """name -> a call that returns how many photographs it made."""
    few, mix = images[:IMAGE_BY_IMAGE].permute(0, 3, 1, 2).contiguous(), mixing()
    found = one_by_one(tensor_pipelines(photographs=True), few, labels, mix)
    found |= one_by_one(timm_pipeline(), list(map(to_pil_image, few.cpu())), labels, mix)
    found |= {name: lambda each=each: len(mix(each(few / 255), labels[:len(few)])[0])
              for name, each in kornia_pipeline(images.device).items()}
    return found | loading(few, labels, batch_size, photographs=True)


def tensor_pipelines(photographs=False) -> dict:
    return {f"torchvision {name}, tensor": torchvision_pipeline(module, [to_float], photographs)
            for name, module, to_float in VERSIONS}


def one_by_one(transforms: dict, images, labels, mix) -> dict:
    """name -> a call that transforms, stacks and mixes `images`."""
    return {name: lambda each=each: len(mix(torch.stack([each(image) for image in images]), labels[:len(images)])[0])
            for name, each in transforms.items()}


def benchmark(images, labels, batch_size: int, repeats: int, stages: dict):
    """A row for each stage and contender.  stages: name -> the others."""
    for stage, others in stages.items():
        if not others:
            continue
        calls = ours(images, labels, batch_size, **STAGES[stage]) | others
        counts = {name: call() for name, call in calls.items()}
        times = interleaved(calls, lambda call: wall_us(call, 1, images.device), repeats)
        times = {name: [us / counts[name] for us in found] for name, found in times.items()}  # of an image
        first = next(iter(times.values()))
        for name, us in times.items():
            yield table.Row(**table.versions(images.device, torch, torchvision), stage=stage, batch_size=batch_size,
                            contender=name, repeats=repeats, **table.spread("images_per_s", [1e6 / value for value in us], None),
                            **table.spread("times_first", [value / base for value, base in zip(us, first)]))


def main(args) -> None:
    device, sizes = args.device, args.case or (*SIZES, PHOTOGRAPHS)[:1 if args.quick or args.tiny else None]
    numbers = [int(size) for size in sizes if size != PHOTOGRAPHS]
    images, labels = (part.to(device) for part in generate(max(numbers or [1]) if args.tiny else 10_000, 0))
    if device.type == "cuda":  # as many as CIFAR has
        images, labels = images.repeat(5, 1, 1, 1), labels.repeat(5)
    found = table.Rows(args, "augmentation", table.short(device), "batch_size stage contender images_per_s times_first")
    repeats = table.repeats(args, 3, 10)
    for batch_size in numbers:
        for row in benchmark(images, labels, batch_size, repeats, rivals(images, labels, batch_size)):
            found.add(row)
    if PHOTOGRAPHS in sizes:
        count = 128 if args.tiny else 512
        small, labels = (part.to(device) for part in generate(count, 0))
        images = F.interpolate(small.permute(0, 3, 1, 2).float(), (256, 256), mode="bilinear").round().to(torch.uint8)
        images = images.permute(0, 2, 3, 1).contiguous()
        for row in benchmark(images, labels, 128, repeats, {PHOTOGRAPHS: photographs(images, labels, 128)}):
            found.add(row)


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "one batch size, few repeats", (*SIZES, PHOTOGRAPHS), tiny=True).parse_args())
