"""Faults of a run: each is called in its process before the script, and breaks something there."""
import errno
import os
import resource
import signal
import time
from datetime import timedelta
from importlib import import_module
from pkgutil import resolve_name

import torch


def on_rank(rank: int, fault) -> None:
    if os.environ["RANK"] == str(rank):
        fault()


def with_threads(count: int, fault=lambda: None) -> None:
    torch.set_num_threads(count)
    fault()


# --- the disk


def die_at(point: int) -> None:
    """SIGKILL before the `point`-th (from 1) fsync, replace or link."""
    at_write(point, lambda: os.kill(os.getpid(), signal.SIGKILL))


def no_space_at(point: int) -> None:
    """The `point`-th fsync, replace or link, and all after it, fail as on a full disk."""
    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_write(point, fail)


def at_write(point: int, action) -> None:
    reached = 0

    def counting(function):
        def call(*args, **flags):
            nonlocal reached
            reached += 1
            if reached >= point:
                action()
            return function(*args, **flags)
        return call

    for name in ("fsync", "replace", "link"):
        setattr(os, name, counting(getattr(os, name)))


def fill_the_disk(largest: int) -> None:
    """No file may grow beyond `largest` bytes: write(2) fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def slow_disk(seconds: float) -> None:
    """A checkpoint is opened so long before it is written."""
    plain = torch.save

    def slow(*args):
        time.sleep(seconds)
        plain(*args)

    torch.save = slow


# --- the numbers


def poison(term: str, calls) -> None:
    """NaN into the loss of the given steps (from 0), and into one of its terms; term: its name, or "loss" for none."""
    from losses import cross_entropy
    from losses.methods import METHODS
    steps = 0

    def poisoned(function):
        def call(logits, *args, **flags):
            nonlocal steps
            answer = function(logits, *args, **flags)
            if logits.is_leaf:  # a gradient for diagnostics.csv, no step
                return answer
            steps += 1
            if steps - 1 not in calls:
                return answer
            if not isinstance(answer, tuple):
                return answer * float("nan")
            loss, terms = answer
            return loss * float("nan"), terms | {name: value * float("nan") for name, value in terms.items() if name == term}
        return call

    cross_entropy.mixed_ce = poisoned(cross_entropy.mixed_ce)
    for method in METHODS.values():
        module, name = method.function.split(":")
        setattr(import_module(module), name, poisoned(resolve_name(method.function)))


def poison_images(calls) -> None:
    """NaN into the images of the given training batches (from 0), so that activations and running statistics see it too."""
    import augment
    batches, draw = iter(range(10**6)), augment.BatchAugmenter.__call__

    def call(self, *args):
        batch = draw(self, *args)
        return batch._replace(images=batch.images * float("nan")) if next(batches) in calls else batch

    augment.BatchAugmenter.__call__ = call


# --- the process


def slow_steps(seconds: float) -> None:
    from losses import cross_entropy
    plain = cross_entropy.mixed_ce

    def slow(*args, **flags):
        time.sleep(seconds)
        return plain(*args, **flags)

    cross_entropy.mixed_ce = slow


def run_out_of_memory() -> None:
    import augment

    def call(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    augment.BatchAugmenter.__call__ = call


def hang() -> None:
    """The second process hangs, and the others wait for 2 s."""
    import augment
    from training import distributed
    distributed.TIMEOUT = timedelta(seconds=2)
    if os.environ["RANK"] == "1":
        augment.BatchAugmenter.__call__ = lambda *args: time.sleep(60)


def connect_slowly() -> None:
    import torch.distributed as dist
    connect = dist.new_group

    def call(**flags):
        group = connect(**flags)
        time.sleep(0.5)
        return group

    dist.new_group = call
