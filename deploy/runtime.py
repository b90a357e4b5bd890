"""Inference with a run's best.pt or an exported file, in its runtime.

    from deploy import runtime
    model = runtime.load("runs/v2-s42/export/best-int8.onnx")
    probabilities, logits = model(images)       # uint8 (N, H, W, 3) -> two arrays, float32 (N, C)

Imports no torch for an .onnx file.  The metadata of an exported file is in the JSON file beside it.
"""
import contextlib
import importlib
import json
import logging
import os
import warnings
from pathlib import Path

import numpy as np

from deploy import pt2
from rundir.errors import CHECKPOINT, USAGE, Failure, first_line
from rundir.files import digest

BATCH = 256
INSTALL = "python -m pip install -r requirements-export.txt"


def require(*packages: str) -> None:
    """Failure USAGE if one of these packages cannot be imported."""
    for package in packages:
        try:
            with quiet():
                importlib.import_module(package)
        except ImportError as failure:
            raise Failure(USAGE, f"missing package {package} ({failure})", INSTALL) from failure


@contextlib.contextmanager
def quiet():
    """Suppresses warnings and logging of other packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Model:
    """A callable from uint8 images (N, H, W, 3) to (probabilities, logits), float32 (N, C) each.

    run: the same for one batch of at most `metadata["largest_batch"]` images in the input format of the file.
    """

    def __init__(self, metadata: dict, run):
        self.metadata, self.run = metadata, run

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size, kind = self.metadata["largest_batch"] or BATCH, self.metadata["input"]
        outputs = [self.run(as_input(images[first:first + size], kind)) for first in range(0, len(images), size)]
        probabilities, logits = map(np.concatenate, zip(*outputs))
        return probabilities, logits


def as_input(images: np.ndarray, kind: str) -> np.ndarray:
    """Images uint8 (N, H, W, 3), for `float` as float32 (N, 3, H, W) between 0 and 1."""
    if kind == "uint8":
        return np.ascontiguousarray(images)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def load(path, threads: int | None = None) -> Model:
    """The network of a checkpoint, or of an exported file by the suffixes .onnx, .pt2 and .pte, on the CPU.

    threads: of ONNX Runtime; the other runtimes have a process-wide setting.
    A .pt2 or .pte file is a program: open only trusted files; the SHA-256 does not prove their origin.
    Failure CHECKPOINT: missing, damaged, or not written by export.py; USAGE: the runtime is not installed.
    """
    path = Path(path)
    if path.suffix not in RUNTIMES:
        return from_checkpoint(path)
    sha256, description = digest(path), metadata_path(path)
    try:
        metadata = json.loads(description.read_text(encoding="utf-8"))
        if missing := {"classes", "image_size", "input", "largest_batch", "precision", "sha256"} - set(metadata):
            raise ValueError(f"no {min(missing)}")
    except (OSError, ValueError, TypeError) as failure:
        raise Failure(CHECKPOINT, f"unreadable metadata of an exported file ({description}: {failure})",
                      "copy both files, or export again") from failure
    if sha256 != metadata["sha256"]:
        raise Failure(CHECKPOINT, f"file does not match its metadata ({path}: wrong SHA-256)", "export it again")
    return open_exported(path, metadata, threads)


def metadata_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def open_exported(path: Path, metadata: dict, threads: int | None = None) -> Model:
    packages, runner = RUNTIMES[path.suffix]
    require(*packages)
    try:
        with quiet():
            return Model(metadata, runner(path, metadata, threads))
    except Failure:
        raise
    except Exception as failure:  # each runtime has its own exception types
        raise Failure(CHECKPOINT, f"the runtime cannot open the file ({path}: {first_line(failure)})",
                      "export it again with the installed versions") from failure


def onnx_session(path: Path, metadata: dict, threads: int | None):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    options.intra_op_num_threads = threads or 0
    # Blocks external weight files, which the SHA-256 does not cover and our files do not use.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities", "logits"], {"images": images})


def exported_program(path: Path, metadata: dict, threads: int | None):
    from unittest import mock

    import torch
    if metadata["precision"] == "int8":
        require("torchao.quantization.pt2e")  # registers its operators
    with mock.patch.dict(os.environ, pt2.WEIGHTS_ONLY):
        module = torch.export.load(pt2.checked(path)).module()

    def run(images):
        with torch.no_grad():
            return [output.numpy() for output in module(torch.from_numpy(images))]

    return run


def executorch_program(path: Path, metadata: dict, threads: int | None):
    import torch
    from executorch.runtime import Runtime
    program = Runtime.get().load_program(path.read_bytes())
    # Loaded anew for each call: the program caches its methods, and a method holds no reference to its program.
    return lambda images: [output.numpy() for output in program.load_method("forward").execute((torch.from_numpy(images),))]


RUNTIMES = {  # suffix: required packages, and (path, metadata, threads) -> run
    ".onnx": (("onnxruntime",), onnx_session),
    ".pt2": (("torch",), exported_program),
    ".pte": (("torch", "executorch.runtime"), executorch_program),
}


def from_checkpoint(source) -> Model:
    """The network of a best.pt.  source: its path, or the result of models.read."""
    import torch

    import models
    net = models.load(source)

    @torch.no_grad()
    def run(images):
        logits = net(models.centre_crop(net, models.normalise(torch.from_numpy(images), net.info["mean"], net.info["std"])))
        return logits.softmax(1).numpy(), logits.numpy()

    return Model(net.info | {"input": "uint8", "largest_batch": None}, run)
