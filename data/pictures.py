"""Image files: search in folders, decoding, contact sheets.  Imports no torch."""
import io
import os
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from rundir.errors import DATA, Failure

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in torchvision's ImageFolder
COLUMNS, INCHES = 8, 1.7  # of a contact sheet; width of an image


def image_files(folder, parents: tuple = ()) -> Iterator[str]:
    """Paths of the images in `folder` and its subfolders, without hidden entries and cyclic links.

    parents: real paths of the enclosing folders.
    """
    parents = (*parents, os.path.realpath(folder))
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            target = os.path.realpath(entry.path)
            if not any(path == target or path.startswith(target + os.sep) for path in parents):
                yield from image_files(entry.path, parents)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path


def size_of(path: str) -> tuple[int, int] | None:
    """Width and height from the header; None if it is unreadable."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # Pillow raises many types on damaged files; decode_into returns False for the same files
        return None


def native_side(folder) -> int:
    """The longer side of the first readable image of a data set's folder, in pixels; 0 without one."""
    try:
        train = os.path.join(folder, "train")
        return max(next(filter(None, map(size_of, image_files(train if os.path.isdir(train) else folder))), (0, 0)))
    except OSError:  # data.imagefolder names it
        return 0


def stored_side(image_size: int | None, crop: str) -> int | None:
    """The side that photographs are resized to when they are read: with the crop "resized" 1.15 times `image_size`.

    224 -> 256, a multiple of 4.  Training cuts windows out of them, and evaluation the centre (models.centre_crop).
    """
    return 4 * round(1.15 * image_size / 4) if image_size and crop == "resized" else image_size


def decode_into(slot: np.ndarray, path: str) -> bool:
    """Resize the short side of an image to `side` and write its centre crop to `slot` (side, side, 3); False if unreadable."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # 16 and 32 bits per channel: Pillow would clip them at 255
                return False
            slot[...] = ImageOps.fit(image.convert("RGB"), slot.shape[:2], Image.Resampling.BILINEAR)
        return True
    except Exception:  # see size_of
        return False


def read(path: str, stored_size: int) -> np.ndarray | None:
    """RGB uint8 (side, side, 3), None if unreadable.

    A square image of at most `stored_size` keeps its size; any other is resized and centre-cropped, as in data.imagefolder.
    """
    size = size_of(path)
    if size is None:
        return None
    side = size[0] if size[0] == size[1] <= stored_size else stored_size
    pixels = np.empty((side, side, 3), np.uint8)
    return pixels if decode_into(pixels, path) else None


def contact_sheet(cells: list, height: float) -> bytes:
    """PNG of (image, title, caption) triples.  height: of a row, relative to the width of an image."""
    from matplotlib.figure import Figure
    rows, columns = -(-len(cells) // COLUMNS), min(COLUMNS, len(cells))
    figure = Figure(figsize=(columns * INCHES, rows * INCHES * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, title, caption) in zip(axes.flat, cells):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=7)
        axis.text(0.5, -0.04, caption, transform=axis.transAxes, ha="center", va="top", fontsize=6, color="0.3")
    sheet = io.BytesIO()
    figure.savefig(sheet, dpi=150, format="png")
    return sheet.getvalue()


def image_paths(source: str) -> Iterator[str]:
    """Sorted paths of the images in a folder and its subfolders; the lines of stdin for `-`; else `source` itself."""
    if source == "-":
        yield from filter(None, (line.rstrip("\n") for line in sys.stdin))
    elif os.path.isdir(source):
        try:
            yield from sorted(image_files(source))
        except OSError as failure:
            raise Failure(DATA, f"cannot read ({failure.filename}: {failure.strerror})", "check its permissions") from failure
    else:
        yield source
