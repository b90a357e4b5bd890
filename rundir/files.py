"""JSON, CSV and Markdown files, replaced atomically; SHA-256 of files; the lock of a directory."""
import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

from rundir.errors import CHECKPOINT, DATA, IN_USE, Failure, Unwritable


def write_atomic(path, content, previous=None, needed: int | None = None) -> None:
    """Replace `path` atomically: a reader, or a crash, sees the complete old or new file.

    content: bytes, or a callable that writes to an open file, about `needed` bytes.
    previous: path under which the old file is kept.  Raises Unwritable.
    """
    path = Path(path)
    partial, link = (Path(f"{name}.tmp") for name in (path, previous or path))
    make_directory(path.parent)
    try:
        with open(partial, "w+b") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            link.unlink(missing_ok=True)
            os.link(path, link)
            os.replace(link, previous)
            link.unlink(missing_ok=True)  # still there if both names were the same file
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the replacement survive a power failure
        finally:
            os.close(folder)
    except OSError as failure:
        for leftover in (partial, link):  # free their space
            leftover.unlink(missing_ok=True)
        raise unwritable(path, failure, len(content) if needed is None else needed) from failure


def unwritable(path: Path, failure: OSError, needed: int) -> Unwritable:
    """The error for `needed` bytes that cannot be written to `path`, with the free space."""
    error = Unwritable(failure.errno, failure.strerror, str(path))
    error.needed, error.free = needed, shutil.disk_usage(path.parent).free
    return error


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise Unwritable(failure.errno, failure.strerror, str(path)) from failure


def lock(directory: Path, user: str):
    """An open file that holds the lock of `directory`, which is created; the system frees it when the process ends in any way.

    Failure IN_USE: another `user`, such as "run", holds it.  Raises Unwritable.
    """
    make_directory(directory)
    try:
        file = open(directory / ".lock", "ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise Failure(IN_USE, f"{user} directory is in use by another {user} ({directory})",
                      "wait until it ends, or choose another --output") from None
    except OSError as failure:
        raise Unwritable(failure.errno, failure.strerror, str(directory / ".lock")) from failure


def write_json(path, content: dict) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict | None:
    """The object in a JSON file; None if the file is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as failure:
        raise damaged(path, failure) from None
    if not isinstance(content, dict):
        raise damaged(path, "it is not an object")
    return content


def damaged(path: Path, reason) -> Failure:
    """The error for an unreadable file of a run.  reason: exception or text."""
    why = getattr(reason, "strerror", None) or reason
    return Failure(DATA, f"cannot read {path.name}: {why} ({path})", "repair the file, or remove its run")


def as_csv(names: list[str], rows: list[dict]) -> bytes:
    """CSV with the columns `names`; None is an empty cell."""
    text = io.StringIO()
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # file names may be arbitrary bytes


def as_markdown(columns: dict[str, list[str]], left: set[str], note: str) -> str:
    """Markdown table, padded for terminals, followed by `note`.

    columns: header -> cells.  left: headers of left-aligned columns.
    """
    padded = []
    for header, cells in columns.items():
        texts = [header, *(cell.replace("|", "\\|") for cell in cells)]
        width = max(3, *map(len, texts))
        head, *body = [text.ljust(width) if header in left else text.rjust(width) for text in texts]
        padded.append([head, "-" * width if header in left else "-" * (width - 1) + ":", *body])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*padded)) + f"\n{note}\n"


def digest(path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as failure:
        raise Failure(CHECKPOINT, f"cannot read ({path}: {failure.strerror})", "check the path and its permissions") from failure


def existing_digest(path) -> str | None:
    """`digest` of a file; None if it is missing."""
    return digest(path) if path and os.path.isfile(path) else None
