"""Image folders with one subfolder per class; decoded once, resized to --image-size, cached in the folder."""
import hashlib
import io
import os
import sys
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from data.pictures import decode_into, image_files, size_of
from data.split import Source, Split
from rundir.errors import DATA, OUT_OF_MEMORY, USAGE, Failure
from rundir.files import write_atomic
from rundir.terminal import live, say

THREADS_ABOVE = 128  # pixels; decoding of smaller images is slower with threads
CACHE_VERSION = b"1"  # to be changed with the pixels that `decode` returns


class Tree(NamedTuple):
    """The sorted class folders under `root`; path and label of each image."""
    root: Path
    classes: list[str]
    paths: list[str]
    labels: list[int]


def imagefolder(data_dir: Path, image_size) -> Source:
    """The images of `data_dir`/train and /test with one folder per class, or of class folders in `data_dir` itself."""
    if not data_dir.is_dir():
        raise Failure(DATA, f"no such folder ({data_dir})",
                      "--data-dir names one that holds train/CLASS/* and test/CLASS/*, or CLASS/* alone")
    roots = [data_dir / "train", data_dir / "test"] if (data_dir / "train").is_dir() else [data_dir]
    trees = [find_images(root) for root in roots]
    unmatched = set(trees[0].classes) ^ set(trees[-1].classes)
    if unmatched:
        name = min(unmatched)
        present, missing = roots if name in trees[0].classes else roots[::-1]
        raise Failure(DATA, f"class folder without a counterpart ({present / name}, no {missing / name})",
                      "add the missing folder or remove the other")
    images = read_images(data_dir, trees, image_size)
    train, *test = (Split(images_of_tree, torch.tensor(tree.labels)) for images_of_tree, tree in zip(images, trees))
    return Source(train, test[0] if test else None, trees[0].classes)


def find_images(root: Path) -> Tree:
    if not root.is_dir():
        raise Failure(DATA, f"no such folder ({root})", f"add it, or name {root.parent / 'train'} as --data-dir to split that")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise Failure(DATA, f"fewer than two class folders ({root})", "give each class a folder of its own there")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(image_files(root / name))
        if not files:
            raise Failure(DATA, f"class folder without images ({root / name})", "add images to it, or remove it")
        paths += files
        labels += [label] * len(files)
    return Tree(root, classes, paths, labels)


def read_images(data_dir: Path, trees: list[Tree], image_size) -> list[torch.Tensor]:
    """The images of each tree, from the cache in `data_dir` if sizes and times of the files are unchanged."""
    listing = hashlib.sha256(CACHE_VERSION)
    for tree in trees:
        for path in tree.paths:
            file = os.stat(path)
            listing.update(os.fsencode(f"{path.removeprefix(str(tree.root))}\0{file.st_size}\0{file.st_mtime_ns}\0"))
    key = f".fusekd-cache-{listing.hexdigest()[:16]}"
    native, resized = data_dir / f"{key}.pt", data_dir / f"{key}-{image_size}.pt"
    for cache in (native, resized):
        if cache.is_file():
            images = read_cache(cache, trees)
            if images is None:
                print(f"the cache is damaged, so the images are decoded again ({cache})")
            elif cache == resized or image_size is None or images[0].shape[1] <= image_size:
                return images
    images, is_native = decode(trees, image_size)
    try:
        write_cache(native if is_native else resized, images)
        for outdated in data_dir.glob(".fusekd-cache-*"):
            if not outdated.name.startswith(key):
                outdated.unlink(missing_ok=True)
    except OSError as failure:
        print(f"no cache of the images is kept, they will be decoded again ({data_dir}: {failure.strerror})")
    return images


def read_cache(path: Path, trees: list[Tree]) -> list[torch.Tensor] | None:
    """The images of each tree; None if the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not verify the checksums
                return None
        images = torch.load(path, map_location="cpu", weights_only=True)
        return images if [len(part) for part in images] == [len(tree.paths) for tree in trees] else None
    except Exception:  # zipfile and the unpickler raise many types on damaged files
        return None


def write_cache(path: Path, images: list[torch.Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save(images, buffer)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # unique, for concurrent writers
    write_atomic(temporary, buffer.getbuffer())
    os.replace(temporary, path)


def decode(trees: list[Tree], image_size) -> tuple[list[torch.Tensor], bool]:
    """RGB images uint8 (N, side, side, 3) of each tree, and whether `side` is their stored size rather than `image_size`."""
    paths = [path for tree in trees for path in tree.paths]
    first_with = distinct_sizes(paths)
    width, height = next(iter(first_with))
    is_native = len(first_with) == 1 and width == height and (image_size is None or width <= image_size)
    if not is_native and image_size is None:
        examples = ", ".join(f"{path}: {width}x{height}" for (width, height), path in list(first_with.items())[:2])
        raise Failure(USAGE, f"images that are not squares of one size ({examples})", "resize and crop them with --image-size")
    side = width if is_native else image_size
    try:
        images = [torch.empty(len(tree.paths), side, side, 3, dtype=torch.uint8) for tree in trees]
    except RuntimeError as failure:
        needed = len(paths) * side * side * 3 / 2**30
        raise Failure(OUT_OF_MEMORY, f"no memory for {len(paths)} images of {side}x{side} ({needed:.1f} GiB)",
                      "use smaller images or fewer") from failure
    slots = [slot for tensor in images for slot in tensor.numpy()]
    with ThreadPoolExecutor() as pool:
        # Pillow releases the GIL only while decoding: on two cores, threads are 1.7 times as fast as a loop for photographs, but
        # 0.6 times as fast for images of 32x32.
        apply = pool.map if max(max(first_with)) > THREADS_ABOVE else map
        decoded = progress(apply(decode_into, slots, paths), len(paths), "decoding")
        try:
            failed = [path for is_read, path in zip(decoded, paths) if not is_read]
        except BaseException:  # such as a signal, which must not wait for the queue
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise unreadable(failed, len(paths))
    return images, is_native


def distinct_sizes(paths: list[str]) -> dict[tuple[int, int], str]:
    """Each (width, height) in the image headers, with the first path of that size."""
    first_with: dict[tuple[int, int], str] = {}
    for size, path in zip(progress(map(size_of, paths), len(paths), "measuring"), paths):
        if size:
            first_with.setdefault(size, path)
    if not first_with:
        raise unreadable(paths, len(paths))
    return first_with


def unreadable(paths: list[str], total: int) -> Failure:
    names = ", ".join(paths[:10]) + (", ..." if len(paths) > 10 else "")
    return Failure(DATA, f"{len(paths)} of {total} images cannot be read ({names})", "replace them by 8-bit ones or delete them")


def progress(items: Iterable, total: int, verb: str) -> Iterator:
    """Yield `items` and print the progress: in a live line on a terminal, else in one line per quarter."""
    step, show = (1, live) if sys.stdout.isatty() else (25, say)
    printed = 0
    for count, item in enumerate(items, 1):
        percent = 100 * count // total
        if percent >= printed + step:
            printed = percent - percent % step
            (say if percent == 100 else show)(f"{verb} {total} images: {printed}%")
        yield item
