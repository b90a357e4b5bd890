"""What several test files share: small image folders, and the tables that runs leave."""
import csv
import os
import random
import time
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

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


@contextmanager
def fails(code, *words):
    """Expect a Failure with this exit code, whose one line holds all `words`."""
    with pytest.raises(Failure) as caught:
        yield
    line = str(caught.value)
    assert caught.value.code == code and "\n" not in line and not [word for word in words if str(word) not in line], line


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
