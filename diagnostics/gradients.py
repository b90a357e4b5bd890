"""The columns of diagnostics.csv: the logit gradient of each loss term, the teacher's accuracy and entropy.

They are means over every 40th step; docs/diagnostics.md explains each.  The gradient of a term with respect to the student's
logits is that of the loss with all other weights at 0.
"""
import math
from functools import partial

import torch

from losses.methods import resolved

LOG_EVERY = 40  # steps between diagnostics steps
TREATMENTS = ("all", "clean", "policy", "erased", "mixup", "cutmix")  # groups of images by augmentation
BY_TREATMENT = ("images", "teacher_acc1", "teacher_either")  # columns of each group
WHOLE = "whole"  # the sum of all terms


class Diagnostics:
    """Sums over the images of an epoch's diagnostics steps, on the device.

    method: a losses.chosen_method.ChosenMethod.  rows: of each of the augmenter's batches, the last micro-batch of this rank.
    ranks: a training.distributed.Ranks.  steps: the diagnostics steps of an epoch; default: every 40th.
    """

    def __init__(self, method, augmenter, rows: range, ranks, steps: range | None = None):
        self.method, self.augmenter, self.rows, self.ranks = method, augmenter, rows, ranks
        self.steps = range(0, augmenter.steps, LOG_EVERY) if steps is None else steps
        self.treatments, self.sums = None, None

    def set_epoch(self, epoch: int) -> None:
        """Clear the sums and draw the epoch's augmentation parameters, to group the images by."""
        policy, erased, mixup, cutmix = self.augmenter.treatments(epoch, self.steps, self.rows)
        clean = ~(policy | erased | mixup | cutmix)
        drawn = torch.stack([torch.ones_like(policy), clean, policy, erased, mixup, cutmix], 1).float()  # (steps, groups, rows)
        if self.treatments is None:
            self.treatments = drawn
        else:
            self.treatments.copy_(drawn)  # in place: a CUDA graph reads it
        if self.sums is not None:
            self.sums.zero_()

    @torch.no_grad()
    def add(self, position: int | torch.Tensor, result, targets, logits, teacher_logits=None) -> None:
        """Add the diagnostics step at `position` in the epoch, unless it was skipped; may be captured in a CUDA graph.

        result: a training.optimization.StepResult with its relative update.  logits, teacher_logits: (N, C), of `rows`.
        """
        index = (position - self.steps.start) // self.steps.step
        groups = self.treatments[index] if isinstance(index, int) else self.treatments.index_select(0, index.view(1))[0]
        z, mixed = logits.detach().float(), (targets.label != targets.other).float()
        labels = torch.stack([targets.dominant, torch.where(targets.lam >= 0.5, targets.other, targets.label)], 1)
        values = {"images": groups[0], "mixed": mixed, "student_entropy": entropy(z),  # name -> (N,)
                  "student_scale": z.std(1, correction=0)}
        if teacher_logits is not None:
            v, T = teacher_logits.float(), self.method.arguments.get("temperature", 1.0)
            right, at_T = v.argmax(1, keepdim=True) == labels, (v / T).softmax(1).gather(1, labels)
            values |= {
                "teacher_acc1": 100.0 * right[:, 0], "teacher_either": 100.0 * right.any(1),
                "teacher_target": v.softmax(1).gather(1, labels[:, :1])[:, 0], "teacher_target_T": at_T[:, 0],
                "teacher_outside_T": 1 - at_T[:, 0] - at_T[:, 1] * mixed,
                "teacher_entropy": entropy(v), "teacher_scale": v.std(1, correction=0)}
        terms = self.gradients(z, teacher_logits, targets)
        gradients = torch.stack(list(terms.values())) * len(z)  # of each image's loss, not of the batch mean
        pulls = gradients.gather(2, labels.expand(len(terms), -1, -1)) * -mixed[:, None]
        measured = {"grad": gradients.square().sum(2), "pull": pulls[..., 0], "pull_minor": pulls[..., 1]}
        if "ce" in terms:
            measured["cos"] = (gradients * gradients[list(terms).index("ce")]).sum(2)
        for name, rows in measured.items():
            values |= {f"{name}_{term}": row for term, row in zip(terms, rows) if (name, term) != ("cos", "ce")}
        values["update_ratio"] = result.relative_update.expand_as(mixed)
        sums = groups @ torch.stack(list(values.values()), 1)  # (groups, names)
        sums.masked_fill_(result.skipped.bool(), 0.0)
        self.names, self.sums = tuple(values), sums if self.sums is None else self.sums.add_(sums)

    def gradients(self, z, v, targets) -> dict:
        """term -> (N, C): the gradient of its weighted part of the loss with respect to the logits z."""

        @torch.enable_grad()
        def gradient(loss, *arguments, **named):
            leaf = z.detach().requires_grad_()
            loss(leaf, *arguments, **named)[0].backward()
            return leaf.grad

        record, loss = self.method.record, partial(gradient, self.method.function, v, targets)
        weight_of, arguments = record.weight_of, resolved(record, self.method.arguments)
        off, rest = dict.fromkeys(weight_of.values(), 0.0), [term for term in record.terms if term not in weight_of]
        if len(rest) > 1:
            return {WHOLE: loss(**arguments)}
        found = {term: loss(**arguments | off | {weight: arguments[weight]}) for term, weight in weight_of.items()}
        if rest:  # a term without a weight is in each of these gradients
            own = loss(**arguments | off)
            found = {term: each - own for term, each in found.items()} | {rest[0]: own}
        return found | {WHOLE: sum(found.values())}

    def columns(self) -> dict:
        """The epoch's columns of diagnostics.csv, None for a mean over no image; waits for the device."""
        every, *groups = (dict(zip(self.names, row)) for row in self.ranks.sum(self.sums.double()).tolist())
        found = averages(every)
        for treatment, sums in zip(TREATMENTS[1:], groups):
            own = averages({name: sums[name] for name in BY_TREATMENT if name in sums})
            found |= {f"{name}_{treatment}": value for name, value in own.items()}
        return found


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """(N, C) logits -> (N,) entropy of the softmax in nats."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def averages(sums: dict) -> dict:
    """The columns of a group of images.

    sums: name -> sum; `grad_<term>`: of squared norms; `cos_<term>`: of dot products with the gradient of cross-entropy.
    """
    images, mixed = sums["images"], sums.get("mixed")

    def mean(total, count=images):
        return total / count if count else None

    found = {name: mean(total, mixed if name.startswith("pull_") else images) for name, total in sums.items() if name != "mixed"}
    found["images"] = round(images)
    terms = [name.removeprefix("grad_") for name in sums if name.startswith("grad_")]
    norms = {term: math.sqrt(mean(sums[f"grad_{term}"]) or 0.0) for term in terms}
    total_norm = sum(norm for term, norm in norms.items() if term != WHOLE)
    for term, norm in norms.items():
        found[f"grad_{term}"] = norm if images else None
        if term != WHOLE:
            found[f"share_{term}"] = mean(norm, total_norm)
        if f"cos_{term}" in found:
            found[f"cos_{term}"] = mean(sums[f"cos_{term}"], images * norm * norms["ce"])
    return found
