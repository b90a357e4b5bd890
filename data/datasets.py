"""Loading of data sets as uint8 tensors on the device, split into training, validation and test images.

Images are decoded once and stored as (N, H, W, 3); augmentation and normalisation run on the device, per batch.
To add a data set: one function that returns a `Source`, a line in `DATASETS`, its name in cli/options.py.
"""
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.cifar import cifar10, cifar100
from data.imagefolder import imagefolder
from data.pictures import stored_side
from data.split import Source, Split
from data.synthetic import CLASSES
from rundir.errors import DATA, OUT_OF_MEMORY, USAGE, Failure

MIN_SIDE = 8  # pixels, of BatchAugmenter
TEST_SEED = 0  # of the test set drawn from a folder without one; independent of --seed


@dataclass(frozen=True)
class Dataset:
    """The splits of a data set and its metadata.

    mean, std: per channel, of images scaled to [0, 1].  selected_on: description of `val` for summary.json.
    fingerprint: SHA-256 of all classes, labels and images before the split; checked when a run is resumed.
    notes: lines for the user.  unreadable: path and reason of each file that was skipped.
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
    notes: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def image_size(self) -> int:
        return self.train.stored.shape[1]

    def __str__(self) -> str:
        sizes = [len(split.labels) for split in (self.train, self.val, self.test)]
        summary = (f"{self.name}: {sizes[0]} training, {sizes[1]} validation and {sizes[2]} test images of "
                   f"{self.image_size}x{self.image_size}, {len(self.classes)} classes; best epoch by the {self.selected_on}")
        shown = self.classes if len(self.classes) <= 20 else [*self.classes[:10], "...", *self.classes[-3:]]
        return "\n".join([summary, f"classes in order: {', '.join(shown)}", *self.notes])


def load(name, data_dir, *, val_size=None, seed=42, image_size=None, crop="pad", device="cpu", unreadable="stop",
         allow_empty_classes=False) -> Dataset:
    """Read the data set `name`, split it, and move it to `device`.

    data_dir: folder of the files; CIFAR is downloaded to it if missing.
    val_size: number of training images in the stratified validation split drawn by `seed`; None: 5000 for CIFAR, else a tenth;
    0: validate on the test set.  A tenth of an image folder without a test set becomes one, the same for every seed; a folder
    with images for validation needs no such split, and val_size takes precedence over them.  Images that are added to a folder
    later hardly change these splits.
    image_size: side of the square to which images are resized and cropped, unless all share a square size that is no larger:
    networks upsample such images on the device.  crop: of the augmentation; with "resized" that side is stored_side(image_size).
    unreadable, allow_empty_classes: of data.imagefolder.
    Failure: DATA for unreadable files, USAGE for a wrong size, DISK or OUT_OF_MEMORY for insufficient space.
    """
    try:
        if name == "imagefolder":
            source = imagefolder(Path(data_dir), stored_side(image_size, crop), unreadable, allow_empty_classes)
        else:
            source = DATASETS[name](Path(data_dir))
    except OSError as failure:
        raise Failure(DATA, f"cannot read ({failure.filename}: {failure.strerror})",
                      "check the path and its permissions") from failure
    if (side := source.train.stored.shape[1]) < MIN_SIDE:
        raise Failure(USAGE, f"images of {side}x{side} are too small to be augmented ({data_dir})",
                      f"use images of at least {MIN_SIDE}x{MIN_SIDE}")
    train, val, test, sha256, notes = source.train, source.val, source.test, fingerprint(source), list(source.notes)
    if test is None:
        train, test = divide(train, a_tenth(train), TEST_SEED, source.classes, "a test split",
                             "add images, or give the folder train and test", source.names)
    mean, std = source.mean_and_std or mean_and_std(train)
    if val is not None and val_size is not None:
        notes.append(f"{len(val.labels)} images for validation are not used, because of --val-size {val_size}")
        val = None
    elif val is None and val_size is None:
        val_size = source.val_size or a_tenth(train)
    selected_on = f"validation split of {val_size} training images"
    if val is not None:
        selected_on = f"validation folder of {len(val.labels)} images"
    elif val_size:
        train, val = divide(train, val_size, seed, source.classes, "--val-size",
                            "choose a smaller --val-size, 0 to validate on the test set, or add images", source.names)
    else:
        val, selected_on = test, "test set"
    for split, images in ({"test": test} | ({} if val is test else {"validation": val})).items():
        if not len(images.labels):
            raise Failure(DATA, f"no {split} images ({data_dir})",
                          "add some, or take their folder away: a part of the training images is used then")
        counts = images.labels.bincount(minlength=len(source.classes)).tolist()
        if missing := [name for name, count in zip(source.classes, counts) if not count]:
            notes.append(f"no {split} images of {len(missing)} of {len(counts)} classes: {', '.join(missing[:10])}"
                         + ", ..." * (len(missing) > 10))
        for other, known in {"training": train, "test": test}.items():
            if images is not known and (count := shared(images, known)):
                notes.append(f"{count} of {len(images.labels)} {split} images are also {other} images, pixel by pixel")
    uploaded = upload([train, test] if val is test else [train, test, val], torch.device(device))
    return Dataset(name, uploaded[0], uploaded[-1], uploaded[1], source.classes, mean, std, selected_on, sha256, notes,
                   source.unreadable)


def shared(images: Split, others: Split) -> int:
    step = max(1, images.stored[0].numel() // 64) if len(images.labels) else 1
    samples = [[row.tobytes() for row in split._replace(stored=split.stored.flatten(1)[:, ::step]).images.numpy()]
               for split in (images, others)]
    alike = set(samples[0]) & set(samples[1])  # candidates, which are few in most data sets
    ours, theirs = ([split.part(row).numpy().tobytes() for row, sample in enumerate(each) if sample in alike]
                    for split, each in zip((images, others), samples))
    known = set(theirs)
    return sum(row in known for row in ours)


def fingerprint(source: Source) -> str:
    content = hashlib.sha256(repr(source.classes).encode())
    if source.names:  # splits may be drawn by them
        content.update(repr(source.names).encode())
    for split in filter(None, (source.train, source.test, source.val)):
        content.update(split.labels.numpy().data)
        content.update(split.stored.numpy().data)
    return content.hexdigest()


def a_tenth(split: Split) -> int:
    return max(1, round(len(split.labels) / 10))


def divide(split: Split, count: int, seed: int, classes: list[str], cause: str, remedy: str, names=None) -> tuple[Split, Split]:
    """Stratified random split into the remainder and `count` rows, both in the order of the data set.

    cause, remedy: for the Failure USAGE if a class would be left without training images.
    names: of all images of `split.stored`; an image's place in the random order of its class then depends on its name alone.
    """
    if count >= len(split.labels):
        raise Failure(USAGE, f"{cause} of {count} leaves none of {len(split.labels)} images for training", remedy)
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

    if names is None:
        order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    else:
        own = names if split.rows is None else [names[row] for row in split.rows.tolist()]
        keys = [hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest() for name in own]
        order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    order = order[split.labels[order].argsort(stable=True)]  # class by class, shuffled within each
    index_in_class = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order] = index_in_class < shares.repeat_interleave(sizes)
    return split.take(~chosen), split.take(chosen)


def mean_and_std(split: Split) -> tuple[tuple, tuple]:
    """Mean and standard deviation per channel of the images scaled to [0, 1], from exact histograms without a float copy."""
    parts = (split.part(slice(first, first + 1000)) for first in range(0, len(split.labels), 1000))
    histogram = torch.stack([torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in part.unbind(-1)])
                             for part in parts]).sum(0)
    levels = torch.arange(256, dtype=torch.float64) / 255
    weights = histogram / histogram.sum(1, keepdim=True, dtype=torch.float64)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(1)
    std = variance.sqrt().clamp(min=1 / 255)  # avoids division by zero for a constant channel
    return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())


def upload(splits: list[Split], device: torch.device) -> list[Split]:
    """The splits on `device`; a GPU gets the images of each split, without the others."""
    if device.type == "cpu":
        return splits
    if device.type == "cuda":
        needed = sum(len(split.labels) * split.stored[0].nbytes + split.labels.nbytes for split in splits)
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise Failure(OUT_OF_MEMORY, f"too many images for the GPU ({needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free)",
                          "use smaller images or fewer, or --device cpu")
    return [Split(split.images.to(device), split.labels.to(device)) for split in splits]


def synthetic(data_dir: Path) -> Source:
    """10,000 training and 5,000 test images of 32x32; the argument is ignored."""
    from data import embedded  # takes seconds
    return Source(embedded.TRAIN, embedded.TEST, CLASSES)


DATASETS: dict[str, Callable[[Path], Source]] = {"cifar100": cifar100, "cifar10": cifar10, "synthetic": synthetic}
