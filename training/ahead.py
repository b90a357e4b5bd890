"""The next batch and the teacher's logits, made while the student learns from this batch.

On a second stream the device can do both at once.  Whether that is faster depends on how much of the device each of them fills,
so a `Trial` finds out: steps with and without a second stream come to the same numbers, and take turns until each was timed.
"""
from contextlib import contextmanager
from statistics import median

import torch

from training.terminal import say

TIMES = 10  # steps of each kind
KINDS = {False: "one after the other", True: "side by side"}


class Ahead:
    """`ahead(position, rows)`, in a step, gives what `make(position, rows)` gave during the step before, in tensors that stay
    where they are; from there to `end_step` what the next step will ask for is made.

    make: returns (augment's Batch, logits).  steps: of an epoch.  rows: of a batch; there are no others.
    """

    def __init__(self, make, steps: int, rows: range):
        self.make, self.steps, self.rows, self.kept = make, steps, rows, None
        self.overlapped, self.stream, self.there = False, torch.cuda.Stream(), None

    @contextmanager
    def overlapping(self, overlapped: bool):
        """Around a step: whether the next batch is made on a second stream, elsewhere never."""
        self.overlapped = overlapped
        try:
            yield
        finally:
            self.join()  # also where a step fails, or the end of its recording would fail, too, and hide why
            self.overlapped = False

    def begin_epoch(self) -> None:
        """Before its first step: make what that will ask for."""
        made = self.make(0, self.rows)
        if self.kept is None:
            self.kept = made
        else:
            self.keep(made)

    def __call__(self, position: int | torch.Tensor, rows: range) -> tuple:
        here = torch.cuda.current_stream()
        self.there = self.stream if self.overlapped else here
        self.there.wait_stream(here)
        with torch.cuda.stream(self.there):
            self.next = self.make((position + 1) % self.steps, rows)  # after the last of an epoch nobody asks for it
        return self.kept

    def end_step(self) -> None:
        """When the student has read the batch for the last time."""
        self.join()
        self.keep(self.next)
        self.next = None

    def join(self) -> None:
        """Wait, on the device, for what is being made, if anything is."""
        if self.there is not None:
            torch.cuda.current_stream().wait_stream(self.there)
            self.there = None

    def keep(self, made: tuple) -> None:
        torch._foreach_copy_(*([batch.images, *batch.targets, logits] for batch, logits in (self.kept, made)))


class Trial:
    """Whether teacher and student are faster side by side: steps of both kinds take turns, and the median of TIMES each decides.

    kinds: those to choose from, each whether Ahead is to be `overlapped`.  Nothing here waits for the device.
    """

    def __init__(self, kinds=KINDS):
        self.kinds, self.laps = list(kinds), []

    def kind(self, timed: bool) -> bool:
        """Of the next step.  timed: whether it may count."""
        return self.kinds[len(self.laps) % len(self.kinds) if timed else 0]

    def run(self, replay) -> None:
        """Take a step of the kind whose turn it is."""
        if len(self.kinds) == 1:
            replay()
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        self.laps.append((begin, end))
        enough = TIMES * len(self.kinds)
        if len(self.laps) >= enough and self.laps[enough - 1][1].query():
            self.decide(self.laps[:enough])

    def decide(self, laps) -> None:
        ms = {kind: median(begin.elapsed_time(end) for begin, end in laps[place::len(self.kinds)])
              for place, kind in enumerate(self.kinds)}
        self.kinds = [min(ms, key=ms.get)]
        say(f"teacher and student {KINDS[self.kinds[0]]}; "
            + ", ".join(f"{KINDS[kind]} {each:.2f} ms a step" for kind, each in ms.items()))
