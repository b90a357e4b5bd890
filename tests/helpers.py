"""What several test files share: small image folders, and the tables that runs leave."""
import csv
import io
import os
import random
import time
from contextlib import contextmanager, redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image

from data import datasets
from rundir.errors import Failure


def make_images(folder, classes, each, seed, size=16):
    """Noisy images of one colour and stripe direction per class."""
    g = torch.Generator().manual_seed(seed)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        base = torch.tensor([(index * 83) % 256, (index * 151 + 40) % 256, (index * 47 + 90) % 256])
        for number in range(each):
            noise = torch.randint(-40, 40, (size, size, 3), generator=g)
            Image.fromarray((base + noise).clamp(0, 255).byte().numpy()).save(folder / name / f"{number:03d}.png")


def draw(path, size=(8, 8), seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


def folder(root, **counts):
    """Class folders with so many noise images each; no two images are equal."""
    for index, (name, count) in enumerate(counts.items()):
        for k in range(count):
            draw(root / name / f"{k:03}.png", seed=10**5 * len(root.name) + 1000 * index + k)
    return root


def load_folder(path, **arguments):
    with redirect_stdout(io.StringIO()) as said:
        return datasets.load("imagefolder", path, **arguments), said.getvalue()


@contextmanager
def fails(code, *words):
    """Expect a Failure with this exit code, whose one line holds all `words`."""
    with pytest.raises(Failure) as caught:
        yield
    line = str(caught.value)
    assert caught.value.code == code and "\n" not in line and not [word for word in words if str(word) not in line], line


class Touch:
    """Unpickling it touches `path`: code that a file must not run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def table_of(path) -> list[dict]:
    """The rows of a CSV file."""
    return list(csv.DictReader(path.read_text().splitlines()))


def random_moments() -> random.Random:
    """Other random numbers in every call, whose seed a failing test prints; SEED=... in the environment repeats them."""
    seed = int(os.environ.get("SEED", time.time_ns()))
    print(f"SEED={seed}")
    return random.Random(seed)


def wait_for(path, text="", limit=30) -> None:
    """Wait until there is a file with this text in it, at most `limit` seconds."""
    end = time.monotonic() + limit
    while not (path.exists() and (not text or text in path.read_text())):
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.01)
