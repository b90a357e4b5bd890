"""Checkpoints on disk: written atomically, read after verification of every byte, always with weights_only=True.

torch.load does not verify the CRCs of the zip archive (a flipped bit loads as a wrong weight), and the CRCs do not cover its
directory (one flip in 25,000 there swaps tensors).  So `write` appends the SHA-256 of the file as the archive's comment, and
reading verifies it, or the CRCs of a file without it.
"""
import hashlib
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from rundir.errors import CHECKPOINT, Failure, optional
from rundir.files import write_atomic

FORMAT = 1
SEAL = b"sha256:"
SEAL_BYTES = len(SEAL) + 64  # with the digest
EXPORTED = (".onnx", ".pt2", ".pte")  # by export.py
REMEDY = "restore it from a copy or make it again"


def write(path, *, previous=None, **content) -> None:
    """Save `content` (tensors and plain Python types) atomically as a checkpoint.  previous: as in write_atomic."""
    write_atomic(path, partial(save_sealed, {"format": FORMAT, **content}), previous, tensor_bytes(content))


def save_sealed(content: dict, file) -> None:
    """Save `content` to a file that is open for writing and reading, then append its seal.

    Serialisation to memory first would hold the GIL and stop the training loop.
    """
    try:
        torch.save(content, file)
    except RuntimeError as failure:  # replaces the error of a failed write
        raise failure.__context__ or failure
    file.seek(-2, os.SEEK_END)  # a zip archive ends with the length of its comment, here of the seal
    file.write(SEAL_BYTES.to_bytes(2, "little"))
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(SEAL + sha256.encode())


def tensor_bytes(tree) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(map(tensor_bytes, values))


class Ignored:
    """Stands for an object that other projects save beside their weights, such as flags; runs none of its code."""

    def __init__(self, *args):
        """Takes the arguments of any constructor."""

    def __setstate__(self, state):
        """Takes the state of any object."""


IGNORED = ("argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
           "pathlib.PosixPath", "pathlib._local.PosixPath")


def read_tensors(path, code: int = CHECKPOINT, missing: str = "check the path") -> tuple:
    """The verified content of a file of plain data by torch.save, also before torch 1.6, or safetensors, and its SHA-256.

    Failure `code`: damaged, or no such file, for which `missing` is the remedy.
    """
    path, start = Path(path), b""
    try:
        if path.is_dir():
            raise Failure(code, f"a folder, not a file ({path})", "name a file in it, such as its best.pt")
        if not path.is_file():
            raise Failure(code, f"no such file ({path})", missing)
        if path.suffix in EXPORTED:
            raise Failure(code, f"an exported file, not a checkpoint ({path})", "name the best.pt that it was exported from")
        data = io.BytesIO(path.read_bytes())
        with data.getbuffer() as content:
            start, seal, sha256 = bytes(content[:2]), bytes(content[-SEAL_BYTES:]), hashlib.sha256(content[:-SEAL_BYTES])
            if seal.startswith(SEAL) and seal != SEAL + sha256.hexdigest().encode():
                raise Failure(code, f"damaged file ({path}: wrong checksum)", REMEDY)
            sha256.update(seal)
        if path.suffix == ".safetensors":
            return read_safetensors(data.getvalue(), path), sha256.hexdigest()
        if not seal.startswith(SEAL) and zipfile.is_zipfile(data) and (damaged := zipfile.ZipFile(data).testzip()):
            raise Failure(code, f"damaged file ({path}: wrong checksum in {damaged})", REMEDY)
        data.seek(0)
        with warnings.catch_warnings(action="ignore"):  # such as of another pickle protocol, before it is refused
            with torch.serialization.safe_globals([(Ignored, name) for name in IGNORED]):
                return torch.load(data, map_location="cpu", weights_only=True), sha256.hexdigest()
    except PermissionError:
        raise Failure(code, f"cannot read ({path}): permission denied", "change its permissions") from None
    except Failure:
        raise
    except Exception as failure:  # zipfile and the unpickler raise many types on damaged files
        maker = "safetensors" if path.suffix == ".safetensors" else "torch.save"
        reason, remedy = f"truncated, or not made by {maker}", REMEDY
        refused = any(words in str(failure) for words in ("nsupported", "WeightsUnpickler", "TorchScript"))
        if refused and (start == b"PK" or start[:1] == pickle.PROTO):  # else a page or a pointer in place of the file
            reason, remedy = "not only plain data", "save its state_dict alone, where it was made"
        raise Failure(code, f"unreadable file ({path}: {reason})", remedy) from failure


def read_safetensors(content: bytes, path: Path) -> dict:
    """The tensors, in the order of their names, numbers as numbers: the format keeps no other order."""
    tensors = optional("safetensors.torch", f"reads this file ({path})").load(content)

    def numbered(name):
        return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]
    return {name: tensors[name] for name in sorted(tensors, key=numbered)}


def is_own(content) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def read(path, missing: str = "check the path") -> dict:
    """The content of a checkpoint from `write`, and the "sha256" of the file."""
    content, sha256 = read_tensors(path, missing=missing)
    if not is_own(content):
        raise Failure(CHECKPOINT, f"not a checkpoint of this project ({path})", "name a run's best.pt")
    return content | {"sha256": sha256}


def on_cpu(tree):
    """A deep copy of nested containers with all tensors on the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: on_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(on_cpu, tree))
    return tree


class Writer(ThreadPoolExecutor):
    """A background thread for writing during training; `writer(job)` waits for the previous job.

    An error of a job is raised by the next call, by `wait`, or at the end of the `with` block.
    """

    def __init__(self):
        super().__init__(max_workers=1)
        self.pending = None

    def __call__(self, job) -> None:
        self.wait()
        self.pending = self.submit(job)

    def wait(self) -> None:
        if self.pending:
            self.pending.result()

    def __exit__(self, kind, failure, trace):
        super().__exit__(kind, failure, trace)
        if failure is None:
            self.wait()
