"""A trained network in use, in the runtime of its file: a run's best.pt, or what export.py made of one.

    from deploy import runtime
    model = runtime.load("runs/v2-s42/export/best-int8.onnx")
    probabilities, logits = model(images)       # uint8 (N, H, W, 3) -> two arrays, float32 (N, C)

Imports no torch for an .onnx file.  What describes an exported file, its card, is the JSON file beside it.
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
    """Failure USAGE where one of these packages cannot be imported."""
    for package in packages:
        try:
            with quiet():
                importlib.import_module(package)
        except ImportError as failure:
            raise Failure(USAGE, f"this needs the package {package} ({failure})", INSTALL) from failure


@contextlib.contextmanager
def quiet():
    """Without the warnings and the log of others' code, which are about its insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Model:
    """A network that takes uint8 images (N, H, W, 3) of any N and gives their (probabilities, logits), float32 (N, C) each.

    run: takes one batch as the file wants it, no larger than `card["largest_batch"]`, and returns both outputs as arrays.
    """

    def __init__(self, card: dict, run):
        self.card, self.run = card, run

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = self.card["largest_batch"] or BATCH
        outputs = [self.run(self.as_wanted(images[first:first + size])) for first in range(0, len(images), size)]
        probabilities, logits = map(np.concatenate, zip(*outputs))
        return probabilities, logits

    def as_wanted(self, images: np.ndarray) -> np.ndarray:
        """The input of the file: the images themselves, or float32 (N, 3, H, W) between 0 and 1."""
        if self.card["input"] == "uint8":
            return np.ascontiguousarray(images)
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def load(path, threads: int | None = None) -> Model:
    """The network in a file, ready to run on the CPU; by the name, .onnx, .pt2 and .pte are exported files.

    threads: of ONNX Runtime; the other runtimes have one setting for the whole process.
    A .pt2 or .pte file is a program: open none of a stranger, whose SHA-256 says nothing.
    Failure CHECKPOINT: missing, damaged, not ours, a .pt2 that export.py does not write; USAGE: its runtime is not installed.
    """
    path = Path(path)
    if path.suffix not in RUNTIMES:
        return of_checkpoint(path)
    sha256, card = digest(path), read_card(path)
    if sha256 != card["sha256"]:
        raise Failure(CHECKPOINT, f"not the file that its description is of ({path}: wrong SHA-256)", "export it again")
    return start(path, card, threads)


def card_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def read_card(path: Path) -> dict:
    beside = card_path(path)
    try:
        card = json.loads(beside.read_text(encoding="utf-8"))
        missing = {"classes", "image_size", "input", "largest_batch", "precision", "sha256"} - set(card)
    except (OSError, ValueError, TypeError) as failure:
        raise Failure(CHECKPOINT, f"no description of an exported file ({beside}: {failure})",
                      "copy both files, or export again") from failure
    if missing:
        raise Failure(CHECKPOINT, f"not the description of an exported file ({beside}: no {min(missing)})", "export again")
    return card


def start(path: Path, card: dict, threads: int | None = None) -> Model:
    """The exported file `path`, which `card` describes, in its runtime."""
    packages, runner = RUNTIMES[path.suffix]
    require(*packages)
    try:
        with quiet():
            return Model(card, runner(path, card, threads))
    except Failure:
        raise
    except Exception as failure:  # each runtime raises its own types
        raise Failure(CHECKPOINT, f"cannot be opened by its runtime ({path}: {first_line(failure)})",
                      "export it again with the versions that are installed here") from failure


def onnx_session(path: Path, card: dict, threads: int | None):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an error is raised, too
    options.intra_op_num_threads = threads or 0
    # Weights may lie in other files, which no SHA-256 would cover.  Ours do not: none is found where there is no folder.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities", "logits"], {"images": images})


def exported_program(path: Path, card: dict, threads: int | None):
    import torch
    if card["precision"] == "int8":
        require("torchao.quantization.pt2e")  # registers the operators of the file
    with pt2.weights_only():
        module = torch.export.load(pt2.checked(path)).module()

    def run(images):
        with torch.no_grad():
            return [output.numpy() for output in module(torch.from_numpy(images))]

    return run


def executorch_program(path: Path, card: dict, threads: int | None):
    import torch
    from executorch.runtime import Runtime
    program = Runtime.get().load_program(path.read_bytes())
    # Through the program every time: it keeps its methods, and a method does not keep its program.
    return lambda images: [output.numpy() for output in program.load_method("forward").execute((torch.from_numpy(images),))]


RUNTIMES = {  # by the suffix of a file: the packages it needs, and (path, card, threads) -> run
    ".onnx": (("onnxruntime",), onnx_session),
    ".pt2": (("torch",), exported_program),
    ".pte": (("torch", "executorch.runtime"), executorch_program),
}


def of_checkpoint(source) -> Model:
    """The network in a best.pt: its path, or what models.read returned."""
    import torch

    import models
    net = models.load(source)

    @torch.no_grad()
    def run(images):
        logits = net(models.normalise(torch.from_numpy(images), net.info["mean"], net.info["std"]))
        return logits.softmax(1).numpy(), logits.numpy()

    return Model(net.info | {"input": "uint8", "largest_batch": None}, run)
