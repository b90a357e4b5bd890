"""What a terminal shows of a run: a line per epoch, and one inside the epoch."""
import sys
import time
from collections import deque
from statistics import median_low

from losses.methods import TERMS
from rundir.terminal import clock, live, say
from training.metrics import Means

LAST = 5  # epochs


class Progress:
    """One line per epoch; on a terminal also a live line inside the epoch, twice a second.

    What is left is estimated by the median of the last epochs, so that a pause, of a stopped process or a suspended machine, is
    soon forgotten.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, batch_size: int):
        self.epochs, self.steps, self.batch_size = epochs, steps_per_epoch, batch_size
        self.live, self.started, self.shown = sys.stdout.isatty(), time.perf_counter(), 0.0
        self.took = deque(maxlen=LAST)  # seconds of an epoch, with its evaluation

    def step(self, epoch: int, step: int, lr: float, means: Means) -> None:
        now = time.perf_counter()
        if not self.live or now - self.shown < 0.5:
            return
        self.shown = now
        done, seconds = step + 1, now - self.started
        each = median_low(self.took) if self.took else seconds * self.steps / done
        eta = each * (self.epochs - epoch + 1 - done / self.steps)
        losses = " ".join(f"{name.removeprefix('train_')} {value:.3f}" for name, value in means.read().items())
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
