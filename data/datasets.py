"""Data sets as uint8 tensors on the device: training, validation and test images, their labels, the names of the classes.

Images are decoded once and stay as they are, (N, H, W, 3); augmentation and normalisation happen on the device, batch by batch.
To add a data set: one function that returns a `Source`, a line in `DATASETS`, its name in cli/options.py.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from data.cifar import cifar10, cifar100
from data.imagefolder import imagefolder
from data.split import Source, Split
from data.synthetic import CLASSES, generate
from rundir.errors import DATA, OUT_OF_MEMORY, USAGE, Failure

SMALLEST = 8  # pixels: of the images that BatchAugmenter takes
TEST_SEED = 0  # draws the test set of a folder that has none: the same for every --seed
SYNTHETIC_SEEDS = (1, 2)  # of the training and the test images, the same for every --seed


@dataclass(frozen=True)
class Dataset:
    """What a training script needs to know of its data.

    mean, std: per channel, of images scaled to [0, 1]. selected_on: which images `val` holds, in words for summary.json.
    fingerprint: of all images and labels before they were split, for a run that is resumed.
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


def load(name, data_dir, *, val_size=None, seed=42, image_size=None, device="cpu") -> Dataset:
    """Read the data set `name`, split it, and move it to `device`.

    data_dir: where the files are, and where CIFAR is downloaded to if they are not.
    val_size: how many training images, drawn by `seed` and stratified, become the validation split; None is 5000 for CIFAR
    and a tenth elsewhere; 0 validates on the test set. An image folder without a test set first gives up a tenth of its
    images as one, the same for every seed and `val_size`.
    image_size: the square to which images are resized and cropped, unless all share one square size that is no larger: networks
    enlarge such images themselves.
    Raises Failure: DATA for anything wrong with the files, USAGE for a wrong size, DISK or OUT_OF_MEMORY where room is short.
    """
    try:
        source = DATASETS[name](Path(data_dir), image_size)
    except OSError as failure:
        raise Failure(DATA, f"cannot read ({failure.filename}: {failure.strerror})", "check its permissions") from failure
    if (side := source.train.images.shape[1]) < SMALLEST:
        raise Failure(USAGE, f"images of {side}x{side} are too small to be augmented ({data_dir})",
                      f"give it some of at least {SMALLEST}x{SMALLEST}")
    train, test, mark = source.train, source.test, fingerprint(source)
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
    return Dataset(name, train, val, test, source.classes, mean, std, selected_on, mark)


def fingerprint(source: Source) -> str:
    """SHA-256 of the names of the classes, the labels and the images, in their order."""
    content = hashlib.sha256(repr(source.classes).encode())
    for split in filter(None, (source.train, source.test)):
        content.update(split.labels.numpy().data)
        content.update(split.images.numpy().data)
    return content.hexdigest()


def a_tenth(split: Split) -> int:
    return max(1, round(len(split.labels) / 10))


def divide(split: Split, count: int, seed: int, classes: list[str], what: str, remedy: str) -> tuple[Split, Split]:
    """The rest, and `count` rows drawn by `seed`: of each class its share, to within one image; both in the data set's order.

    what, remedy: of the Failure, where a class would be left without images.
    """
    sizes = torch.bincount(split.labels, minlength=len(classes))
    shares = count * sizes // len(split.labels)
    # Largest remainders get the images that rounding down left over, but never a class's last image.
    room = sizes - 1 - shares
    remainders = torch.where(room > 0, count * sizes % len(split.labels), -1)
    missing = int(count - shares.sum())
    if (room < 0).any() or missing > int((room > 0).sum()):
        smallest = int(sizes.argmin())
        raise Failure(USAGE, f"{what} leaves a class without training images ({count} of {len(split.labels)} images; "
                             f"class {classes[smallest]} has {sizes[smallest]})", remedy)
    shares[remainders.argsort(descending=True, stable=True)[:missing]] += 1

    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    order = order[split.labels[order].argsort(stable=True)]  # class by class, shuffled within each
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # within its class
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order] = place < shares.repeat_interleave(sizes)
    return split.take(~chosen), split.take(chosen)


def mean_and_std(images: torch.Tensor) -> tuple[tuple, tuple]:
    """Per channel, of `images` scaled to [0, 1]; from their histogram, which is exact and needs no copy as floats."""
    histogram = torch.zeros(3, 256, dtype=torch.int64)
    for part in images.split(1000):
        for channel in range(3):
            histogram[channel] += torch.bincount(part[..., channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    weights = histogram / histogram.sum(1, keepdim=True, dtype=torch.float64)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(1)
    std = variance.sqrt().clamp(min=1 / 255)  # a channel of one value must not divide by zero
    return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())


def nbytes(splits: list[Split]) -> int:
    """Of their tensors, each split counted once."""
    return sum(tensor.nbytes for split in {id(split): split for split in splits}.values() for tensor in split)


def upload(splits: list[Split], device: torch.device) -> list[Split]:
    if device.type == "cuda":
        needed = nbytes(splits)
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise Failure(OUT_OF_MEMORY, f"too many images for the GPU ({needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free)",
                          "use smaller images or fewer, or --device cpu")
    return [Split(split.images.to(device), split.labels.to(device)) for split in splits]


def synthetic(data_dir: Path, image_size) -> Source:
    """10,000 training and 5,000 test images of 32x32, drawn here and now; `data_dir` is not read."""
    train, test = (Split(*generate(count, seed)) for count, seed in zip((10_000, 5_000), SYNTHETIC_SEEDS))
    return Source(train, test, CLASSES)


DATASETS = {"cifar100": cifar100, "cifar10": cifar10, "imagefolder": imagefolder, "synthetic": synthetic}
