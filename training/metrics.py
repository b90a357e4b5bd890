"""Means over an epoch of losses and accuracy, and the end of a run that only skips steps."""
import math

import torch

from rundir.errors import DIVERGED, NONFINITE_HINT, Failure
from training.device import Machine

SKIPS = 20  # optimizer steps in a row that a healthy run may skip: FP16's first scale of 2^16 finds its level in fewer


class Means:
    """Means over an epoch of losses, accuracy and gradient norms; and the end of a run that only skips steps.

    In a step, `add` takes what each part of its batch came to, and `end_step` writes one row of a table on the device: whether
    it was skipped, its gradient norm, the share that was right, its losses; a CUDA graph may hold both.  After it `look` counts
    the step and reads the rows that have arrived, without waiting; `epoch_columns` reads all.  Of several processes each has the
    means over all of them, so that all decide alike.
    """

    def __init__(self, machine: Machine, steps: int, clip_grad: float = 0.0):
        self.ranks, self.steps, self.clip_grad = machine.ranks, steps, clip_grad or math.inf
        self.in_a_row = 0  # steps skipped
        self.names, self.parts, self.table = (), [], None
        self.clear()

    def clear(self) -> None:
        """Start the next epoch."""
        self.taken, self.rows, self.arrived = 0, [], None  # steps; rows on the host; when the next of them will be there

    def add(self, correct, **losses) -> None:
        """A part of the step's batch: the share that is `correct`, and its losses, 0-dim fp32; the same names at every call."""
        self.names = tuple(losses)
        self.parts.append([correct, *(loss.detach() for loss in losses.values())])

    def end_step(self, position: int | torch.Tensor, skipped, norm) -> None:
        """Write the row of the step at `position` of the epoch.  skipped, norm: as in training.optimization.Taken."""
        parts, self.parts = self.parts, []
        if len(parts) > 1:
            parts = [torch.stack(list(map(torch.stack, parts))).mean(0).unbind()]
        values = [skipped, norm, *parts[0]]
        if self.table is None:
            self.table = torch.empty(self.steps, len(values), device=skipped.device)
        if isinstance(position, int):
            row = self.table[position]
            torch.stack(values, out=row)
            self.ranks.mean(row)
        else:
            self.table.index_copy_(0, position.view(1), torch.stack(values)[None])

    def look(self) -> None:
        """Count a step, after it, and read the rows that have arrived.

        Failure DIVERGED after too many skipped steps in a row; on a GPU some steps later.
        """
        self.taken += 1
        new = self.table[len(self.rows):self.taken]
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

    def kept(self) -> list:
        """The rows of the steps that were not skipped, without saying so."""
        return [row for skipped, *row in self.rows if not skipped]

    def read(self) -> dict:
        """The means over the rows that have arrived, as columns of log.csv; NaN where no step was kept."""
        norms, correct, *losses = zip(*self.kept()) if self.kept() else [()] * (2 + len(self.names))
        columns = zip((*self.names, "train_acc1"), (*losses, [100 * share for share in correct]))
        return {name: mean(column, math.nan) for name, column in columns}

    def epoch_columns(self, epoch: int) -> tuple[dict, dict]:
        """The epoch's columns of log.csv and of diagnostics.csv; waits for the device and starts the next epoch's.

        An epoch without a kept step ends the run.
        """
        self.take(self.table[len(self.rows):self.taken])
        columns = self.read()
        if not all(map(math.isfinite, columns.values())):
            raise self.failure(f"no step of epoch {epoch} was kept")
        norms = [norm for norm, *_ in self.kept()]
        columns |= {"grad_norm_mean": mean(norms), "grad_norm_max": max(norms),
                    "clip_frac": mean([norm > self.clip_grad for norm in norms]),
                    "skipped_steps": self.taken - len(norms), "steps": self.taken}
        looked = {"clip_factor": mean([min(1.0, self.clip_grad / norm) if norm else 1.0 for norm in norms])}
        self.clear()
        return columns, looked

    def failure(self, reason: str) -> Failure:
        """Names the loss that went first: the terms stand after their sum."""
        sick = [name for name, *values in zip(self.names, *(row[3:] for row in self.rows)) if not all(map(math.isfinite, values))]
        return Failure(DIVERGED, f"{sick[-1] if sick else 'the gradient'} is not finite ({reason})", NONFINITE_HINT)


def mean(values, otherwise=None):
    return sum(values) / len(values) if values else otherwise
