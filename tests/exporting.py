"""What the tests of export.py, predict.py and benchmarks.latency share: a small trained run, images, and what they need."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from command import SMALL, succeeds
from helpers import make_images

CLASSES = [f"class{index}" for index in range(6)]


def have(*packages: str) -> bool:
    """Whether the packages of requirements-export.txt that are named here are installed."""
    return all(importlib.util.find_spec(package) for package in packages)


NEEDS = "needs requirements-export.txt"
needs_onnx = pytest.mark.skipif(not have("onnx", "onnxscript", "onnxruntime"), reason=NEEDS)
needs_torchao = pytest.mark.skipif(not have("torchao"), reason=NEEDS)
needs_executorch = pytest.mark.skipif(not have("executorch"), reason=NEEDS)


def trained_run(place: Path, capsys) -> Path:
    """A run of resnet8 on coloured stripes of 16x16 pixels in `place`, which becomes the images' own folder, too; made once."""
    if not (place / "run" / "summary.json").exists():
        make_images(place / "images" / "train", CLASSES, 30, seed=0)
        make_images(place / "images" / "test", CLASSES, 10, seed=1)
        succeeds(capsys, "train_teacher.py", f"--model resnet8 {SMALL} --data-dir {place}/images --output {place}/run")
    return place / "run"


def images(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
