"""Our distillation loop, as distill.py has it, without what is around it: no evaluation, no files, no lines on the terminal."""
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import models
from augment import BatchAugmenter
from benchmarks.augmentation_rivals import MEAN, STD
from benchmarks.loss import ALPHA, BETA, EPS, T
from cli import method_flags, options
from data.synthetic import CLASSES
from diagnostics.gradients import LOG_EVERY, Diagnostics
from training.cuda_graph import CudaGraph
from training.metrics import Metrics
from training.optimization import Recipe, Update, learning_rate

RECIPE = f"--method dkd --alpha {ALPHA} --beta {BETA} --temperature {T} --label-smoothing {EPS} --opt sgd --lr 0.05"


def recipe(batch_size: int):
    return options.parse_distill("", "", f"{RECIPE} --weight-decay 5e-4 --batch-size {batch_size}".split())


def networks(case: tuple[str, str], device, layout=torch.channels_last):
    """Frozen teacher and student, with the same weights every time; the running statistics of the teacher are those of noise."""
    torch.manual_seed(0)
    teacher, student = (models.build(name, len(CLASSES)).to(device, memory_format=layout) for name in case)
    teacher.info = {"model": case[0], "classes": CLASSES, "image_size": 32, "mean": MEAN, "std": STD, "dataset": "synthetic"}
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        teacher.train()(torch.randn(128, 3, 32, 32, device=device))
    return teacher.eval().requires_grad_(False), student.train()


class Ours:
    """The objects and the calls of distill.py; all images make an epoch.

    captured: steps become a CUDA graph.  lap: is called with the name of each phase of a step when it ends.
    """
    workers = 0

    def __init__(self, teacher, student, args, context, images, labels, *, captured: bool = False):
        method = method_flags.chosen(args)
        self.recipe, self.context, self.epoch, self.lap = Recipe.of(args), context, 0, lambda phase: None
        with TemporaryDirectory() as folder:
            models.save(Path(folder, "best.pt"), teacher, **teacher.info)
            teacher = models.load(Path(folder, "best.pt"), context.device, context.dtype, folded=True)
        self.augmenter = BatchAugmenter(images.to(context.device), labels.to(context.device), **options.augmentation(args),
                                        mean=MEAN, std=STD, dtype=context.dtype, batch_size=args.batch_size)
        self.update = Update(student, self.recipe, context)
        self.metrics = Metrics(context.ranks, self.augmenter.steps, args.clip_grad)
        self.diagnostics = Diagnostics(method, self.augmenter, range(args.batch_size), context.ranks)
        self.criterion = method.criterion(context.device)
        self.teacher_model, self.model = context.compile(teacher, captured), context.compile(student, captured)
        self.take = CudaGraph(self.step, context.device) if captured else self.step
        first = next(student.parameters())  # its gradient comes last
        first.register_post_accumulate_grad_hook(lambda parameter: self.lap("backward"))

    def step(self, position, lr, diagnose):
        batch = self.augmenter(position)
        self.lap("augment")
        with self.context.autocast:
            teacher_logits = self.teacher_model(batch.images)
            self.lap("teacher")
            logits = self.model(batch.images)
        self.lap("student")
        loss, terms = self.criterion(logits, teacher_logits, batch.targets)
        self.lap("objective")
        self.update.backward(loss)
        self.metrics.add(logits, batch.targets, loss, terms)
        self.lap("bookkeeping")
        result = self.update(lr, diagnose)
        self.lap("update")
        self.metrics.end_step(position, result)
        if diagnose:
            self.diagnostics.add(position, result, batch.targets, logits, teacher_logits)
        self.lap("bookkeeping")

    def run(self, steps: int) -> dict:
        """The first `steps` of a new epoch; its columns of log.csv."""
        self.epoch += 1
        self.augmenter.set_epoch(self.epoch)
        self.diagnostics.set_epoch(self.epoch)
        self.lap("bookkeeping")
        for position in range(steps):
            lr = learning_rate((self.epoch - 1) * self.augmenter.steps + position, self.recipe, self.augmenter.steps)
            self.take(position, lr, position % LOG_EVERY == 0)
            self.metrics.log()
        columns, of_epoch = self.metrics.epoch_columns(self.epoch)
        columns |= {"amp_scale": self.update.amp_scale()} | of_epoch | self.diagnostics.columns()
        self.lap("bookkeeping")
        return columns
