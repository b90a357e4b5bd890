"""Means over an epoch of losses and accuracy, and the end of a run that only skips steps."""
import math

import torch

from training.errors import CALMER, DIVERGED, Failure
from training.machine import Machine

SKIPS = 20  # optimizer steps in a row that a healthy run may skip: FP16's first scale of 2^16 finds its level in fewer


class Means:
    """Means over an epoch's samples of losses and accuracy; and the end of a run that only skips steps.

    A step writes one row of a table on the device, by one launch: whether it was skipped, how much it got right, its losses.  The
    host reads rows that have arrived, without waiting, and what is missing at the end of the epoch.  Of several processes each
    has the means over all of them, so that all decide alike.
    """

    def __init__(self, machine: Machine, steps: int):
        self.ranks, self.steps = machine.ranks, steps
        self.in_a_row = 0  # steps skipped
        self.clear()

    def clear(self) -> None:
        self.names, self.table, self.samples, self.rows, self.arrived = (), None, [], [], None

    def add(self, samples: int, skipped, correct, **losses) -> None:
        """Add a step's batch of `samples`: whether it was `skipped`, the share that is `correct`, its losses; 0-dim fp32 tensors.

        The names are the same at every call.  Failure DIVERGED after too many skipped steps in a row; on a GPU some steps later.
        """
        if self.table is None:
            self.names = tuple(losses)
            self.table = torch.empty(self.steps, 2 + len(losses), device=skipped.device)
        row = self.table[len(self.samples)]
        torch.stack([skipped, correct, *(loss.detach() for loss in losses.values())], out=row)
        self.ranks.mean(row)
        self.samples.append(samples)
        new = self.table[len(self.rows):len(self.samples)]
        if not new.is_cuda:
            self.take(new)
        elif self.arrived is None and len(new) >= SKIPS:  # a copy for each step would be one more launch
            self.host = torch.empty(new.shape, pin_memory=True)
            self.host.copy_(new, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        elif self.arrived is not None and self.arrived.query():
            self.take(self.host)
            self.arrived = None

    def take(self, rows) -> None:
        for row in rows.tolist():
            self.rows.append(row)
            self.in_a_row = self.in_a_row + 1 if row[0] else 0
            if self.in_a_row > SKIPS:
                raise self.failure(f"more than {SKIPS} steps in a row were skipped")

    def read(self) -> dict:
        """The means over the rows that have arrived, as columns of log.csv; NaN where no step was kept."""
        sums = [0.0] * (2 + len(self.names))
        for samples, (skipped, *numbers) in zip(self.samples, self.rows):
            if not skipped:
                sums = [total + samples * number for total, number in zip(sums, (1.0, *numbers))]
        count, correct, *losses = sums
        return {name: total / count if count else math.nan
                for name, total in zip((*self.names, "train_acc1"), (*losses, 100 * correct))}

    def epoch_columns(self, epoch: int) -> dict:
        """The epoch's means; waits for the device and starts the next epoch's.  An epoch without a kept step ends the run."""
        self.take(self.table[len(self.rows):len(self.samples)])
        columns = self.read()
        if not all(map(math.isfinite, columns.values())):
            raise self.failure(f"no step of epoch {epoch} was kept")
        self.clear()
        return columns

    def failure(self, reason: str) -> Failure:
        """Names the loss that went first: the terms stand after their sum."""
        sick = [name for name, *values in zip(self.names, *(row[2:] for row in self.rows)) if not all(map(math.isfinite, values))]
        return Failure(DIVERGED, f"{sick[-1] if sick else 'the gradient'} is not finite ({reason})", CALMER)
