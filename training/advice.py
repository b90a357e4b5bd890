"""Advice before a run: hyperparameters by the teacher's logits and a new student's gradient on a few augmented batches.

Rules of thumb, each printed with its reason: no distillation term has a larger gradient than cross-entropy, the temperature keeps
the teacher's entropy below 0.9 log C, and clipping affects outliers, not every step.
"""
import math
from pathlib import Path

import torch

import models
from augment import BatchAugmenter
from cli import method_flags, options, presets
from data import datasets
from diagnostics.gradients import Diagnostics
from losses.cross_entropy import class_weights_of
from training.device import RunContext, global_batch_size
from training.distributed import Ranks
from training.optimization import StepResult

BATCHES = 8
TEMPERATURES = (1, 2, 3, 4, 6, 8)
MAX_ENTROPY = 0.9  # share of log C; above it a softened prediction carries little information about the classes


def advise(args, method, context: RunContext) -> list[str]:
    """Lines of advice for the flags of distill.py and the ChosenMethod; trains and writes nothing.

    Failure: the data or the teacher are missing, damaged, or do not fit together.
    """
    models.check_name(args.student)
    if args.teacher_checkpoint in presets.STUDY_TEACHERS and not Path(args.teacher_checkpoint).exists():  # not yet trained
        return [*describe_data(args), f"no advice without a teacher ({args.teacher_checkpoint})"]
    checkpoints, _ = models.read_teachers(args.teacher_checkpoint, args.teacher)
    data = datasets.load(**options.data(args), device=context.device)
    sizes = models.input_sizes(args.image_size, data.image_size, args.crop)
    teacher = models.load_teachers(
        checkpoints, data, sizes, options.teacher_inputs(args), device=context.device, dtype=context.dtype,
        temperature=method.hyperparameters.get("temperature", 1.0))
    batch_size = global_batch_size(args.batch_size, data, context)
    augmenter = BatchAugmenter(*data.train, **options.augmentation(args), mean=data.mean, std=data.std, dtype=context.dtype,
                               batch_size=batch_size)
    student = models.build(args.student, len(data.classes), sizes["image_size"]).to(context.device).train()
    class_weights = class_weights_of(args.class_weights, data.train.labels, len(data.classes))
    (criterion, matched), steps = method.criteria(context.device, class_weights), range(min(BATCHES, augmenter.steps))
    diagnostics = Diagnostics(method, augmenter, range(batch_size), Ranks(), steps)  # each process reads whole batches
    augmenter.set_epoch(1)
    diagnostics.set_epoch(1)
    norms, entropies = [], torch.zeros(len(TEMPERATURES), device=context.device)
    for step in steps:
        batch = augmenter(step)
        with context.autocast:
            with torch.no_grad():
                v = teacher(batch.images)
            z = student(batch.images)
        (matched or criterion)(z, v, batch.targets)[0].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), math.inf))
        student.zero_grad()
        diagnostics.add(step, StepResult(*torch.zeros(3, device=z.device)), batch.targets, z, v)
        softened = torch.stack([(v.float() / T).softmax(1) for T in TEMPERATURES])
        entropies += torch.special.entr(softened).sum(2).mean(1) / len(steps)
    columns, classes, norm = diagnostics.columns(), len(data.classes), torch.stack(norms).median().item()
    size = models.describe(args.student, student, sizes["image_size"])
    return [f"student {size}", str(data), *report(method, columns, classes),
            *suggest(method, args.clip_grad, columns, norm, entropies.tolist(), classes)]


def describe_data(args) -> list[str]:
    """The summary of an image folder; other data sets are not read, since that might download them."""
    return [str(datasets.load(**options.data(args)))] if args.dataset == "imagefolder" else []


def report(method, columns: dict, classes: int) -> list[str]:
    """The measurements as text.  columns: of diagnostics.csv."""
    T = method.hyperparameters.get("temperature", 1.0)
    lines = [
        f"teacher on {columns['images']} augmented images: top-1 {columns['teacher_acc1']:.0f} %, either label "
        f"{columns['teacher_either']:.0f} %; entropy {columns['teacher_entropy']:.2f} of at most {math.log(classes):.2f} nats",
        f"its probability of the dominant label: {columns['teacher_target']:.3f} at T = 1, {columns['teacher_target_T']:.3f} at "
        f"T = {T:g}; of all classes but the labels: {columns['teacher_outside_T']:.3f}"]
    if "share_ce" in columns:
        shares = ", ".join(f"{term.upper()} {columns[f'share_{term}']:.0%}" for term in method.record.terms)
        times = columns["grad_whole"] / columns["grad_ce"] if columns["grad_ce"] else math.inf
        lines.append(f"logit gradient of a new student: {shares}; norm per image {columns['grad_whole']:.2f}, {times:.1f} times "
                     "that of cross-entropy alone")
    return lines


def suggest(method, clip_grad: float, columns: dict, norm: float, entropies: list[float], classes: int) -> list[str]:
    """Hyperparameters to try, with the reason.  norm: of a new student's gradient.  entropies: at TEMPERATURES."""
    values, lines = method.resolved, []
    norms = {term: columns[f"grad_{term}"] for term in method.record.weight_of if term != "ce" and columns.get(f"grad_{term}")}
    if norms and columns.get("grad_ce"):
        largest = max(norms, key=norms.get)
        name, times = method.record.weight_of[largest], norms[largest] / columns["grad_ce"]
        derived = method.hyperparameters.get("ce_weight", 0.0) is None  # as 1 - alpha
        fixed = f" --ce-weight {values['ce_weight']:.2g}" if derived else ""
        lines.append(f"{method_flags.flag(name)} {values[name] / times:.2g}{fixed}: makes the gradient of {largest.upper()} as "
                     f"large as that of cross-entropy (at {values[name]:g} it is {times:.1f} times as large)")
    if "temperature" in values:
        limit = MAX_ENTROPY * math.log(classes)
        fitting = [T for T, entropy in zip(TEMPERATURES, entropies) if entropy <= limit]
        reason = f"the highest at which the teacher's entropy is at most {limit:.2f} nats" if fitting else (
            f"already at T = {TEMPERATURES[0]} the teacher's entropy is above {limit:.2f} nats")
        lines.append(f"--temperature {max(fitting, default=TEMPERATURES[0])}: {reason}, {MAX_ENTROPY:.0%} of log C ("
                     + ", ".join(f"{entropy:.2f} at T = {T}" for T, entropy in zip(TEMPERATURES, entropies)) + ")")
    now = f"--clip-grad {clip_grad:g} scales such a step to {min(1.0, clip_grad / norm):.0%}" if clip_grad else "now off"
    lines.append(f"--clip-grad {2 * norm:.2g}: twice the gradient norm of a new student, {norm:.2g}, which clips outliers and "
                 f"not every step ({now})")
    return ["worth a try, one at a time:", *(f"  {line}" for line in lines)]
