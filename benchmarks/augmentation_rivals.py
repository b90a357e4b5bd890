"""What people augment with today: torchvision image by image, a DataLoader with workers, timm and kornia where installed."""
import os

import torch
from torchvision import transforms as v1
from torchvision.transforms import v2

from data.synthetic import CLASSES

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGE_BY_IMAGE = 64  # so many at most for one timing


def torchvision_pipeline(version, to_float):
    """torchvision's own order; what comes out of it is one image."""
    return version.Compose([version.RandomCrop(32, padding=4), version.RandomHorizontalFlip(),
                            version.AutoAugment(v1.AutoAugmentPolicy.CIFAR10), *to_float, version.Normalize(MEAN, STD),
                            version.RandomErasing(0.25)])


def mixing():
    """Mixup or CutMix of each image with the one before it in the batch, one draw for all; makes the labels soft."""
    return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(CLASSES)), v2.CutMix(alpha=1.0, num_classes=len(CLASSES))])


def image_by_image(transform, images, labels):
    mix = mixing()

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
