"""Metrics of an epoch: means of losses, accuracy and gradient norms, and their lines on the terminal."""
import math
import sys
import time
from collections import deque
from statistics import median_low

import torch

from losses.methods import TERMS
from rundir.errors import DIVERGED, NONFINITE_HINT, Failure
from rundir.terminal import clock, live, say

MAX_SKIPPED = 20  # consecutive steps; lowering FP16's initial loss scale of 2^16 takes fewer
RECENT = 5  # epochs for the median in the ETA


class Metrics:
    """Means over an epoch, from a table on the device with a row per step: skipped, gradient norm, accuracy, losses.

    Inside the step, also in a CUDA graph, call `add` for each micro-batch and then `end_step`; after it `log`, which does not
    wait for the device; after the epoch `epoch_columns`.  Rows are means over the ranks; they may end with --match-norm's factor.
    """

    def __init__(self, ranks, steps: int, clip_grad: float = 0.0):
        self.ranks, self.steps, self.clip_grad = ranks, steps, clip_grad or math.inf
        self.consecutive_skips = 0
        self.names, self.micro_batches, self.table, self.matched = (), [], None, False
        self.clear()

    def clear(self) -> None:
        self.taken, self.rows, self.arrived = 0, [], None  # steps; rows on the host; event of a copy in flight

    def add(self, logits, targets, loss, terms: dict) -> None:
        """Add a micro-batch.  logits: (N, C).  loss, terms: 0-dim fp32."""
        best = logits.argmax(1)
        correct = torch.eq(best, targets.dominant, out=torch.empty(best.shape, device=best.device)).mean()  # fp32 in one launch
        self.names = ("train_loss", *(f"train_loss_{name}" for name in terms))
        self.micro_batches.append([correct, loss.detach(), *(term.detach() for term in terms.values())])

    def end_step(self, position: int | torch.Tensor, result) -> None:
        """Write the row of the step at `position` in the epoch.  result: a training.optimization.StepResult."""
        values, self.micro_batches = self.micro_batches, []
        values = values[0] if len(values) == 1 else torch.stack(list(map(torch.stack, values))).mean(0).unbind()
        self.matched = result.match_factor is not None
        values = [result.skipped, result.norm, *values, *[result.match_factor] * self.matched]
        if self.table is None:
            self.table = torch.empty(self.steps, len(values), device=result.norm.device)
        if isinstance(position, int):
            row = self.table[position]
            torch.stack(values, out=row)
            if self.ranks.size > 1:
                self.ranks.mean(row)  # so that all processes stop at the same step, for the same reason
        else:
            self.table.index_copy_(0, position.view(1), torch.stack(values)[None])

    def log(self) -> None:
        """Count a step and read the rows that have arrived.

        Failure DIVERGED: more than MAX_SKIPPED consecutive steps were skipped; on a GPU raised some steps later.
        """
        self.taken += 1
        new = self.table[len(self.rows):self.taken]
        if not new.is_cuda:
            self.read(new)
        elif self.arrived is None and len(new) >= MAX_SKIPPED:  # fewer copies than one per step
            self.host = torch.empty(new.shape, pin_memory=True)
            self.host.copy_(new, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        elif self.arrived is not None and self.arrived.query():
            self.read(self.host)
            self.arrived = None

    def read(self, rows) -> None:
        for row in rows.tolist():
            self.rows.append(row)
            self.consecutive_skips = self.consecutive_skips + 1 if row[0] else 0
            if self.consecutive_skips > MAX_SKIPPED:
                raise self.failure(f"more than {MAX_SKIPPED} consecutive steps were skipped")

    def means(self) -> dict:
        """Columns of log.csv: means over the rows that have arrived; NaN where every step was skipped."""
        rows = kept(self.rows)
        _, correct, *losses = zip(*rows) if rows else [()] * (2 + len(self.names))
        columns = zip((*self.names, "train_acc1"), (*losses[:len(self.names)], [100 * share for share in correct]))
        return {name: mean(column, math.nan) for name, column in columns}

    def epoch_columns(self, epoch: int) -> tuple[dict, dict]:
        """The epoch's columns of log.csv and of diagnostics.csv; waits for the device and clears the table.

        Failure DIVERGED: every step was skipped.
        """
        self.read(self.table[len(self.rows):self.taken])
        columns, rows = self.means(), kept(self.rows)
        norms = [norm for norm, *_ in rows]
        if not all(map(math.isfinite, columns.values())):
            raise self.failure(f"all steps of epoch {epoch} were skipped")
        columns |= {"grad_norm_mean": mean(norms), "grad_norm_max": max(norms),
                    "clip_frac": mean([norm > self.clip_grad for norm in norms]),
                    "skipped_steps": self.taken - len(norms), "steps": self.taken}
        diagnostics = {"clip_factor": mean([min(1.0, self.clip_grad / norm) if norm else 1.0 for norm in norms])}
        if self.matched:
            diagnostics["match_factor"] = mean([factor for *_, factor in rows])
        self.clear()
        return columns, diagnostics

    def failure(self, reason: str) -> Failure:
        """Names the last non-finite column: a term rather than the sum before it."""
        nonfinite = [name for name, *values in zip(self.names, *(row[3:] for row in self.rows))
                     if not all(map(math.isfinite, values))]
        return Failure(DIVERGED, f"{nonfinite[-1] if nonfinite else 'the gradient'} is not finite ({reason})", NONFINITE_HINT)


def kept(rows: list) -> list:
    """The rows of steps that were not skipped, without the first column."""
    return [row for skipped, *row in rows if not skipped]


def mean(values, empty=None):
    return sum(values) / len(values) if values else empty


class Progress:
    """One line per epoch; on a terminal also a live line twice a second.  The ETA is robust to pauses: it uses a median."""

    def __init__(self, epochs: int, steps_per_epoch: int, batch_size: int):
        self.epochs, self.steps, self.batch_size = epochs, steps_per_epoch, batch_size
        self.live, self.started, self.shown = sys.stdout.isatty(), time.perf_counter(), 0.0
        self.took = deque(maxlen=RECENT)  # seconds of an epoch, with its evaluation

    def step(self, epoch: int, step: int, lr: float, metrics: Metrics) -> None:
        now = time.perf_counter()
        if not self.live or now - self.shown < 0.5:
            return
        self.shown = now
        done, seconds = step + 1, now - self.started
        each = median_low(self.took) if self.took else seconds * self.steps / done
        eta = each * (self.epochs - epoch + 1 - done / self.steps)
        losses = " ".join(f"{name.removeprefix('train_')} {value:.3f}" for name, value in metrics.means().items())
        rate = self.batch_size * done / seconds
        live(f"epoch {epoch}/{self.epochs} [{step + 1}/{self.steps}] eta {clock(eta)} {rate:.0f} images/s lr {lr:.2g} {losses}")

    def epoch(self, row, best: bool) -> None:
        terms = {name: getattr(row, f"train_loss_{name}") for name in TERMS}
        terms = " ".join(f"{name} {value:.3f}" for name, value in terms.items() if value is not None)
        now = time.perf_counter()
        self.took.append(now - self.started)
        self.started, left = now, median_low(self.took) * (self.epochs - row.epoch)
        say(f"epoch {row.epoch}/{self.epochs}  lr {row.lr:.2g}  loss {row.train_loss:.3f} ({terms})  "
            f"train {row.train_acc1:.2f} %  val {row.val_acc1:.2f} % loss {row.val_loss:.3f}{' *' if best else '  '}  "
            f"{row.images_per_s:.0f} images/s  eta {clock(left)}")
