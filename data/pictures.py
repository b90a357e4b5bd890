"""Image files: formats, search in folders, decoding to upright 8-bit RGB, contact sheets.  Imports no torch.

    EXIF orientation       applied
    transparency           composited on white
    16 bits per channel    divided by 257 (a 16-bit RGB file: its high bytes, as Pillow decodes it)
    32-bit integers        divided by 16,843,009; negative ones are refused
    floating point         multiplied by 255; refused unless all values are within [0, 1]
    CMYK, YCbCr, HSV, palettes, greys, 1 bit    converted to RGB by Pillow; CIELAB by LittleCMS, to sRGB
    several frames         the first
    large JPEG files       decoded at 1/2, 1/4 or 1/8 of their size, the short side at least 4/3 of the one that is kept
    embedded ICC profiles  ignored
"""
import contextlib
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from rundir.errors import DATA, Failure, first_line
from rundir.terminal import shortened

# Formats in which Pillow reads no pixels by itself: stubs, and EPS, which it hands to Ghostscript.
NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
COLUMNS, INCHES, CHARACTERS = 8, 1.7, 26  # of a contact sheet; width of an image, and of a line of its title
TURNED, ON_WHITE, SCALED, FIRST_FRAME = ("turned upright by their EXIF orientation", "with an alpha channel composited on white",
                                         "of more than 8 bits scaled to 8", "of several frames read as the first one")


@cache
def formats() -> tuple[str, ...]:
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NO_PIXELS))


@cache
def suffixes() -> frozenset[str]:
    readable = {*formats(), "MPO"}  # MPO is opened as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)


def image_files(folder, left_out: Counter, parents: tuple = ()) -> Iterator[str]:
    """Paths of the images in `folder` and its subfolders, without hidden entries and cyclic links.

    left_out: counts the files that are not yielded by suffix.  parents: real paths of the enclosing folders.
    """
    parents, known = (*parents, os.path.realpath(folder)), suffixes()
    for entry in os.scandir(folder):
        if entry.is_dir():
            target = os.path.realpath(entry.path)
            if not is_hidden(entry.name) and not any(path == target or path.startswith(target + os.sep) for path in parents):
                yield from image_files(entry.path, left_out, parents)
        elif is_hidden(entry.name):
            if not entry.name.startswith(".fusekd-"):
                left_out["hidden"] += 1
        elif (suffix := "".join(entry.name.rpartition(".")[1:]).lower()) in known:
            yield entry.path
        else:
            left_out[suffix if "." in suffix else "no suffix"] += 1


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out by its name; __MACOSX is what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def counted(left_out: Counter) -> str:
    """The counts as text, such as "3 .txt, 1 hidden"."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))


@contextlib.contextmanager
def quiet():
    """Keeps warnings of Pillow and messages of C libraries from stderr; for the whole process."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def size_of(path: str) -> tuple[int, int] | None:
    """Width and height from the header, before any EXIF rotation; None if it is unreadable."""
    try:
        with Image.open(path, formats=formats()) as image:
            return image.size
    except Exception:  # Pillow raises many types on damaged files; decode_into returns a reason for the same files
        return None


def stored_side(image_size: int | None, crop: str) -> int | None:
    """The side that photographs are resized to when they are read: with the crop "resized" 1.15 times `image_size`.

    224 -> 256, a multiple of 4.  Training cuts windows out of them, and evaluation the centre (models.centre_crop).
    """
    return 4 * round(1.15 * image_size / 4) if image_size and crop == "resized" else image_size


def decode_into(slot: np.ndarray, path: str) -> tuple[str | None, list[str]]:
    """Resize the short side of an image to `side` and write its centre crop to `slot` (side, side, 3).

    Returns the reason why it is unreadable, or None, and which of TURNED, ON_WHITE, SCALED and FIRST_FRAME apply.
    """
    try:
        with Image.open(path, formats=formats()) as image:
            notes: list[str] = []
            # JPEG decodes an eighth of the size in a fraction of the time. From 4/3 of the kept side on, the result is on average
            # within a level of the whole image's.
            drafted = image.draft(None, (-(-4 * len(slot) // 3),) * 2)
            rgb = upright_rgb(image, notes)
            width, height = drafted[1][2:] if drafted else image.size  # once it is loaded: Pillow turns a TIFF by itself
            slot[...] = rgb.resize(slot.shape[:2], Image.Resampling.BILINEAR, centre(rgb, width, height, orientation(image)))
        return None, notes
    except Image.DecompressionBombError:
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels", []
    except Image.UnidentifiedImageError:
        with open(path, "rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:] in (b"heic", b"heix", b"heif", b"hevc", b"mif1"):
            return "HEIC: convert it to JPEG", []
        return "not an image, or its header is damaged" if head else "empty file", []
    except OSError as failure:
        return failure.strerror or first_line(failure), []
    except Exception as failure:  # see size_of
        return first_line(failure) or type(failure).__name__, []


def centre(image: Image.Image, width: float, height: float, turn: int) -> tuple[float, float, float, float]:
    """The centred square of an upright image, in pixels: left, top, right, bottom.

    width, height: of the picture before it was turned by its EXIF orientation `turn`.  A JPEG that is decoded at an eighth of its
    size may end within a pixel.
    """
    if turn in range(5, 9):
        width, height = height, width
    side = min(width, height)
    left = image.width - (width + side) / 2 if turn in (2, 3, 6, 7) else (width - side) / 2
    top = image.height - (height + side) / 2 if turn in (3, 4, 7, 8) else (height - side) / 2
    return left, top, left + side, top + side


def upright_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """The first frame as 8-bit RGB, as in the table above; appends to `notes`.  Raises Pillow's exceptions, and ValueError."""
    if getattr(image, "is_animated", False):
        notes.append(FIRST_FRAME)
    image.load()
    turn = orientation(image)
    if image.mode[0] in "IF":
        notes.append(SCALED)
        image = Image.fromarray(as_bytes(image))
    if image.has_transparency_data:
        notes.append(ON_WHITE)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image  # None only where done in place
    image = image.convert("RGB")
    if turn in TRANSPOSED:
        notes.append(TURNED)
        image = image.transpose(TRANSPOSED[turn])
    return image


TRANSPOSED = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
              5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
              8: Image.Transpose.ROTATE_90}


def orientation(image: Image.Image) -> int:
    """The EXIF orientation (tag 0x0112); 1, upright, without readable EXIF data."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data in an intact image
        return 1


def as_bytes(image: Image.Image) -> np.ndarray:
    """A grey image of 16-bit or 32-bit integers or floats, scaled to uint8 (H, W)."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # False for NaN, too
            raise ValueError("floating-point values outside of [0, 1]")
        return np.round(values.astype(np.float64) * 255).astype(np.uint8)
    bits, signed = tags.get(258, (16,))[0], tags.get(339, (1,))[0] == 2  # BitsPerSample, SampleFormat of TIFF
    if values.dtype == np.int32 and not signed:
        values = values.view(np.uint32)  # Pillow keeps both kinds as int32
    largest = 2 ** bits - 1
    if values.min() < 0 or values.max() > largest:
        raise ValueError(f"values outside of 0 to {largest}")
    return np.round(values / (largest / 255)).astype(np.uint8)


def read(path: str, stored_size: int) -> tuple[np.ndarray | None, str | None]:
    """RGB uint8 (side, side, 3) and None, or None and the reason why it is unreadable.

    A square image of at most `stored_size` keeps its size; any other is resized and centre-cropped, as in data.imagefolder.
    """
    with quiet():
        size = size_of(path) or (0, 1)
        pixels = np.empty((*[size[0] if size[0] == size[1] <= stored_size else stored_size] * 2, 3), np.uint8)
        reason, _ = decode_into(pixels, path)
    return (None, reason) if reason else (pixels, None)


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
        axis.set_title("\n".join(shortened(line, CHARACTERS) for line in title.split("\n")), fontsize=7, parse_math=False)
        axis.text(0.5, -0.04, caption, transform=axis.transAxes, ha="center", va="top", fontsize=6, color="0.3")
    sheet = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of a glyph that the font lacks
        figure.savefig(sheet, dpi=150, format="png")
    return sheet.getvalue()


def image_paths(source: str) -> Iterator[str]:
    """Sorted paths of the images in a folder and its subfolders; the lines of stdin for `-`; else `source` itself.

    Files of a folder that are left out are counted in one line on stderr.
    """
    if source == "-":
        yield from filter(None, (line.rstrip("\n") for line in sys.stdin))
    elif Path(source).is_dir():
        left_out: Counter = Counter()
        try:
            yield from sorted(image_files(source, left_out))
        except OSError as failure:
            raise Failure(DATA, f"cannot read ({failure.filename}: {failure.strerror})", "check its permissions") from failure
        if left_out:
            print(f"left out: {counted(left_out)} ({source})", file=sys.stderr)
    else:
        yield source
