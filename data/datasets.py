"""Loading of data sets as uint8 tensors on the device, split into training, validation and test images.

Images are decoded once and stored as (N, H, W, 3); augmentation and normalisation run on the device, per batch.
To add a data set: one function that returns a `Source`, a line in `DATASETS`, its name in cli/options.py.
"""
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data.cifar import cifar10, cifar100
from data.imagefolder import imagefolder
from data.pictures import stored_side
from data.split import Source, Split
from data.synthetic import CLASSES, generate
from rundir.errors import DATA, OUT_OF_MEMORY, USAGE, Failure

MIN_SIDE = 8  # pixels, of BatchAugmenter
TEST_SEED = 0  # of the test set drawn from a folder without one; independent of --seed
SYNTHETIC_SEEDS = (1, 2)  # of the training and test images; independent of --seed


@dataclass(frozen=True)
class Dataset:
    """The splits of a data set and its metadata.

    mean, std: per channel, of images scaled to [0, 1].  selected_on: description of `val` for summary.json.
    fingerprint: SHA-256 of all classes, labels and images before the split; checked when a run is resumed.
    """
    name: str
    train: Split
    val: Split
    test: Split
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    selected_on: str
    fingerprint: str

    @property
    def image_size(self) -> int:
        """Height and width of the stored images, in pixels."""
        return self.train.images.shape[1]

    def __str__(self) -> str:
        sizes = [len(split.labels) for split in (self.train, self.val, self.test)]
        return (f"{self.name}: {sizes[0]} training, {sizes[1]} validation and {sizes[2]} test images of "
                f"{self.image_size}x{self.image_size}, {len(self.classes)} classes; best epoch by the {self.selected_on}")


def load(name, data_dir, *, val_size=None, seed=42, image_size=None, crop="pad", device="cpu") -> Dataset:
    """Read the data set `name`, split it, and move it to `device`.

    data_dir: folder of the files; CIFAR is downloaded to it if missing.
    val_size: number of training images in the stratified validation split drawn by `seed`; None: 5000 for CIFAR, else a tenth;
    0: validate on the test set.  A tenth of an image folder without a test set becomes one, the same for every seed.
    image_size: side of the square to which images are resized and cropped, unless all share a square size that is no larger:
    networks upsample such images on the device.  crop: of the augmentation; with "resized" that side is stored_side(image_size).
    Failure: DATA for unreadable files, USAGE for a wrong size, DISK or OUT_OF_MEMORY for insufficient space.
    """
    try:
        source = DATASETS[name](Path(data_dir), stored_side(image_size, crop))
    except OSError as failure:
        raise Failure(DATA, f"cannot read ({failure.filename}: {failure.strerror})", "check its permissions") from failure
    if (side := source.train.images.shape[1]) < MIN_SIDE:
        raise Failure(USAGE, f"images of {side}x{side} are too small to be augmented ({data_dir})",
                      f"use images of at least {MIN_SIDE}x{MIN_SIDE}")
    train, test, sha256 = source.train, source.test, fingerprint(source)
    if test is None:
        train, test = divide(train, a_tenth(train), TEST_SEED, source.classes, "a test split",
                             "add images, or give the folder train and test")
    mean, std = source.mean_and_std or mean_and_std(train.images)
    if val_size is None:
        val_size = source.val_size or a_tenth(train)
    if val_size:
        train, val = divide(train, val_size, seed, source.classes, "--val-size",
                            "choose a smaller --val-size, 0 to validate on the test set, or add images")
        train, val, test = upload([train, val, test], torch.device(device))
        selected_on = f"validation split of {val_size} training images"
    else:
        train, test = upload([train, test], torch.device(device))
        val, selected_on = test, "test set"
    return Dataset(name, train, val, test, source.classes, mean, std, selected_on, sha256)


def fingerprint(source: Source) -> str:
    content = hashlib.sha256(repr(source.classes).encode())
    for split in filter(None, (source.train, source.test)):
        content.update(split.labels.numpy().data)
        content.update(split.images.numpy().data)
    return content.hexdigest()


def a_tenth(split: Split) -> int:
    return max(1, round(len(split.labels) / 10))


def divide(split: Split, count: int, seed: int, classes: list[str], cause: str, remedy: str) -> tuple[Split, Split]:
    """Stratified random split into the remainder and `count` rows, both in the order of the data set.

    cause, remedy: for the Failure USAGE if a class would be left without training images.
    """
    sizes = torch.bincount(split.labels, minlength=len(classes))
    shares = count * sizes // len(split.labels)
    # Largest-remainder rounding, which leaves at least one image in each class.
    spare = sizes - 1 - shares
    remainders = torch.where(spare > 0, count * sizes % len(split.labels), -1)
    missing = int(count - shares.sum())
    if (spare < 0).any() or missing > int((spare > 0).sum()):
        smallest = int(sizes.argmin())
        raise Failure(USAGE, f"{cause} leaves a class without training images ({count} of {len(split.labels)} images; "
                             f"class {classes[smallest]} has {sizes[smallest]})", remedy)
    shares[remainders.argsort(descending=True, stable=True)[:missing]] += 1

    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    order = order[split.labels[order].argsort(stable=True)]  # class by class, shuffled within each
    index_in_class = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order] = index_in_class < shares.repeat_interleave(sizes)
    return split.take(~chosen), split.take(chosen)


def mean_and_std(images: torch.Tensor) -> tuple[tuple, tuple]:
    """Mean and standard deviation per channel of `images` scaled to [0, 1], from exact histograms without a float copy."""
    histogram = torch.stack([torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in part.unbind(-1)])
                             for part in images.split(1000)]).sum(0)
    levels = torch.arange(256, dtype=torch.float64) / 255
    weights = histogram / histogram.sum(1, keepdim=True, dtype=torch.float64)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(1)
    std = variance.sqrt().clamp(min=1 / 255)  # avoids division by zero for a constant channel
    return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())


def upload(splits: list[Split], device: torch.device) -> list[Split]:
    if device.type == "cuda":
        needed = sum(tensor.nbytes for split in splits for tensor in split)
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise Failure(OUT_OF_MEMORY, f"too many images for the GPU ({needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free)",
                          "use smaller images or fewer, or --device cpu")
    return [Split(split.images.to(device), split.labels.to(device)) for split in splits]


def synthetic(data_dir: Path, image_size) -> Source:
    """10,000 training and 5,000 test images of 32x32; both arguments are ignored."""
    train, test = (Split(*generate(count, seed)) for count, seed in zip((10_000, 5_000), SYNTHETIC_SEEDS))
    return Source(train, test, CLASSES)


DATASETS: dict[str, Callable[[Path, int | None], Source]] = {
    "cifar100": cifar100, "cifar10": cifar10, "imagefolder": imagefolder, "synthetic": synthetic,
}
