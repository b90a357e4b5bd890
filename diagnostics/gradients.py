"""What diagnostics.csv says of an epoch: which term makes the gradient, what the teacher says of the images that it is given, and
how far student and teacher are apart; for all images, and split by what was done to them.

Every 40th step is looked at more closely, from its logits alone: a term's gradient with respect to the student's logits is that
of the method with all other weights at 0.  The step adds sums to a table on the device, and the table is read once per epoch.
docs/diagnostics.md explains every column.
"""
import math

import torch

from cli import method_flags
from losses import mixed_ce
from losses.methods import METHODS, resolved

EVERY = 40  # steps, one of which is looked at more closely, for diagnostics.csv
GROUPS = ("all", "clean", "policy", "erased", "mixup", "cutmix", "even", "uneven")
UNEVEN = 0.75  # what the larger label of a mix is worth from where on it counts as uneven
WHOLE = "whole"  # the gradient of all terms together
PERCENT = ("student_acc1", "teacher_acc1", "teacher_either")


class Diagnostics:
    """Sums over the images of the steps that are looked at, of one epoch at a time.

    In such a step `look` takes the logits, and `end_step` adds what it saw to the sums on the device; a CUDA graph may hold both.
    args: of cli.options.  augmenter: makes the batches, of which these `rows` are looked at.  ranks: of
    training.distributed.  steps: those that are looked at, every 40th where they are not given.
    """

    def __init__(self, args, augmenter, rows: range, ranks, steps: range | None = None):
        self.args, self.augmenter, self.rows, self.ranks = args, augmenter, rows, ranks
        self.function = method_flags.function(args) if "method" in args else None
        self.steps = range(0, augmenter.steps, EVERY) if steps is None else steps
        self.treated, self.sums = None, []

    def begin(self, epoch: int) -> None:
        """Forget the last epoch, and draw what is done to the images of this one."""
        policy, erased, mixup, cutmix = self.augmenter.treatments(epoch, self.steps, self.rows)
        clean = ~(policy | erased | mixup | cutmix)
        treated = torch.stack([torch.ones_like(policy), clean, policy, erased, mixup, cutmix], 1).float()  # (steps, groups, rows)
        if self.treated is None:
            self.treated, self.all = treated, torch.ones_like(policy[0])
        else:  # where a captured step reads and adds
            self.treated.copy_(treated)
            for sums in self.sums:
                sums.zero_()

    @torch.no_grad()
    def look(self, position: int | torch.Tensor, targets, logits, teacher_logits=None, numbers: dict | None = None) -> None:
        """Look at the step at `position` of the epoch, one of `steps`; waits for nothing.

        logits, teacher_logits: (N, C), of `rows`.  numbers: of the method, as they are in this epoch.
        """
        index = (position - self.steps.start) // self.steps.step
        treated = self.treated[index] if isinstance(index, int) else self.treated.index_select(0, index.view(1))[0]
        z, larger = logits.detach().float(), targets.lam >= 0.5
        ends = torch.stack([targets.dominant, torch.where(larger, targets.other, targets.label)], 1)
        dominant, mixed = ends[:, 0], ends[:, 0] != ends[:, 1]
        uneven = mixed & (torch.where(larger, targets.lam, 1 - targets.lam) >= UNEVEN)
        groups = torch.cat([treated, torch.stack([mixed & ~uneven, uneven]).float()])

        best, log_q = z.argmax(1), z.log_softmax(1)
        booleans = {"images": self.all, "mixed": mixed, "student_acc1": best == dominant}
        floats = {"student_entropy": -(log_q.exp() * log_q).sum(1), "student_scale": z.std(1, correction=0)}
        predictions = []
        if teacher_logits is not None:
            v, said = teacher_logits.float(), teacher_logits.argmax(1)
            log_p = v.log_softmax(1)
            p, at_T = log_p.exp(), (v / numbers.get("temperature", 1.0)).softmax(1).gather(1, ends)
            booleans |= {"teacher_acc1": said == dominant, "teacher_either": (said[:, None] == ends).any(1),
                         "agree": said == best}
            floats |= {"teacher_target": p.gather(1, ends[:, :1])[:, 0], "teacher_target_T": at_T[:, 0],
                       "teacher_outside_T": 1 - at_T[:, 0] - at_T[:, 1] * mixed, "teacher_entropy": -(p * log_p).sum(1),
                       "teacher_scale": v.std(1, correction=0), "teacher_square": p.square().sum(1)}
            predictions = [groups @ p]
        terms = self.gradients(z, teacher_logits, targets, numbers)
        gradients = torch.stack(list(terms.values())) * len(z)  # of each image, not of their mean
        of_ce = gradients[list(terms).index("ce")] if "ce" in terms else torch.zeros_like(z)
        pulls = gradients.gather(2, ends.expand(len(terms), -1, -1)) * -mixed.float()[:, None]
        parts = torch.cat([gradients.square().sum(2), (gradients * of_ce).sum(2), pulls[..., 0], pulls[..., 1]])
        self.names = (*booleans, *floats,
                      *(f"{what}_{term}" for what in ("grad", "cos", "pull", "pull_minor") for term in terms))
        values = torch.cat([torch.stack(list(booleans.values())).float(), torch.stack(list(floats.values())), parts])
        self.seen = [groups @ values.T, *predictions]

    @torch.no_grad()
    def end_step(self, taken) -> None:
        """Add what was seen to the sums, unless the step was skipped: then its numbers may not be finite.

        taken: a training.optimization.Taken with a move.
        """
        self.seen.append(torch.stack([taken.move, torch.ones_like(taken.move)]))
        skipped = taken.skipped.bool()
        seen = [each.masked_fill_(skipped, 0.0) for each in self.seen]
        if self.sums:
            for sums, each in zip(self.sums, seen):
                sums += each
        else:
            self.sums = seen

    def gradients(self, z, v, targets, numbers) -> dict:
        """term -> (N, C): the gradient of its part of the loss with respect to the logits z."""

        @torch.enable_grad()
        def gradient(loss, *arguments, **named):
            leaf = z.detach().requires_grad_()
            result = loss(leaf, *arguments, **named)
            (result[0] if isinstance(result, tuple) else result).backward()
            return leaf.grad

        if self.function is None:
            return dict.fromkeys(("ce", WHOLE), gradient(mixed_ce, targets, label_smoothing=self.args.label_smoothing))
        record = METHODS[self.args.method]
        numbers, off = resolved(record, numbers), dict.fromkeys(record.weight_of.values(), 0.0)
        rest = [term for term in record.terms if term not in record.weight_of]
        if len(rest) > 1:
            return {WHOLE: gradient(self.function, v, targets, **numbers)}
        found = {term: gradient(self.function, v, targets, **numbers | off | {number: numbers[number]})
                 for term, number in record.weight_of.items()}
        if rest:  # in each of those, too
            own = gradient(self.function, v, targets, **numbers | off)
            found = {term: each - own for term, each in found.items()} | {rest[0]: own}
        return found | {WHOLE: sum(found.values())}

    def columns(self) -> dict:
        """The epoch's columns of diagnostics.csv, None where there is nothing to average; waits for the device."""
        sums, *predictions, moves = (self.ranks.sum(sums.double()) for sums in self.sums)
        squares = predictions[0].square().sum(1).tolist() if predictions else [None] * len(GROUPS)
        move, steps = moves.tolist()
        found = {"looked_at": len(self.steps), "update_ratio": move / steps if steps else None}
        for group, row, square in zip(GROUPS, sums.tolist(), squares):
            suffix = "" if group == "all" else f"_{group}"
            found |= {name + suffix: value for name, value in averaged(dict(zip(self.names, row)), square).items()}
        return found


def averaged(sums: dict, square: float | None) -> dict:
    """The columns of a group of images.

    sums: over them, by name.  square: the squared norm of the teacher's predictions, summed over them.
    """
    images, mixed, squares = sums.pop("images"), sums.pop("mixed"), sums.pop("teacher_square", None)

    def mean(value, count=images):
        return value / count if count else None

    found = {"images": round(images)}
    terms = [name.removeprefix("grad_") for name in sums if name.startswith("grad_")]
    found |= {name: mean(100 * value if name in PERCENT else value) for name, value in sums.items()
              if not name.startswith(("grad_", "cos_", "pull_"))}
    if squares is not None:
        found["teacher_spread"] = math.sqrt(max(0.0, squares / images - square / images ** 2)) if images else None
    norms = {term: math.sqrt(sums[f"grad_{term}"] / images) if images else 0.0 for term in terms}
    together = sum(norm for term, norm in norms.items() if term != WHOLE)
    for term in terms:
        found |= {f"grad_{term}": norms[term] if images else None,
                  f"pull_{term}": mean(sums[f"pull_{term}"], mixed),
                  f"pull_minor_{term}": mean(sums[f"pull_minor_{term}"], mixed)}
        if term != WHOLE:
            found[f"share_{term}"] = mean(norms[term], together)
        if term != "ce":
            found[f"cos_{term}"] = mean(sums[f"cos_{term}"], images * norms[term] * norms.get("ce", 0.0))
    return found
