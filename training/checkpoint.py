"""Weights on disk: written in one step, read back only after every byte is checked.

torch.load does not check the archive's CRCs (a flipped bit loads as a wrong weight), so `read` checks them first; it
always uses weights_only=True, so a file can hold data but never code.
"""
import io
import zipfile
from pathlib import Path

import torch

from training.runlog import CHECKPOINT, Failure, write_atomic

FORMAT = 1


def write(path, **content) -> None:
    """Save `content` (tensors and plain Python types) as a checkpoint of ours, atomically."""
    buffer = io.BytesIO()  # serialising to memory first leaves a full disk to write_atomic, which names it
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomic(path, buffer.getvalue())


def read_tensors(path, code: int = CHECKPOINT):
    """Whatever plain data a `torch.save` file holds, its CRCs checked; exit `code` where it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise Failure(code, f"no such file ({path})", "check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise Failure(code, f"damaged file ({path}: wrong checksum in {damaged})", "restore it from a copy or make it again")
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise Failure(code, f"cannot read ({path}): permission denied", "change its permissions") from None
    except Failure:
        raise
    except Exception as failure:  # zipfile and the unpickler raise a dozen types on hostile bytes
        reason = "truncated, or not made by torch.save of torch 1.6 or newer"
        if "Unsupported" in str(failure) or "WeightsUnpickler" in str(failure):
            reason = "it holds more than plain data"
        raise Failure(code, f"unreadable file ({path}: {reason})", "restore it from a copy or make it again") from failure


def read(path) -> dict:
    """The content of a checkpoint that `write` made, with the keys it was given."""
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Failure(CHECKPOINT, f"not a checkpoint of this project ({path})", "use a run's best.pt, or --init for bare weights")
    return content
