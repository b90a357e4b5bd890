"""What people augment with today: torchvision image by image, a DataLoader with workers, timm and kornia where installed; and the
plain loop that distils with such a DataLoader."""
import itertools
import os

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torchvision import transforms as v1
from torchvision.transforms import v2

from benchmarks.loss import ALPHA, BETA, EPS, T
from training.synthetic import CLASSES

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGE_BY_IMAGE = 64  # so many at most for one timing
PREFETCH = 2  # batches that a worker makes ahead: DataLoader's default


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


class Collate:
    """Images and soft labels of a batch, mixed where it is collated, as in torchvision's training script."""

    def __init__(self):
        self.mix = mixing()

    def __call__(self, samples):
        return self.mix(*default_collate(samples))


def published_mixed_dkd(student, teacher, soft):
    """`published_dkd` of benchmarks/loss.py with soft labels: their cross-entropy, and their largest entry as DKD's target."""
    hot = torch.zeros_like(student, dtype=torch.bool).scatter_(1, soft.argmax(1, keepdim=True), True)
    q, p = F.softmax(student / T, 1), F.softmax(teacher / T, 1)
    q_pair, p_pair = (torch.cat([(x * hot).sum(1, keepdim=True), (x * ~hot).sum(1, keepdim=True)], 1) for x in (q, p))
    tckd = F.kl_div(q_pair.log(), p_pair, reduction="sum") * T * T / len(soft)
    q_rest, p_rest = F.log_softmax(student / T - 1000.0 * hot, 1), F.softmax(teacher / T - 1000.0 * hot, 1)
    nckd = F.kl_div(q_rest, p_rest, reduction="sum") * T * T / len(soft)
    return F.cross_entropy(student, soft, label_smoothing=EPS) + ALPHA * tckd + BETA * nckd


class PlainLoop:
    """A distillation loop as people write it, over an epoch that never ends.

    images, labels: on the host.  args: of training.options.  layout: the memory format of the networks, for the images.
    lap: is called with the name of each phase of a step when it ends.
    """

    def __init__(self, teacher, student, args, machine, images, labels, workers: int, *, layout=torch.contiguous_format,
                 compiled: bool = False):
        self.machine, self.student, self.layout, self.workers, self.clip = machine, student, layout, workers, args.clip_grad
        self.teacher, self.model = (torch.compile(net) if compiled else net for net in (teacher, student))
        self.optimizer = torch.optim.SGD(student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
        self.scaler, self.lap = machine.scaler(), lambda phase: None
        to_pil_and_on = v1.Compose([Image.fromarray, torchvision_pipeline(v1, [v1.ToTensor()])])
        pictures = Pictures(images.numpy(), labels.tolist(), to_pil_and_on)
        self.batches = iter(DataLoader(
            pictures, args.batch_size, sampler=RandomSampler(pictures, replacement=True, num_samples=10**9),
            collate_fn=Collate(), num_workers=workers, prefetch_factor=PREFETCH if workers else None,
            pin_memory=machine.device.type == "cuda"))

    def run(self, steps: int) -> list[float]:
        """The next steps; their losses."""
        losses = []
        for images, soft in itertools.islice(self.batches, steps):
            images = images.to(self.machine.device, non_blocking=True, memory_format=self.layout)
            soft = soft.to(self.machine.device, non_blocking=True)
            self.lap("waiting")
            with self.machine.autocast():
                with torch.no_grad():
                    teacher_logits = self.teacher(images)
                self.lap("teacher")
                logits = self.model(images)
                self.lap("student")
                loss = published_mixed_dkd(logits, teacher_logits, soft)
            self.lap("objective")
            self.scaler.scale(loss).backward()
            self.lap("backward")
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.lap("update")
            losses.append(loss.item())
            self.lap("bookkeeping")
        return losses
