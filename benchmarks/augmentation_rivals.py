"""Augmentation in common use: torchvision image by image, a DataLoader with workers, and timm on the device."""
import os
from functools import partial

import torch
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms as v1
from torchvision.transforms import v2

from benchmarks.table import MEAN, STD
from data.synthetic import CLASSES


def torchvision_pipeline(version, to_float):
    """From an image to a normalised tensor, in torchvision's order."""
    return version.Compose([version.RandomCrop(32, padding=4), version.RandomHorizontalFlip(),
                            version.AutoAugment(v1.AutoAugmentPolicy.CIFAR10), *to_float, version.Normalize(MEAN, STD),
                            version.RandomErasing(0.25)])


def mixing():
    """Mixup or CutMix of each image with the one before it in the batch, one draw for all; labels become soft."""
    return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(CLASSES)), v2.CutMix(alpha=1.0, num_classes=len(CLASSES))])


def transformed(transform, samples):
    """A batch of images, each transformed, and labels; in a worker of a DataLoader."""
    return default_collate([(transform(image), label) for image, label in samples])


def loading(pictures, labels, batch_size: int, device) -> dict:
    """name -> a call that makes an epoch of the usual DataLoader, with a worker for each core, copied to the device."""
    workers = min(16, os.cpu_count())
    loader = DataLoader(
        list(zip(pictures, labels.tolist())), batch_size, shuffle=True, drop_last=True, num_workers=workers,
        collate_fn=partial(transformed, torchvision_pipeline(v1, [v1.ToTensor()])), persistent_workers=True,
        pin_memory=device.type == "cuda")
    return {f"DataLoader, PIL, {workers} workers": lambda: sum(len(images.to(device)) for images, _ in loader)}


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
