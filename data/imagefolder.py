"""Image files of one's own: decoded once, resized to --image-size, cached beside the images."""
import fcntl
import glob
import hashlib
import io
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from data import layout, pictures
from data.split import Source, Split
from rundir.errors import DATA, OUT_OF_MEMORY, USAGE, Failure
from rundir.files import write_atomic
from rundir.terminal import live, say

THREADS_ABOVE = 128  # pixels; decoding of smaller images is slower with threads
CACHE_VERSION = b"4"  # to be changed with what `decode` returns


@dataclass
class Decoded:
    """RGB images uint8 (N, side, side, 3) of the readable files, in the order of the paths.

    unreadable: (row, reason) of the others.  notes: how many images were converted, by the constants of data.pictures.
    """
    images: torch.Tensor
    unreadable: list[tuple[int, str]]
    notes: dict[str, int]


class Unreadable(Failure):
    """Failure DATA: images that cannot be read.  files: (path, reason) of each.  listed_in: a file that names them all."""

    def __init__(self, files: list[tuple[str, str]], total: int, listed_in: Path | None = None):
        self.files, self.total = files, total
        examples = "; ".join(f"{path}: {reason}" for path, reason in files[:3]) + "; ..." * (len(files) > 3)
        listed = f", all in {listed_in}" if listed_in else ""
        super().__init__(DATA, f"{len(files)} of {total} images cannot be read ({examples}{listed})",
                         "replace or delete them, or use --unreadable skip")


def imagefolder(data_dir: Path, image_size, unreadable: str, allow_empty_classes: bool) -> Source:
    """The images of a folder or of a CSV file; data.layout has the layouts, data.pictures the formats.

    unreadable: "stop" or "skip" at files that cannot be read.
    """
    found = layout.find(data_dir, allow_empty_classes)
    paths = [path for images in found.splits.values() for _, path in images]
    prefix = f".fusekd-{data_dir.name}-" if data_dir != found.root else ".fusekd-cache-"
    decoded = read_images(found.root / prefix, found, paths, image_size)
    failed = [(path, f"{reason}, line {found.lines[path]} of {data_dir.name}" if path in found.lines else reason)
              for path, reason in ((paths[row], reason) for row, reason in decoded.unreadable)]
    if failed and unreadable == "stop":
        raise Unreadable(failed, len(paths))
    skipped = {path for path, _ in failed}
    label_of = {name: label for label, name in enumerate(found.classes)}
    labels = [[label_of[name] for name, path in images if path not in skipped] for images in found.splits.values()]
    splits = {split: Split(images, torch.tensor(part, dtype=torch.int64)) for split, images, part
              in zip(found.splits, decoded.images.split([len(part) for part in labels]), labels)}
    counts = splits["train"].labels.bincount(minlength=len(found.classes))
    if not counts.all():
        raise Failure(DATA, f"class without readable training images ({found.classes[int(counts.argmin())]}, {data_dir})",
                      "replace its files")
    left_out = [f"{len(skipped)} of {len(paths)} images cannot be read, left out"] if skipped else []
    notes = [*found.notes, *left_out, *(f"{count} of {len(paths)} images {kind}" for kind, count in decoded.notes.items())]
    names = [f"{name}/{os.path.basename(path)}" for name, path in found.splits["train"] if path not in skipped]
    alike: Counter = Counter()
    for row, name in enumerate(names):  # files of one name, in subfolders of a class, are numbered
        names[row], alike[name] = f"{name} {alike[name]}", alike[name] + 1
    return Source(splits["train"], splits.get("test"), found.classes, val=splits.get("val"), notes=notes,
                  unreadable=failed, names=names)


def read_images(prefix: Path, found: layout.Layout, paths: list[str], image_size) -> Decoded:
    """The images at `paths`, from the cache that begins with `prefix` if sizes and times of the files are unchanged."""
    listing, root = [], f"{found.root}/"
    for split, images in found.splits.items():
        for name, path in images:
            try:
                file = os.stat(path)
                size_and_time = f"{file.st_size}\0{file.st_mtime_ns}"
            except (OSError, ValueError):  # a missing file is unreadable
                size_and_time = ""
            listing.append(f"{split}\0{name}\0{path.removeprefix(root)}\0{size_and_time}\0")
    digest = hashlib.sha256(CACHE_VERSION + os.fsencode("".join(listing))).hexdigest()
    key = f"{prefix.name}{digest[:16]}"
    cache = prefix.with_name(f"{key}-{image_size}.pt")
    if decoded := read_cache(cache, len(paths)):
        return decoded
    with alone(found.root) as waited:
        if waited and (decoded := read_cache(cache, len(paths))):
            return decoded
        decoded, buffer = decode(paths, image_size), io.BytesIO()
        torch.save(vars(decoded), buffer)
        try:
            write_atomic(cache, buffer.getbuffer())
            for outdated in prefix.parent.glob(f"{glob.escape(prefix.name)}*"):
                if not outdated.name.startswith(key):
                    outdated.unlink(missing_ok=True)
        except OSError as failure:
            print(f"no cache of the images is kept, they will be decoded again ({prefix.parent}: {failure.strerror})")
            return decoded
    return read_cache(cache, len(paths)) or decoded  # the cache is mapped, in memory that other runs share


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Locks `folder` where its file system has locks; whether another process had it locked until now."""
    waited, directory = False, os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that decodes these images ({folder})")
                waited = True
                fcntl.flock(directory, fcntl.LOCK_EX)
        yield waited
    finally:
        os.close(directory)


def read_cache(path: Path, files: int) -> Decoded | None:
    """The cached images of `files` files; None without a cache, or if it is damaged."""
    if not path.is_file():
        return None
    with suppress(Exception):  # zipfile and the unpickler raise many types on damaged files
        with zipfile.ZipFile(path) as archive:
            intact = archive.testzip() is None  # torch.load does not verify the checksums
        decoded = Decoded(**torch.load(path, map_location="cpu", weights_only=True, mmap=True))  # has just been read once
        if intact and len(decoded.images) + len(decoded.unreadable) == files:
            return decoded
    print(f"the cache is damaged, so the images are decoded again ({path})")
    return None


def decode(paths: list[str], image_size) -> Decoded:
    """Decode the images, each resized and centre-cropped to `image_size`, unless all are squares of one size up to that."""
    with pictures.quiet():
        side, largest = common_side(paths, image_size)
        try:
            images = torch.empty(len(paths), side, side, 3, dtype=torch.uint8)
        except RuntimeError as failure:
            needed = len(paths) * side * side * 3 / 2**30
            raise Failure(OUT_OF_MEMORY, f"no memory for {len(paths)} images of {side}x{side} ({needed:.1f} GiB)",
                          "use smaller images or fewer") from failure
        with ThreadPoolExecutor() as pool:
            # Pillow releases the GIL only while decoding: on two cores, threads are 1.7 times as fast as a loop for photographs,
            # but 0.6 times as fast for images of 32x32.
            apply = pool.map if largest > THREADS_ABOVE else map
            try:
                results = list(progress(apply(pictures.decode_into, images.numpy(), paths), len(paths), "decoding"))
            except BaseException:  # such as a signal, which must not wait for the queue
                pool.shutdown(cancel_futures=True)
                raise
    unreadable = [(row, reason) for row, (reason, _) in enumerate(results) if reason]
    if unreadable:
        images = images[torch.tensor([not reason for reason, _ in results])]
    return Decoded(images, unreadable, dict(Counter(note for _, notes in results for note in notes)))


def common_side(paths: list[str], image_size) -> tuple[int, int]:
    """The side in pixels to which the images are decoded, and the longest stored side."""
    first_with: dict[tuple[int, int], str] = {}
    for size, path in zip(progress(map(pictures.size_of, paths), len(paths), "measuring"), paths):
        if size:
            first_with.setdefault(size, path)
    if not first_with:
        return 1, 1  # no image can be decoded
    width, height = next(iter(first_with))
    largest = max(max(first_with))
    if len(first_with) == 1 and width == height and (image_size is None or width <= image_size):
        return width, largest
    if image_size is None:
        examples = ", ".join(f"{path}: {width}x{height}" for (width, height), path in list(first_with.items())[:2])
        raise Failure(USAGE, f"images that are not squares of one size ({examples})", "resize and crop them with --image-size")
    return image_size, largest


def progress(items: Iterable, total: int, verb: str) -> Iterator:
    """Yield `items` and print the progress: in a live line on a terminal, else in one line per quarter."""
    step, show = (1, live) if sys.stdout.isatty() else (25, say)
    live(f"{verb} {total} images: 0%")
    printed = 0
    for count, item in enumerate(items, 1):
        percent = 100 * count // total
        if percent >= printed + step:
            printed = percent - percent % step
            (say if percent == 100 else show)(f"{verb} {total} images: {printed}%")
        yield item
