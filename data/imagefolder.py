"""Folders of images: decoded once, resized where asked for, and kept in a cache beside them."""
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

THUMBNAIL = 128  # pixels; larger images gain from threads, smaller ones lose
DECODER = b"1"  # another number makes every cache outdated: for a `decode` that gives other pixels


class Tree(NamedTuple):
    """The class folders under `root`, sorted, with the image files in them and their labels."""
    root: Path
    classes: list[str]
    paths: list[str]
    labels: list[int]


def imagefolder(data_dir: Path, image_size) -> Source:
    """`data_dir`/train and /test with one folder per class, or the class folders in `data_dir` itself."""
    if not data_dir.is_dir():
        raise Failure(DATA, f"no such folder ({data_dir})",
                      "--data-dir names one that holds train/CLASS/* and test/CLASS/*, or CLASS/* alone")
    roots = [data_dir / "train", data_dir / "test"] if (data_dir / "train").is_dir() else [data_dir]
    trees = [find_images(root) for root in roots]
    odd = set(trees[0].classes) ^ set(trees[-1].classes)
    if odd:
        name = min(odd)
        there, missing = roots if name in trees[0].classes else roots[::-1]
        raise Failure(DATA, f"class folder without a counterpart ({there / name}, no {missing / name})",
                      "add the one or remove the other")
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
        found = sorted(image_files(root / name))
        if not found:
            raise Failure(DATA, f"class folder without images ({root / name})", "add images to it, or remove it")
        paths += found
        labels += [label] * len(found)
    return Tree(root, classes, paths, labels)


def read_images(data_dir: Path, trees: list[Tree], image_size) -> list[torch.Tensor]:
    """The images of each tree, from the cache in `data_dir` if the files are still what was decoded into it."""
    listing = hashlib.sha256(DECODER)
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
    """The tensors that `write_cache` wrote, None if the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                return None
        images = torch.load(path, map_location="cpu", weights_only=True)
        return images if [len(part) for part in images] == [len(tree.paths) for tree in trees] else None
    except Exception:  # zipfile and the unpickler raise a dozen types on damaged bytes
        return None


def write_cache(path: Path, images: list[torch.Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save(images, buffer)
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # another process may be writing the same cache
    write_atomic(own, buffer.getbuffer())
    os.replace(own, path)


def decode(trees: list[Tree], image_size) -> tuple[list[torch.Tensor], bool]:
    """RGB images uint8 (N, side, side, 3) of each tree, and whether `side` is their own size rather than `image_size`."""
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
        # Pillow decodes without the interpreter's lock, but takes it often: on two cores threads read photographs 1.7 times
        # as fast as a plain loop, and images of 32x32 at 0.6 of its speed.
        apply = pool.map if max(max(first_with)) > THUMBNAIL else map
        decoded = progress(apply(decode_into, slots, paths), len(paths), "decoding")
        try:
            failed = [path for is_read, path in zip(decoded, paths) if not is_read]
        except BaseException:  # a signal does not wait for all the others
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise unreadable(failed, len(paths))
    return images, is_native


def distinct_sizes(paths: list[str]) -> dict[tuple[int, int], str]:
    """Every (width, height) that occurs, with the first image that has it; from the headers, not yet the pixels."""
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
    """Pass `items` on and say how far they are: in one live line on a terminal, else in a line per quarter."""
    step, show = (1, live) if sys.stdout.isatty() else (25, say)
    said = 0
    for count, item in enumerate(items, 1):
        percent = 100 * count // total
        if percent >= said + step:
            said = percent - percent % step
            (say if percent == 100 else show)(f"{verb} {total} images: {said}%")
        yield item
