"""Images a second of the batch augmentation beside torchvision, timm, kornia and a DataLoader.

    python -m benchmarks.augmentation                 the table -> benchmarks/results/augmentation-<gpu or cpu>.csv
    python -m benchmarks.augmentation --quick         one batch size, few repeats
    python -m benchmarks.augmentation --device cpu    the plain-PyTorch reference: the fused kernel needs a GPU

Images are 32x32.  Stage "pipeline" is crop, flip, AutoAugment, normalisation, Random Erasing and Mixup/CutMix; "policy" is
AutoAugment alone, with normalisation in ours.  The case "photographs" is the pipeline with resized crops: images of 256 pixels,
windows of 224, and the policy of ImageNet, in batches of 128.  Ours runs a whole epoch with its random draws.  Contenders are
interleaved; times_first is the time over that of the stage's first contender in the same repeat.  What works image by image is
timed on at most 64 of them.
"""
import itertools
import os
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms as v1
from torchvision.transforms import v2

import kernels
from augment import BatchAugmenter
from benchmarks import table
from benchmarks.clocks import captured, interleaved, wall_us
from benchmarks.table import MEAN, STD
from data.synthetic import CLASSES, generate
from rundir import errors

SIZES = ("128", "512", "2048")
PHOTOGRAPHS = "photographs"
IMAGE_BY_IMAGE = 64  # most images of a timing
VERSIONS = ("v1", v1, v1.ConvertImageDtype(torch.float32)), ("v2", v2, v2.ToDtype(torch.float32, True))
STAGES = {"policy": {"crop_pad": 0, "flip": False, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}, "pipeline": {},
          PHOTOGRAPHS: {"policy": "autoaugment-imagenet", "crop": "resized", "image_size": 224}}


def torchvision_pipeline(version, to_float, photographs=False):
    """From an image to a normalised tensor, in torchvision's order; of 32 pixels, or with resized crops of 224."""
    crop = version.RandomResizedCrop(224) if photographs else version.RandomCrop(32, padding=4)
    policy = v1.AutoAugmentPolicy.IMAGENET if photographs else v1.AutoAugmentPolicy.CIFAR10
    return version.Compose([crop, version.RandomHorizontalFlip(), version.AutoAugment(policy), *to_float,
                            version.Normalize(MEAN, STD), version.RandomErasing(0.25)])


def timm_pipeline() -> dict:
    """name -> timm's training transform of a PIL image: resized crops of 224; empty without timm."""
    try:
        from timm.data import create_transform
    except ImportError:
        print("timm is not installed: left out")
        return {}
    return {"timm, PIL": create_transform(224, is_training=True, auto_augment="original", color_jitter=None, mean=MEAN, std=STD,
                                          interpolation="bilinear", re_prob=0.25, re_mode="const")}


def kornia_pipeline(device) -> dict:
    """name -> kornia's transform of a batch, float32 in [0, 1] -> float32: resized crops of 224; empty without kornia.

    It draws one sub-policy for the whole batch; all others here draw one for each image.
    """
    try:
        from kornia import augmentation
        from kornia.augmentation.auto import AutoAugment
    except ImportError:
        print("kornia is not installed: left out")
        return {}
    return {"kornia, batch": augmentation.AugmentationSequential(
        augmentation.RandomResizedCrop((224, 224)), augmentation.RandomHorizontalFlip(), AutoAugment("imagenet"),
        augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)), augmentation.RandomErasing(p=0.25),
        data_keys=["input"]).to(device)}


def mixing():
    """Mixup or CutMix of each image with the one before it in the batch, one draw for all; labels become soft."""
    return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(CLASSES)), v2.CutMix(alpha=1.0, num_classes=len(CLASSES))])


def transformed(transform, samples):
    """A batch of images, each transformed, and labels; in a worker of a DataLoader."""
    return default_collate([(transform(image), label) for image, label in samples])


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
    policies = {f"torchvision {name}, tensor": module.AutoAugment(v1.AutoAugmentPolicy.CIFAR10) for name, module, _ in VERSIONS}
    return {"policy": {name: lambda each=each: len([each(image) for image in few]) for name, each in policies.items()},
            "pipeline": one_by_one(tensor_pipelines(), few, labels, mix) | dataloader(images, labels, batch_size)}


def photographs(images, labels, batch_size: int) -> dict:
    """name -> a call that returns how many photographs it made."""
    few, mix = images[:IMAGE_BY_IMAGE].permute(0, 3, 1, 2).contiguous(), mixing()
    found = one_by_one(tensor_pipelines(photographs=True), few, labels, mix)
    found |= one_by_one(timm_pipeline(), [v1.functional.to_pil_image(image.cpu()) for image in few], labels, mix)
    found |= {name: lambda each=each: len(mix(each(few / 255), labels[:len(few)])[0])
              for name, each in kornia_pipeline(images.device).items()}
    found |= dataloader(images, labels, batch_size, photographs=True)
    return found


def tensor_pipelines(photographs=False) -> dict:
    return {f"torchvision {name}, tensor": torchvision_pipeline(module, [to_float], photographs)
            for name, module, to_float in VERSIONS}


def one_by_one(transforms: dict, images, labels, mix) -> dict:
    """name -> a call that transforms, stacks and mixes `images`."""
    return {name: lambda each=each: len(mix(torch.stack([each(image) for image in images]), labels[:len(images)])[0])
            for name, each in transforms.items()}


def dataloader(images, labels, batch_size: int, photographs=False) -> dict:
    """name -> a call that makes an epoch of the usual DataLoader, with a worker for each core, copied to the device."""
    many, workers = min(4096, len(images)) // batch_size * batch_size, min(16, os.cpu_count())
    pictures = [v1.functional.to_pil_image(image.permute(2, 0, 1).cpu()) for image in images[:min(batch_size, IMAGE_BY_IMAGE)]]
    samples = [(pictures[index % len(pictures)], label) for index, label in enumerate(labels[:many].tolist())]
    loader = DataLoader(
        samples, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True,
        collate_fn=partial(transformed, torchvision_pipeline(v1, [v1.ToTensor()], photographs)), pin_memory=images.is_cuda)
    return {f"DataLoader, PIL, {workers} workers": lambda: sum(len(each.to(images.device)) for each, _ in loader)}


def benchmark(images, labels, batch_size: int, repeats: int, stages: dict):
    """A row for each stage and contender.  stages: name -> the others."""
    for stage, others in stages.items():
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
    device, sizes = table.device(args.device), args.case or (*SIZES, PHOTOGRAPHS)[:1 if args.quick or args.tiny else None]
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
    found.close()


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "one batch size, few repeats", (*SIZES, PHOTOGRAPHS), tiny=True).parse_args())
