"""Two distillation loops: that of distill.py without evaluation and files, and a plain one with a DataLoader and PIL."""
import itertools
import tempfile

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms as v1

import models
from augment import BatchAugmenter
from benchmarks.augmentation_rivals import mixing, torchvision_pipeline, transformed
from benchmarks.loss import ALPHA, BETA, EPS, T, decoupled
from benchmarks.table import MEAN, STD
from cli import method_flags, options
from data.synthetic import CLASSES
from diagnostics.gradients import LOG_EVERY, Diagnostics
from training.cuda_graph import CudaGraph
from training.metrics import Metrics
from training.optimization import Recipe, Update, learning_rate
from training.teacher_logits import TeacherLogits

RECIPE = f"--method dkd --alpha {ALPHA} --beta {BETA} --temperature {T} --label-smoothing {EPS} --opt sgd --lr 0.05"
PREFETCH = 2  # batches that a worker prefetches: DataLoader's default


def recipe(batch_size: int):
    """The flags of distill.py with which both loops train."""
    return options.parse_distill("", "", f"{RECIPE} --weight-decay 5e-4 --batch-size {batch_size}".split())


def networks(case: tuple[str, str], device, layout=torch.channels_last):
    """Frozen teacher and student with the same weights every time; the teacher's running statistics are those of noise."""
    torch.manual_seed(0)
    teacher, student = (models.build(name, len(CLASSES)).to(device, memory_format=layout) for name in case)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        teacher.train()(torch.randn(128, 3, 32, 32, device=device))
    teacher.info = {"model": case[0], "classes": CLASSES, "image_size": 32}
    return teacher.eval().requires_grad_(False), student.train()


class Ours:
    """The objects and the step of distill.py, with all images as an epoch.

    captured: steps become a CUDA graph.  lap: called with the name of each phase of a step at its end.
    stored: the teacher's logits are; every block is then of one epoch, and reads them after the first whole one.
    """
    workers = 0

    def __init__(self, teacher, student, args, context, images, labels, *, captured: bool = False, stored: bool = False):
        method, self.stored, self.captured = method_flags.chosen(args), stored, captured
        self.recipe, self.context, self.epoch, self.lap = Recipe.of(args), context, 0, lambda phase: None
        checkpoint = teacher.info | {"state_dict": teacher.state_dict(), "path": "", "sha256": ""}
        teacher = models.load(checkpoint, context.device, context.dtype, folded=True)
        self.augmenter = BatchAugmenter(images.to(context.device), labels.to(context.device), **options.augmentation(args),
                                        mean=MEAN, std=STD, dtype=context.dtype, batch_size=args.batch_size)
        self.update = Update(student, self.recipe, context)
        self.metrics = Metrics(context.ranks, self.augmenter.steps, args.clip_grad)
        self.diagnostics = Diagnostics(method, self.augmenter, range(args.batch_size), context.ranks)
        self.criterion, self.matched = method.criteria(context.device)
        self.folder = tempfile.TemporaryDirectory() if stored else None
        self.store = TeacherLogits(self.folder and self.folder.name, 1e12, "", epochs=1, steps=self.augmenter.steps,
                                   rows=range(args.batch_size),
                                   example=torch.empty(1, len(CLASSES), dtype=context.dtype, device=context.device))
        self.teacher_model, self.model = context.compile(teacher, captured), context.compile(student, captured)
        self.take = CudaGraph(self.step, context.device) if captured else self.step
        first = next(student.parameters())  # its gradient comes last
        first.register_post_accumulate_grad_hook(lambda parameter: self.lap("backward"))

    def step(self, position, lr, diagnose, stored):
        batch, rows = self.augmenter(position), range(self.augmenter.batch_size)
        self.lap("augment")
        with self.context.autocast:
            teacher_logits = self.store.read(position, rows) if stored else self.teacher_model(batch.images)
            self.lap("teacher")
            logits = self.model(batch.images)
        if self.store.folder and not stored:
            self.store.add(position, rows, teacher_logits)
        self.lap("student")
        loss, terms = self.criterion(logits, teacher_logits, batch.targets)
        self.lap("objective")
        self.update.backward(loss, self.matched and self.matched(logits, teacher_logits, batch.targets)[0])
        self.metrics.add(logits, batch.targets, loss, terms)
        self.lap("bookkeeping")
        result = self.update(lr, diagnose)
        self.lap("update")
        self.metrics.end_step(position, result)
        if diagnose:
            self.diagnostics.add(position, result, batch.targets, logits, teacher_logits)
        self.lap("bookkeeping")

    def run(self, steps: int) -> dict:
        """Train the first `steps` of a new epoch; its columns of log.csv."""
        self.epoch = 1 if self.store.folder else self.epoch + 1
        for each in (self.augmenter, self.diagnostics, self.store):
            each.set_epoch(self.epoch)
        self.lap("bookkeeping")
        for position in range(steps):
            lr = learning_rate((self.epoch - 1) * self.augmenter.steps + position, self.recipe, self.augmenter.steps)
            self.take(position, lr, position % LOG_EVERY == 0, self.store.found[position])
            self.metrics.log()
        columns, of_epoch = self.metrics.epoch_columns(self.epoch)
        if steps == self.augmenter.steps:  # else not all logits are there
            self.store.end_epoch()
        columns |= {"amp_scale": self.update.amp_scale()} | of_epoch | self.diagnostics.columns()
        self.lap("bookkeeping")
        return columns


def published_mixed_dkd(student, teacher, soft):
    """`published_dkd` of benchmarks/loss.py with soft labels, whose largest entry is DKD's target."""
    return F.cross_entropy(student, soft, label_smoothing=EPS) + decoupled(student, teacher, soft.argmax(1))


class PlainLoop:
    """A distillation loop as usually written, over an epoch that never ends.

    images, labels: on the host.  args: of `recipe`.  layout: the memory format of networks and images.  lap: as in Ours.
    """
    stored = captured = False

    def __init__(self, teacher, student, args, context, images, labels, workers: int, *, layout=torch.contiguous_format,
                 compiled: bool = False):
        self.context, self.student, self.layout, self.workers, self.clip = context, student, layout, workers, args.clip_grad
        self.teacher, self.model = (torch.compile(net) if compiled else net for net in (teacher, student))
        self.optimizer = torch.optim.SGD(student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
        self.scaler, self.lap = context.scaler(), lambda phase: None
        transform = v1.Compose([Image.fromarray, torchvision_pipeline(v1, [v1.ToTensor()])])
        pictures = list(zip(images.numpy(), labels.tolist()))
        self.batches = iter(DataLoader(
            pictures, args.batch_size, sampler=RandomSampler(pictures, replacement=True, num_samples=10**9),
            collate_fn=lambda samples: mixing()(*transformed(transform, samples)), num_workers=workers, prefetch_factor=PREFETCH,
            pin_memory=context.device.type == "cuda"))

    def run(self, steps: int) -> list[float]:
        """Train the next steps; their losses."""
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
