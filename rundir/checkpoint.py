"""Tensors and weights on disk: written in one step, read back only after every byte is checked.

torch.load does not check the archive's CRCs (a flipped bit loads as a wrong weight), and they do not cover its directory
(one flip in 25,000 there exchanges tensors).  So `write` seals the whole file with its SHA-256, as the zip archive's comment,
and reading checks that, or the CRCs of a file without one, and always uses weights_only=True: a file holds data, never code.
"""
import hashlib
import io
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rundir.errors import CHECKPOINT, Failure
from rundir.files import write_atomic

FORMAT = 1
SEAL = b"sha256:"
SEALED = len(SEAL) + 64  # bytes, with the digest
REMEDY = "restore it from a copy or make it again"


def write(path, *, previous=None, **content) -> None:
    """Save `content` (tensors and plain Python types) as a checkpoint of ours, atomically; `previous` as in write_atomic."""
    write_atomic(path, Sealed({"format": FORMAT, **content}), previous)


class Sealed:
    """A checkpoint that is serialised and hashed while it is written to a file, and sealed at its end.

    Serialising to memory first would hold the interpreter, and with it the training loop.  The last two bytes are held back: a
    zip archive ends with the length of its comment, which will be the seal's.  torch.save would replace the reason of a failed
    write by one of its own, so from there on nothing is written any more, only counted, and the reason is raised at the end.
    """

    def __init__(self, content: dict):
        self.content, self.sha256, self.held, self.size = content, hashlib.sha256(), b"", 0
        self.failure: OSError | None = None

    def __call__(self, file) -> None:
        self.file = file
        torch.save(self.content, self)  # type: ignore[arg-type]  # it needs write and flush alone
        self._put(self.held[:-2] + SEALED.to_bytes(2, "little"))
        self._put(SEAL + self.sha256.hexdigest().encode())
        if self.failure:
            raise self.failure

    def __len__(self) -> int:
        return self.size

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        if len(data) < 2:
            self.held += bytes(data)
        else:
            self._put(self.held)
            self._put(data[:-2])
            self.held = bytes(data[-2:])
        return len(data)

    def flush(self) -> None:
        """torch.save wants it; whoever opened the file flushes it."""

    def _put(self, data) -> None:
        self.size += len(data)
        try:
            if self.failure is None:
                self.sha256.update(data)
                self.file.write(data)
        except OSError as failure:
            self.failure = failure


def read_tensors(path, code: int = CHECKPOINT, missing: str = "check the path") -> tuple:
    """Whatever plain data a `torch.save` file holds, every byte checked, and the SHA-256 of these bytes.

    Failure `code`: damaged, or no such file, for which `missing` is the remedy.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise Failure(code, f"no such file ({path})", missing)
        data = io.BytesIO(path.read_bytes())
        with data.getbuffer() as content:
            seal, sha256 = bytes(content[-SEALED:]), hashlib.sha256(content[:-SEALED])
            if seal.startswith(SEAL) and seal != SEAL + sha256.hexdigest().encode():
                raise Failure(code, f"damaged file ({path}: wrong checksum)", REMEDY)
            sha256.update(seal)
        damaged = None if seal.startswith(SEAL) else zipfile.ZipFile(data).testzip()
        if damaged:
            raise Failure(code, f"damaged file ({path}: wrong checksum in {damaged})", REMEDY)
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=True), sha256.hexdigest()
    except PermissionError:
        raise Failure(code, f"cannot read ({path}): permission denied", "change its permissions") from None
    except Failure:
        raise
    except Exception as failure:  # zipfile and the unpickler raise a dozen types on hostile bytes
        reason = "truncated, or not made by torch.save of torch 1.6 or newer"
        if "Unsupported" in str(failure) or "WeightsUnpickler" in str(failure):
            reason = "it holds more than plain data"
        raise Failure(code, f"unreadable file ({path}: {reason})", REMEDY) from failure


def read(path, missing: str = "check the path") -> dict:
    """The content of a checkpoint that `write` made, with the keys it was given, and the "sha256" of the file."""
    content, sha256 = read_tensors(path, missing=missing)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Failure(CHECKPOINT, f"not a checkpoint of this project ({path})", "use a run's best.pt, or --init for bare weights")
    return content | {"sha256": sha256}


def on_cpu(tree):
    """A copy of nested containers whose tensors lie on the CPU and share nothing with the originals."""
    copy = queue_copy(tree)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copy


def queue_copy(tree):
    """What `on_cpu` returns, not yet filled where it comes from a GPU: copies to pinned memory, which are waited for together."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True, non_blocking=True)
    if isinstance(tree, Mapping):
        return {key: queue_copy(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(queue_copy, tree))
    return tree


class Writer:
    """One thread that writes while training goes on; `writer(job)` first waits for the job before it.

    An error of a job is raised by the next call, by `wait`, or at the end of the `with` block.
    """

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(max_workers=1), None

    def __call__(self, job) -> None:
        self.wait()
        self.pending = self.pool.submit(job)

    def wait(self) -> None:
        if self.pending:
            self.pending.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, failure, trace):
        self.pool.shutdown()
        if failure is None:
            self.wait()
