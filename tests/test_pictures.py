"""Every kind of image file becomes upright 8-bit RGB; what cannot be read is said with its reason."""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from data import pictures

NOISE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
RAMP = np.arange(144, dtype=np.int64).reshape(12, 12)  # 0 to 143


def decode(path, side=12):
    pixels = np.zeros((side, side, 3), np.uint8)
    reason, notes = pictures.decode_into(pixels, str(path))
    assert reason is None, reason
    return pixels, notes


def reason(path):
    found, notes = pictures.decode_into(np.zeros((12, 12, 3), np.uint8), str(path))
    assert notes == []
    return found


def tiff(path, values, bits, kind):
    """Little-endian grey TIFF of one strip.  kind: SampleFormat, 1 unsigned, 2 signed, 3 floating point."""
    height, width = values.shape
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height),
               (279, values.nbytes), (339, kind)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes() + directory + bytes(4))


# How the pixels of an upright image are stored under each EXIF orientation (the inverse of what a viewer does).
STORED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
          5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[::-1],
          7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a.swapaxes(0, 1)[:, ::-1]}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, tag, suffix):
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = Image.fromarray(np.ascontiguousarray(STORED[tag](np.pad(NOISE, ((0, 0), (4, 4), (0, 0))))))
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **{"lossless": True} if suffix == "webp" else {})
    pixels, notes = decode(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels, NOISE)
    assert notes == ([pictures.TURNED] if tag > 1 and suffix != "tif" else [])  # Pillow itself turns a TIFF


def photograph(width, height, mode="RGB"):
    """Waves and a box, of all three colours."""
    down, along = np.mgrid[:height, :width] / min(height, width)
    whole = 100 + 90 * np.sin(np.stack([7 * down, 9 * along, 5 * (down - 2 * along)], 2))
    whole[height // 5:height // 3, width // 3:width // 2] += 60
    return Image.fromarray(whole.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("width, height", [(640, 480), (1099, 827), (300, 199), (160, 161)])
@pytest.mark.parametrize("tag", range(1, 9))
def test_a_large_jpeg_is_decoded_smaller_within_a_level(tmp_path, tag, width, height):
    """Also where a last column and row are partly outside of the picture, at any of the sides once it is upright."""
    exif = Image.Exif()
    exif[0x0112] = tag
    photograph(width, height).save(tmp_path / "a.jpg", exif=exif, quality=92)
    with Image.open(tmp_path / "a.jpg") as file:
        wanted = ImageOps.fit(ImageOps.exif_transpose(file.convert("RGB")), (60, 60), Image.Resampling.BILINEAR)
    pixels, _ = decode(tmp_path / "a.jpg", side=60)
    difference = np.abs(pixels - np.asarray(wanted, int))
    assert 0 < difference.mean() < 1, difference.mean()


@pytest.mark.parametrize("mode", ["L", "CMYK", "progressive", "MPO", "small"])
def test_kinds_of_large_jpegs(tmp_path, mode):
    """"small": below 4/3 of twice the kept side the whole image is decoded, so that none is ever enlarged."""
    image = photograph(*(159, 300) if mode == "small" else (1000, 700), mode if mode in ("L", "CMYK") else "RGB")
    options = {"progressive": {"progressive": True}, "MPO": {"format": "MPO", "save_all": True, "append_images": [image]}}
    image.save(tmp_path / "a.jpg", quality=92, **options.get(mode, {}))
    with Image.open(tmp_path / "a.jpg") as file:
        wanted = ImageOps.fit(file.convert("RGB"), (60, 60), Image.Resampling.BILINEAR)
    pixels, notes = decode(tmp_path / "a.jpg", side=60)
    difference = np.abs(pixels - np.asarray(wanted, int))
    assert difference.mean() < 1 and (difference.max() == 0) == (mode == "small"), difference.mean()
    assert notes == [pictures.FIRST_FRAME] * (mode == "MPO")


def test_damaged_exif_data_do_not_hide_an_image(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0")
    assert np.array_equal(decode(tmp_path / "a.png")[0], NOISE)


ALPHA = np.where(NOISE[..., 0] % 2, 255, 0).astype(np.uint8)
COLOURS = np.array([[10, 20, 30], [40, 50, 60], [255, 255, 255], [100, 110, 120]], np.uint8)
PALETTE = Image.fromarray(NOISE[..., 0] % 4).convert("P")
PALETTE.putpalette(COLOURS.flatten().tolist())
ON_WHITE = {  # an image, the argument that makes one colour of it transparent, and what is read
    "RGBA": (np.dstack([NOISE, ALPHA]), None, np.where(ALPHA[..., None], NOISE, 255)),
    "LA": (np.dstack([NOISE[..., 0], ALPHA]), None, np.where(ALPHA, NOISE[..., 0], 255)[..., None].repeat(3, 2)),
    "P": (PALETTE, 2, COLOURS[NOISE[..., 0] % 4]),
    "RGB": (COLOURS[NOISE[..., 0] % 4], (40, 50, 60), COLOURS[[0, 2, 2, 3]][NOISE[..., 0] % 4]),
    "partial": (np.dstack([NOISE, np.full_like(ALPHA, 64)]), None, (NOISE * 64.0 + 255.0 * (255 - 64)) / 255)}


@pytest.mark.parametrize("kind", ON_WHITE)
def test_transparency_lies_on_white(tmp_path, kind):
    image, transparent, wanted = ON_WHITE[kind]
    image = image if kind == "P" else Image.fromarray(image)
    image.save(tmp_path / "a.png", **{} if transparent is None else {"transparency": transparent})
    pixels, notes = decode(tmp_path / "a.png")
    assert np.abs(pixels - wanted.astype(float)).max() <= (kind == "partial") and notes == [pictures.ON_WHITE]


DEEP = np.asarray(RAMP * 257 + np.where(RAMP % 2, 128, -128).clip(-RAMP, None), np.uint16)  # up to half a step off
WRITERS = {
    "png 16": lambda path: Image.fromarray(DEEP).save(path, "PNG"),
    "pgm 16": lambda path: path.write_bytes(b"P5 12 12 65535\n" + DEEP.astype(">u2").tobytes()),
    "tiff 16": lambda path: tiff(path, DEEP, 16, 1),
    "tiff 32": lambda path: tiff(path, ((RAMP + 112) * 16843009).astype(np.uint32), 32, 1),  # up to the largest value
    "tiff float": lambda path: tiff(path, (RAMP / 255).astype(np.float32), 32, 3)}


@pytest.mark.parametrize("kind", WRITERS)
def test_more_than_8_bits_are_scaled_by_the_range_of_their_type(tmp_path, kind):
    WRITERS[kind](tmp_path / "a")
    pixels, notes = decode(tmp_path / "a")
    wanted = (RAMP + 112 * (kind == "tiff 32")).astype(np.uint8)
    assert np.array_equal(pixels, wanted[..., None].repeat(3, 2)) and notes == [pictures.SCALED]


@pytest.mark.parametrize("values, bits, kind", [
    (RAMP.astype(np.int16) - 5, 16, 2), (RAMP.astype(np.int32) - 5, 32, 2), (RAMP.astype(np.float32) / 100, 32, 3),
    (np.full((12, 12), np.nan, np.float32), 32, 3)])
def test_values_without_a_range_are_refused(tmp_path, values, bits, kind):
    tiff(tmp_path / "a.tif", values, bits, kind)
    assert " outside of " in reason(tmp_path / "a.tif")


def test_colour_spaces(tmp_path):
    cmyk = np.dstack([NOISE, NOISE[::-1, :, 0]])
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "cmyk.tif")
    wanted = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    assert np.abs(decode(tmp_path / "cmyk.tif")[0] - wanted).max() <= 1
    lab = np.zeros((12, 12, 3), np.uint8)
    lab[:4] = 255, 128, 128  # white, black, and red: L 53, a 80, b 67
    lab[4:8] = 0, 128, 128
    lab[8:] = 136, 208, 195
    signed = np.where([False, True, True], lab ^ 128, lab).astype(np.uint8)  # a and b in Pillow's memory
    Image.frombytes("LAB", (12, 12), signed.tobytes()).save(tmp_path / "lab.tif")
    pixels = decode(tmp_path / "lab.tif")[0].astype(int)
    assert pixels[:4].min() >= 253 and pixels[4:8].max() <= 2
    assert np.abs(pixels[8:] - [255, 0, 0]).max() < 16
    Image.fromarray(NOISE[..., 0] > 127).save(tmp_path / "bits.png")
    assert np.array_equal(decode(tmp_path / "bits.png")[0][..., 1], np.where(NOISE[..., 0] > 127, 255, 0))
    Image.fromarray(NOISE[..., 0] // 16, "L").convert("P").save(tmp_path / "palette.gif")
    assert np.array_equal(decode(tmp_path / "palette.gif")[0][..., 2], NOISE[..., 0] // 16)


@pytest.mark.parametrize("suffix", ["gif", "tif", "png"])
def test_the_first_of_several_frames(tmp_path, suffix):
    frames = [Image.fromarray(NOISE[..., 0] % 2 * value) for value in (60, 200)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    pixels, notes = decode(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels[..., 0], NOISE[..., 0] % 2 * 60) and notes == [pictures.FIRST_FRAME]


def test_the_formats_are_those_whose_pixels_pillow_reads():
    assert {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"} <= pictures.suffixes(), "torchvision's"
    assert {".gif", ".jfif", ".jp2", ".tga", ".ico", ".mpo"} <= pictures.suffixes()
    assert (".avif" in pictures.suffixes()) == features.check("avif")
    assert not {".pdf", ".eps", ".ps", ".mpg", ".wmf", ".txt", ".csv", ""} & pictures.suffixes()


def test_postscript_is_not_handed_to_ghostscript(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # would be called with a file
    Image.fromarray(NOISE).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    assert reason(tmp_path / "a.jpg") == "not an image, or its header is damaged"


def saved(**options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).resize((48, 48)).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [
    {"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}, {"format": "BMP"}, {"format": "PPM"},
    {"format": "GIF"}, {"format": "WEBP"}, {"format": "TIFF"}, {"format": "TIFF", "compression": "jpeg"}, {"format": "JPEG2000"}],
    ids=lambda options: "-".join(map(str, options.values())))
def test_a_file_without_its_last_rows_is_unreadable(tmp_path, capfd, options):
    """Nor do the libraries behind Pillow write to stderr."""
    content, path = saved(**options), tmp_path / "a.jpg"
    for keep in (len(content) // 2, len(content) - len(content) // 10, len(content) - 30):
        path.write_bytes(content[:keep])
        pixels, why = pictures.read(str(path), 48)
        assert pixels is None and why, f"{keep} of {len(content)} bytes"
    assert capfd.readouterr().err == ""


def test_reasons(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert reason(path) == "empty file"
    path.write_text("text")
    assert reason(path) == "not an image, or its header is damaged"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert reason(path) == "HEIC: convert it to JPEG"
    assert reason(tmp_path / "nothing.png") == "No such file or directory"
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + bytes(4) + b"IDAT")
    assert reason(path) == "more than 179 megapixels" and pictures.read(str(path), 32) == (None, reason(path))
