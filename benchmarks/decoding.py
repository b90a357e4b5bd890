"""Milliseconds to decode a large JPEG to 256 pixels: whole and then resized, as ours does it, and by torchvision.io.

    python -m benchmarks.decoding             12 and 3 megapixels -> benchmarks/results/decoding-cpu.csv
    python -m benchmarks.decoding --quick     one photograph of 3 megapixels, few repeats

The photographs are made: noise of all scales, disks, and sensor noise, of quality 90 with 4:2:0 chroma.  One thread.  Contenders
are interleaved; times_first is the time over that of the whole image in the same repeat.  difference: mean absolute difference of
the pixels from those of the whole image, in levels of 255.
"""
import tempfile
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.v2 import functional as v2

from benchmarks import table
from benchmarks.clocks import interleaved, wall_us
from data import pictures
from rundir import errors

SIDE = 256
SIZES = ((2000, 1500), (4000, 3000))


def photograph(width: int, height: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    whole = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 10):
        noise = random.normal(size=(3, 2 ** octave, 3 * 2 ** octave // 2)).astype(np.float32) * 0.57 ** octave
        planes = (Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in noise)
        whole += np.stack(list(map(np.asarray, planes)), 2)
    whole *= 70 / whole.std()
    down, along = np.ogrid[:height, :width]
    for _ in range(12):
        radius = random.integers(50, height // 4)
        inside = (down - random.integers(height)) ** 2 + (along - random.integers(width)) ** 2 < radius ** 2
        whole[inside] = 0.4 * whole[inside] + 0.6 * random.integers(-128, 128, 3)
    whole += 128 + random.normal(0, 4, whole.shape)
    return Image.fromarray(whole.clip(0, 255).astype(np.uint8))


def whole_image(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR))


def ours(path: str) -> np.ndarray:
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    pictures.decode_into(pixels, path)
    return pixels


def torchvision_io(path: str) -> np.ndarray:
    image = v2.resize(decode_jpeg(read_file(path), mode=ImageReadMode.RGB), [SIDE], antialias=True)
    return v2.center_crop(image, [SIDE, SIDE]).permute(1, 2, 0).numpy()


def main(args) -> None:
    torch.set_num_threads(1)
    device, repeats = torch.device("cpu"), table.repeats(args, 3, 15)
    found = table.Rows(args, "decoding", "cpu", "megapixels contender ms times_first difference")
    contenders = {"whole image": whole_image, "ours": ours, "torchvision.io": torchvision_io}
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES[:1 if args.quick else None]:
            paths = [str(Path(folder, f"{width}-{seed}.jpg")) for seed in range(1 if args.quick else 3)]
            for seed, path in enumerate(paths):
                photograph(width, height, seed).save(path, quality=90)
            images = {name: np.stack([decode(path) for path in paths]).astype(int) for name, decode in contenders.items()}
            calls = {name: lambda decode=decode: [decode(path) for path in paths] for name, decode in contenders.items()}
            times = interleaved(calls, lambda call: wall_us(call, 1, device), repeats)
            for name, us in times.items():
                found.add(table.Row(
                    **table.versions(device, torch, torchvision, PIL), megapixels=width * height / 1e6, contender=name,
                    repeats=repeats, **table.spread("ms", [value / 1e3 / len(paths) for value in us]),
                    **table.spread("times_first", [value / base for value, base in zip(us, times["whole image"])]),
                    difference=round(float(np.abs(images[name] - images["whole image"]).mean()), 3)))


if __name__ == "__main__":
    errors.run(main, table.parser(__doc__, "one photograph, few repeats").parse_args())
