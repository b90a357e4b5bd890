"""Data sets as uint8 tensors on the device: training, validation and test images, their labels, the names of the classes.

Images are decoded once and stay as they are, (N, H, W, 3); augmentation and normalisation happen on the device, batch by batch.
To add a data set: one function that returns a `Source`, one line in `DATASETS`.
"""
import hashlib
import io
import os
import pickle
import sys
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import is_image_file
from torchvision.datasets.utils import calculate_md5, download_url

from training.runlog import DATA, DISK, OUT_OF_MEMORY, USAGE, Failure, write_atomic
from training.synthetic import CLASSES, SIBLINGS, SUPERCLASSES, generate

TEST_SEED = 0  # draws the test set of a folder that has none: the same for every --seed
SYNTHETIC_SEEDS = (1, 2)  # of the training and the test images, the same for every --seed
THUMBNAIL = 128  # pixels; larger images gain from threads, smaller ones lose
DECODER = b"1"  # another number makes every cache outdated: for a `decode` that gives other pixels


class Split(NamedTuple):
    """Images uint8 (N, H, W, 3), contiguous, and their labels int64 (N,)."""
    images: torch.Tensor
    labels: torch.Tensor

    def take(self, chosen: torch.Tensor) -> "Split":
        """The rows where `chosen`, bool (N,), in the order that they have."""
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Dataset:
    """What a training script needs to know of its data.

    superclasses: the index into superclass_names of every class, where the data set has superclasses.
    mean, std: per channel, of images scaled to [0, 1]. selected_on: which images `val` holds, in words for summary.json.
    """
    name: str
    train: Split
    val: Split
    test: Split
    classes: list[str]
    superclasses: list[int] | None
    superclass_names: list[str] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    selected_on: str

    @property
    def image_size(self) -> int:
        """Height and width of the stored images, in pixels."""
        return self.train.images.shape[1]

    def __str__(self) -> str:
        sizes = [len(split.labels) for split in (self.train, self.val, self.test)]
        return (f"{self.name}: {sizes[0]} training, {sizes[1]} validation and {sizes[2]} test images of "
                f"{self.image_size}x{self.image_size}, {len(self.classes)} classes; best epoch by the {self.selected_on}")


@dataclass(frozen=True)
class Source:
    """A data set as it is found: no validation split yet. Fields that are None are derived by `load`."""
    train: Split
    test: Split | None
    classes: list[str]
    superclasses: list[int] | None = None
    superclass_names: list[str] | None = None
    mean_and_std: tuple[tuple, tuple] | None = None
    val_size: int | None = None


def load(name, data_dir, *, val_size=None, seed=42, image_size=None, device="cpu", stream=None) -> Dataset:
    """Read the data set `name`, split it, and move it to `device`.

    data_dir: where the files are, and where CIFAR is downloaded to if they are not.
    val_size: how many training images, drawn by `seed` and stratified, become the validation split; None is 5000 for CIFAR
    and a tenth elsewhere; 0 validates on the test set. An image folder without a test set first gives up a tenth of its
    images as one, the same for every seed and `val_size`.
    image_size: the square to which images are resized and cropped, unless all share one square size that is no larger: networks
    enlarge such images themselves.
    stream: where progress goes; None is stdout: stderr is for errors.
    Raises Failure: DATA for anything wrong with the files, USAGE for a wrong size, DISK or OUT_OF_MEMORY where room is short.
    """
    try:
        source = DATASETS[name](Path(data_dir), image_size, stream or sys.stdout)
    except OSError as failure:
        raise Failure(DATA, f"cannot read ({failure.filename}: {failure.strerror})", "check its permissions") from failure
    train, test = source.train, source.test
    if test is None:
        train, test = divide(train, a_tenth(train), TEST_SEED, source.classes)
    mean, std = source.mean_and_std or mean_and_std(train.images)
    if val_size is None:
        val_size = source.val_size or a_tenth(train)
    if val_size:
        train, val = divide(train, val_size, seed, source.classes)
        train, val, test = upload([train, val, test], torch.device(device))
        selected_on = f"validation split of {val_size} training images"
    else:
        train, test = upload([train, test], torch.device(device))
        val, selected_on = test, "test set"
    return Dataset(name, train, val, test, source.classes, source.superclasses, source.superclass_names, mean, std, selected_on)


def a_tenth(split: Split) -> int:
    return max(1, round(len(split.labels) / 10))


def divide(split: Split, count: int, seed: int, classes: list[str]) -> tuple[Split, Split]:
    """The rest, and `count` rows drawn by `seed`: of each class its share, to within one image; both in the data set's order."""
    sizes = torch.bincount(split.labels, minlength=len(classes))
    shares = count * sizes // len(split.labels)
    # Largest remainders get the images that rounding down left over, but never a class's last image.
    room = sizes - 1 - shares
    remainders = torch.where(room > 0, count * sizes % len(split.labels), -1)
    missing = int(count - shares.sum())
    if (room < 0).any() or missing > int((room > 0).sum()):
        smallest = int(sizes.argmin())
        raise Failure(USAGE, f"--val-size leaves a class without training images ({count} of {len(split.labels)} images; "
                             f"class {classes[smallest]} has {sizes[smallest]})",
                      "choose a smaller --val-size, 0 to validate on the test set, or add images")
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


def upload(splits: list[Split], device: torch.device) -> list[Split]:
    if device.type == "cuda":
        needed = sum(tensor.nbytes for split in splits for tensor in split)
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise Failure(OUT_OF_MEMORY, f"too many images for the GPU ({needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free)",
                          "use smaller images or fewer, or --device cpu")
    return [Split(split.images.to(device), split.labels.to(device)) for split in splits]


# --- CIFAR (Krizhevsky 2009): names, addresses and checksums of the files are torchvision's


def cifar10(data_dir: Path, image_size, stream) -> Source:
    train, test, meta = read_cifar(CIFAR10, data_dir)
    return Source(cifar_split(train, "labels"), cifar_split(test, "labels"), meta["label_names"],
                  mean_and_std=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), val_size=5000)


def cifar100(data_dir: Path, image_size, stream) -> Source:
    train, test, meta = read_cifar(CIFAR100, data_dir)
    coarse_of = dict(zip(train[0]["fine_labels"], train[0]["coarse_labels"]))
    return Source(cifar_split(train, "fine_labels"), cifar_split(test, "fine_labels"), meta["fine_label_names"],
                  [coarse_of[fine] for fine in range(len(meta["fine_label_names"]))], meta["coarse_label_names"],
                  mean_and_std=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), val_size=5000)


def cifar_split(batches: list[dict], label_key: str) -> Split:
    images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches])).view(-1, 3, 32, 32)
    labels = [label for batch in batches for label in batch[label_key]]
    return Split(images.permute(0, 2, 3, 1).contiguous(), torch.tensor(labels))


def read_cifar(files, data_dir: Path) -> tuple[list[dict], list[dict], dict]:
    """Training batches, test batches and names from the folder, else from the archive, else from the network."""
    folder = data_dir / files.base_folder
    if not folder.is_dir():
        unpack_cifar(files, data_dir)
    train = [read_pickle(folder / name, md5) for name, md5 in files.train_list]
    test = [read_pickle(folder / name, md5) for name, md5 in files.test_list]
    return train, test, read_pickle(folder / files.meta["filename"], files.meta["md5"])


def unpack_cifar(files, data_dir: Path) -> None:
    """Make the folder from the archive, which is downloaded if it is not there either.

    Both take shape in a folder of this process and are moved when they are whole: an interruption, or another process that
    does the same, leaves nothing half-made.
    """
    archive, folder = data_dir / files.filename, data_dir / files.base_folder
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fusekd-", dir=data_dir) as workplace:
            if not archive.exists():
                download(files, data_dir, workplace)
                os.replace(Path(workplace, files.filename), archive)
            if calculate_md5(archive) != files.tgz_md5:
                raise Failure(DATA, f"damaged file ({archive}: wrong md5)", "delete it, and the next run downloads it again")
            with tarfile.open(archive) as tar:
                tar.extractall(workplace, filter="data")
            try:
                os.rename(Path(workplace, files.base_folder), folder)
            except OSError:
                if not folder.is_dir():  # else another process was quicker
                    raise
    except OSError as failure:
        raise Failure(DISK, f"cannot unpack {files.filename} ({failure.filename or data_dir}: {failure.strerror})",
                      "free space there, check its permissions, or name another --data-dir") from failure


def download(files, data_dir: Path, workplace: str) -> None:
    try:
        download_url(files.url, workplace, files.filename, files.tgz_md5)
    except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as failure:  # RuntimeError: wrong md5
        raise Failure(DATA, f"cannot download {files.filename}, which is not in {data_dir} ({files.url}: {failure})",
                      f"download it elsewhere and put it into {data_dir}, or use --dataset synthetic") from failure


def read_pickle(path: Path, md5: str) -> dict:
    remedy = f"delete {path.parent}, and the next run unpacks or downloads it again"
    if not path.is_file():
        raise Failure(DATA, f"missing file ({path})", remedy)
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise Failure(DATA, f"damaged file ({path}: wrong md5)", remedy)
    try:
        return ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()  # latin1: the bytes of Python 2, unchanged
    except pickle.UnpicklingError as failure:
        raise Failure(DATA, f"refused file ({path}: {failure})", remedy) from failure


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain values; whatever else a pickle names is refused before it is imported."""
    reconstruct = np.empty(0).__reduce__()[0]  # its module has been renamed since the files were written
    admitted = {("numpy.core.multiarray", "_reconstruct"): reconstruct, ("numpy._core.multiarray", "_reconstruct"): reconstruct,
                ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}

    def find_class(self, module: str, name: str):
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, not only arrays")
        return self.admitted[module, name]


# --- image folders


class Tree(NamedTuple):
    """The class folders under `root`, sorted, with the image files in them and their labels."""
    root: Path
    classes: list[str]
    paths: list[str]
    labels: list[int]


def imagefolder(data_dir: Path, image_size, stream) -> Source:
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
    images = read_images(data_dir, trees, image_size, stream)
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


def image_files(folder) -> Iterator[str]:
    """Paths of the images in `folder` and below; hidden files and folders are left out."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from image_files(entry.path)
        elif is_image_file(entry.name):
            yield entry.path


def read_images(data_dir: Path, trees: list[Tree], image_size, stream) -> list[torch.Tensor]:
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
                print(f"the cache is damaged, so the images are decoded again ({cache})", file=stream)
            elif cache == resized or image_size is None or images[0].shape[1] <= image_size:
                return images
    images, is_native = decode(trees, image_size, stream)
    try:
        write_cache(native if is_native else resized, images)
        for outdated in data_dir.glob(".fusekd-cache-*"):
            if not outdated.name.startswith(key):
                outdated.unlink(missing_ok=True)
    except OSError as failure:
        print(f"no cache of the images is kept, they will be decoded again ({data_dir}: {failure.strerror})", file=stream)
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


def decode(trees: list[Tree], image_size, stream) -> tuple[list[torch.Tensor], bool]:
    """RGB images uint8 (N, side, side, 3) of each tree, and whether `side` is their own size rather than `image_size`."""
    paths = [path for tree in trees for path in tree.paths]
    first_with = distinct_sizes(paths, stream)
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
        decoded = progress(apply(decode_into, slots, paths), len(paths), "decoding", stream)
        try:
            failed = [path for is_read, path in zip(decoded, paths) if not is_read]
        except BaseException:  # a signal does not wait for all the others
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise unreadable(failed, len(paths))
    return images, is_native


def distinct_sizes(paths: list[str], stream) -> dict[tuple[int, int], str]:
    """Every (width, height) that occurs, with the first image that has it; from the headers, not yet the pixels."""
    first_with = {}
    for size, path in zip(progress(map(size_of, paths), len(paths), "measuring", stream), paths):
        if size:
            first_with.setdefault(size, path)
    if not first_with:
        raise unreadable(paths, len(paths))
    return first_with


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


def unreadable(paths: list[str], total: int) -> Failure:
    names = ", ".join(paths[:10]) + (", ..." if len(paths) > 10 else "")
    return Failure(DATA, f"{len(paths)} of {total} images cannot be read ({names})", "replace them by 8-bit ones or delete them")


def progress(items: Iterable, total: int, verb: str, stream) -> Iterator:
    """Pass `items` on and say how far they are: in one line on a terminal, else in a line per quarter."""
    terminal = stream.isatty()
    step, said = (1, 0) if terminal else (25, 0)
    for count, item in enumerate(items, 1):
        percent = 100 * count // total
        if percent >= said + step:
            said = percent - percent % step
            start, end = ("\r", "\n" if percent == 100 else "") if terminal else ("", "\n")
            print(f"{start}{verb} {total} images: {said}%", end=end, file=stream, flush=True)
        yield item


# --- synthetic


def synthetic(data_dir: Path, image_size, stream) -> Source:
    """10,000 training and 5,000 test images of 32x32, drawn here and now; `data_dir` is not read."""
    train, test = (Split(*generate(count, seed)) for count, seed in zip((10_000, 5_000), SYNTHETIC_SEEDS))
    return Source(train, test, CLASSES, [index // SIBLINGS for index in range(len(CLASSES))], SUPERCLASSES)


DATASETS = {"cifar100": cifar100, "cifar10": cifar10, "imagefolder": imagefolder, "synthetic": synthetic}
