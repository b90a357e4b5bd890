"""The distillation loop that people write: a DataLoader with PIL transforms, and the published loss."""
import itertools

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torchvision import transforms as v1

from benchmarks.augmentation_rivals import Pictures, mixing, torchvision_pipeline
from benchmarks.loss import EPS, decoupled

PREFETCH = 2  # batches that a worker makes ahead: DataLoader's default


class Collate:
    """Images and soft labels of a batch, mixed where it is collated, as in torchvision's training script."""

    def __init__(self):
        self.mix = mixing()

    def __call__(self, samples):
        return self.mix(*default_collate(samples))


def published_mixed_dkd(student, teacher, soft):
    """`published_dkd` of benchmarks/loss.py with soft labels: their cross-entropy, and their largest entry as DKD's target."""
    return F.cross_entropy(student, soft, label_smoothing=EPS) + decoupled(student, teacher, soft.argmax(1))


class PlainLoop:
    """A distillation loop as people write it, over an epoch that never ends.

    images, labels: on the host.  args: of cli.options.  layout: the memory format of the networks, for the images.
    lap: is called with the name of each phase of a step when it ends.
    """

    def __init__(self, teacher, student, args, context, images, labels, workers: int, *, layout=torch.contiguous_format,
                 compiled: bool = False):
        self.context, self.student, self.layout, self.workers, self.clip = context, student, layout, workers, args.clip_grad
        self.teacher, self.model = (torch.compile(net) if compiled else net for net in (teacher, student))
        self.optimizer = torch.optim.SGD(student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
        self.scaler, self.lap = context.scaler(), lambda phase: None
        to_pil_and_on = v1.Compose([Image.fromarray, torchvision_pipeline(v1, [v1.ToTensor()])])
        pictures = Pictures(images.numpy(), labels.tolist(), to_pil_and_on)
        self.batches = iter(DataLoader(
            pictures, args.batch_size, sampler=RandomSampler(pictures, replacement=True, num_samples=10**9),
            collate_fn=Collate(), num_workers=workers, prefetch_factor=PREFETCH if workers else None,
            pin_memory=context.device.type == "cuda"))

    def run(self, steps: int) -> list[float]:
        """The next steps; their losses."""
        losses = []
        for images, soft in itertools.islice(self.batches, steps):
            images = images.to(self.context.device, non_blocking=True, memory_format=self.layout)
            soft = soft.to(self.context.device, non_blocking=True)
            self.lap("waiting")
            with self.context.autocast:
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
