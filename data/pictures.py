"""Image files as pixels: which files of a folder are images, how one is decoded, and sheets of them.  Imports no torch."""
import io
import os
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from rundir.errors import DATA, Failure

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder has the same
COLUMNS, INCHES = 8, 1.7  # of a contact sheet: images in a row, and the width of one


def image_files(folder, above: tuple = ()) -> Iterator[str]:
    """Paths of the images in `folder` and below; hidden files and folders are left out, and links that would lead in a circle.

    above: the folders on the way here.
    """
    above = (*above, os.path.realpath(folder))
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            target = os.path.realpath(entry.path)
            if not any(path == target or path.startswith(target + os.sep) for path in above):
                yield from image_files(entry.path, above)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path


def size_of(path: str) -> tuple[int, int] | None:
    """Width and height from the header, None if it is not that of an image."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # Pillow raises a dozen types on damaged files; decode_into fails on the same ones
        return None


def decode_into(slot: np.ndarray, path: str) -> bool:
    """Fill `slot` (side, side, 3) with the centre of an image, its short side resized to `side`; False if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # 16 and 32 bits per channel: Pillow would clip them at 255
                return False
            slot[...] = ImageOps.fit(image.convert("RGB"), slot.shape[:2], Image.Resampling.BILINEAR)
        return True
    except Exception:  # see size_of
        return False


def read(path: str, image_size: int) -> np.ndarray | None:
    """RGB uint8 (side, side, 3) as a data set of `image_size` would hold it: a square no larger than that stays as it is, any
    other image is shrunk or enlarged to it and cropped to its centre.  None if it cannot be read."""
    size = size_of(path)
    if size is None:
        return None
    side = size[0] if size[0] == size[1] <= image_size else image_size
    pixels = np.empty((side, side, 3), np.uint8)
    return pixels if decode_into(pixels, path) else None


def contact_sheet(shown: list, height: float) -> bytes:
    """A PNG of (image, title, caption) triples.  height: of a row, over the width of an image."""
    from matplotlib.figure import Figure
    rows, columns = -(-len(shown) // COLUMNS), min(COLUMNS, len(shown))
    figure = Figure(figsize=(columns * INCHES, rows * INCHES * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, title, caption) in zip(axes.flat, shown):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=7)
        axis.text(0.5, -0.04, caption, transform=axis.transAxes, ha="center", va="top", fontsize=6, color="0.3")
    sheet = io.BytesIO()
    figure.savefig(sheet, dpi=150, format="png")
    return sheet.getvalue()


def named_by(source: str) -> Iterator[str]:
    """Paths: of the images in a folder and below, sorted; of every line of stdin for `-`; else `source` itself."""
    if source == "-":
        yield from filter(None, (line.rstrip("\n") for line in sys.stdin))
    elif os.path.isdir(source):
        try:
            yield from sorted(image_files(source))
        except OSError as failure:
            raise Failure(DATA, f"cannot read ({failure.filename}: {failure.strerror})", "check its permissions") from failure
    else:
        yield source
