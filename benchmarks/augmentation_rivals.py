"""Augmentation in common use: torchvision and timm image by image, a DataLoader with workers, timm and kornia on batches."""
import itertools
import os
from functools import partial

import torch
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from benchmarks.table import MEAN, STD
from data.synthetic import CLASSES


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


def loading(images, labels, batch_size: int, photographs=False) -> dict:
    """name -> a call that makes an epoch of the usual DataLoader, with a worker for each core, copied to the device.

    images: uint8 (N, 3, H, W), which take turns, one for each of the labels.
    """
    pictures, workers = itertools.cycle(map(to_pil_image, images.cpu())), min(16, os.cpu_count())
    labels = labels[:max(4096, 4 * workers * batch_size)]  # four batches at least for each worker
    loader = DataLoader(
        list(zip(pictures, labels.tolist())), batch_size, shuffle=True, drop_last=True, num_workers=workers,
        collate_fn=partial(transformed, torchvision_pipeline(v1, [v1.ToTensor()], photographs)), persistent_workers=True,
        pin_memory=images.is_cuda)
    return {f"DataLoader, PIL, {workers} workers": lambda: sum(len(batch.to(images.device)) for batch, _ in loader)}


def timm_mixing(images, labels) -> dict:
    """name -> a call that erases and mixes a batch as timm's loader and training script do, on the device; empty without timm."""
    try:
        from timm.data.mixup import Mixup
        from timm.data.random_erasing import RandomErasing
    except ImportError:
        print("timm is not installed: left out")
        return {}
    erase, mix = RandomErasing(0.25, device=images.device), Mixup(0.8, 1.0, num_classes=len(CLASSES))
    mean, std = (255 * torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    batch, dtype = images.permute(0, 3, 1, 2).contiguous(), torch.float16 if images.is_cuda else torch.float32

    def call():
        return len(mix(erase(batch.to(dtype).sub_(mean).div_(std)), labels)[0])
    return {"timm, erase and mix": call}
