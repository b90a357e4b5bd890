"""Advice before a run: what a teacher says of a few augmented batches, what a new student's gradient would be made of, and which
numbers that suggests.

The suggestions are rules of thumb, each printed with its reason: no distillation term louder than cross-entropy, a temperature
that leaves the teacher something to say, a clip value that stops outliers rather than every step.
"""
import math
from pathlib import Path

import torch

import models
from augment import BatchAugmenter
from cli import method_flags, options
from data import datasets
from diagnostics.gradients import Diagnostics
from training.device import RunContext, global_batch_size
from training.distributed import Ranks
from training.evaluation import check_classes
from training.optimization import StepResult

BATCHES = 8
TEMPERATURES = (1, 2, 3, 4, 6, 8)
FLAT = 0.9  # of the largest possible entropy: from here on a softened prediction says little about the classes


def advise(args, method, context: RunContext) -> list[str]:
    """Lines of advice for the flags of distill.py and the method that they choose.

    Loads the teacher, if there is one, and the data; trains nothing and writes nothing.

    Failure: as a run with these flags would, where the data or the teacher are missing, damaged, or do not fit together.
    """
    if not Path(args.teacher_checkpoint).exists():
        return [f"no teacher yet ({args.teacher_checkpoint}): with one, here is advice"]
    teacher = models.load(args.teacher_checkpoint, context.device, context.dtype)
    data = datasets.load(**options.data(args), device=context.device)
    check_classes(teacher.info, data)
    batch_size = global_batch_size(args.batch_size, data, context)
    augmenter = BatchAugmenter(*data.train, **options.augmentation(args), mean=data.mean, std=data.std, dtype=context.dtype,
                               batch_size=batch_size)
    student = models.build(args.student, len(data.classes), args.image_size or data.image_size).to(context.device).train()
    criterion, steps = method.criterion(context.device), range(min(BATCHES, augmenter.steps))
    looking = Diagnostics(method, augmenter, range(batch_size), Ranks(), steps)  # whole batches, whoever else reads them
    augmenter.set_epoch(1)
    looking.set_epoch(1)
    norms, entropies = [], torch.zeros(len(TEMPERATURES), device=context.device)
    for step in steps:
        batch = augmenter(step)
        with context.autocast:
            with torch.no_grad():
                v = teacher(batch.images)
            z = student(batch.images)
        criterion(z, v, batch.targets)[0].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), math.inf))
        student.zero_grad()
        looking.add(step, StepResult(*torch.zeros(3, device=z.device)), batch.targets, z, v)
        softened = torch.stack([(v.float() / T).softmax(1) for T in TEMPERATURES])
        entropies += torch.special.entr(softened).sum(2).mean(1) / len(steps)
    seen, classes, norm = looking.columns(), len(data.classes), torch.stack(norms).median().item()
    return [*said(method, seen, classes), *suggested(method, args.clip_grad, seen, norm, entropies.tolist(), classes)]


def said(method, seen: dict, classes: int) -> list[str]:
    """What was seen, in words.  seen: columns of diagnostics.csv."""
    T, terms = method.hyperparameters.get("temperature", 1.0), method.record.terms
    lines = [
        f"the teacher on {seen['images']} augmented images: right about {seen['teacher_acc1']:.0f} % of them, about either label "
        f"{seen['teacher_either']:.0f} %; entropy {seen['teacher_entropy']:.2f} of at most {math.log(classes):.2f} nats",
        f"its probability of the dominant label: {seen['teacher_target']:.3f} at T = 1, {seen['teacher_target_T']:.3f} at "
        f"T = {T:g}; outside of the labels {seen['teacher_outside_T']:.3f}"]
    if "share_ce" in seen:
        shares = ", ".join(f"{term.upper()} {seen[f'share_{term}']:.0%}" for term in terms)
        times = seen["grad_whole"] / seen["grad_ce"] if seen["grad_ce"] else math.inf
        lines.append(f"logit gradient of a new student: {shares}; together {seen['grad_whole']:.2f} an image, {times:.1f} times "
                     "that of its cross-entropy")
    return lines


def suggested(method, clip_grad: float, seen: dict, norm: float, entropies: list[float], classes: int) -> list[str]:
    """Numbers to try, with the reason.  norm: of a new student's gradient.  entropies: of the teacher at TEMPERATURES."""
    numbers, lines = method.resolved, []
    weighed = {term: number for term, number in method.record.weight_of.items() if term != "ce" and seen.get(f"grad_{term}")}
    if weighed and seen.get("grad_ce"):
        loudest = max(weighed, key=lambda term: seen[f"grad_{term}"])
        number = weighed[loudest]
        times = seen[f"grad_{loudest}"] / seen["grad_ce"]
        derived = method.hyperparameters.get("ce_weight", 0.0) is None  # as 1 - alpha
        fixed = f" --ce-weight {numbers['ce_weight']:.2g}" if derived else ""
        lines.append(f"{method_flags.flag(number)} {numbers[number] / times:.2g}{fixed}: {loudest.upper()} then weighs as much "
                     f"as the cross-entropy in the gradient (at {numbers[number]:g} it is {times:.1f} times as large)")
    if "temperature" in numbers:
        most = FLAT * math.log(classes)
        fitting = [T for T, value in zip(TEMPERATURES, entropies) if value <= most]
        reason = f"the highest at which the teacher's entropy on these images is at most {most:.2f} nats" if fitting else (
            f"already at T = {TEMPERATURES[0]} the teacher's entropy on these images is above {most:.2f} nats")
        lines.append(f"--temperature {max(fitting, default=TEMPERATURES[0])}: {reason}, {FLAT:.0%} of a uniform guess ("
                     + ", ".join(f"{value:.2f} at T = {T}" for T, value in zip(TEMPERATURES, entropies)) + ")")
    now = f"--clip-grad {clip_grad:g} cuts each such step to {min(1.0, clip_grad / norm):.0%}" if clip_grad else \
        "now nothing is clipped"
    lines.append(f"--clip-grad {2 * norm:.2g}: twice the gradient norm of a new student, {norm:.2g}, so that it stops outliers "
                 f"and not every step ({now})")
    return ["worth a try, one at a time:", *(f"  {line}" for line in lines)]
