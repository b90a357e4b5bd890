"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from torchvision's files, the binary version, or the Parquet files of Hugging Face.

Names, addresses and checksums are torchvision's.
"""
import hashlib
import io
import json
import os
import pickle
import tarfile
import tempfile
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5, download_url

from data.pictures import suffixes
from data.split import Source, Split
from rundir.errors import DATA, DISK, USAGE, Failure, optional

BINARY = {  # data set: folder, label bytes before an image (the last counts), training files, test file, names of the classes
    "cifar10": ("cifar-10-batches-bin", 1, [f"data_batch_{k}.bin" for k in range(1, 6)], "test_batch.bin", "batches.meta.txt"),
    "cifar100": ("cifar-100-binary", 2, ["train.bin"], "test.bin", "fine_label_names.txt"),
}
LABEL = {"cifar10": "label", "cifar100": "fine_label"}  # column of the Parquet files; with an s, key of the pickles
PIXELS = 3 * 32 * 32


def cifar(name: str, files, mean_and_std, data_dir: Path) -> Source:
    """The data set of torchvision's class `files`: from its folder, its archive, other files, else downloaded."""
    folder = data_dir / files.base_folder
    if not folder.is_dir() and not (data_dir / files.filename).exists() and (found := find(name, data_dir)):
        return Source(*found, mean_and_std, val_size=5000)
    if not folder.is_dir():
        unpack(files, data_dir)
    classes = read_pickle(folder / files.meta["filename"], files.meta["md5"])[files.meta["key"]]
    train, test = (read_split(name, folder, batches, classes) for batches in (files.train_list, files.test_list))
    return Source(train, test, classes, mean_and_std, val_size=5000)


cifar10 = partial(cifar, "cifar10", CIFAR10, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
cifar100 = partial(cifar, "cifar100", CIFAR100, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)))


def unpack(files, data_dir: Path) -> None:
    """Unpack the archive; download it first if it is missing.

    Both are written to a temporary folder and moved when complete, so an interruption or a concurrent process leaves no partial
    files.  Failure USAGE: --data-dir names images of one's own.
    """
    archive, folder = data_dir / files.filename, data_dir / files.base_folder
    if not archive.exists() and has_images(data_dir):
        raise Failure(USAGE, f"there are other images, and no {files.filename} (--data-dir {data_dir})",
                      "add --dataset imagefolder, or name another folder for the download")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fusekd-", dir=data_dir) as temporary:
            if not archive.exists():
                download(files, data_dir, temporary)
                os.replace(Path(temporary, files.filename), archive)
            if calculate_md5(archive) != files.tgz_md5:
                raise Failure(DATA, f"damaged file ({archive}: wrong md5)", "delete it, and the next run downloads it again")
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            try:
                os.rename(Path(temporary, files.base_folder), folder)
            except OSError:
                if not folder.is_dir():  # not created by another process meanwhile
                    raise
    except OSError as failure:
        raise Failure(DISK, f"cannot unpack {files.filename} ({failure.filename or data_dir}: {failure.strerror})",
                      "free space there, check its permissions, or name another --data-dir") from failure


def has_images(data_dir: Path) -> bool:
    """Whether it is a folder of images by class, or a CSV file of them."""
    return data_dir.is_file() or any(path.suffix.lower() in suffixes()
                                     for places in ("*/*", "train/*/*") for path in data_dir.glob(places))


def download(files, data_dir: Path, temporary: str) -> None:
    try:
        download_url(files.url, temporary, files.filename, files.tgz_md5)
    except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as failure:  # RuntimeError: wrong md5
        raise Failure(DATA, f"cannot download {files.filename}, which is not in {data_dir} ({files.url}: {failure})",
                      f"put it into {data_dir}, or use --dataset synthetic, or imagefolder for your own images") from failure


def read_split(name: str, folder: Path, names_and_md5, classes: list[str]) -> Split:
    batches = [read_pickle(folder / file, md5) for file, md5 in names_and_md5]
    labels = [label for batch in batches for label in batch[f"{LABEL[name]}s"]]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return split(images, labels, classes, folder)


def read_pickle(path: Path, md5: str) -> dict:
    remedy = f"delete {path.parent}, and the next run unpacks or downloads it again"
    if not path.is_file():
        raise Failure(DATA, f"missing file ({path})", remedy)
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise Failure(DATA, f"damaged file ({path}: wrong md5)", remedy)
    try:
        return ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()  # latin1 keeps the bytes of Python 2
    except pickle.UnpicklingError as failure:
        raise Failure(DATA, f"refused file ({path}: {failure})", remedy) from failure


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays and plain values; any other global is refused before its import."""
    reconstruct = np.empty(0).__reduce__()[0]  # its module was renamed after the files were written
    allowed = {("numpy.core.multiarray", "_reconstruct"): reconstruct, ("numpy._core.multiarray", "_reconstruct"): reconstruct,
               ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, not only arrays")
        return self.allowed[module, name]


def find(name: str, data_dir: Path) -> tuple[Split, Split, list[str]] | None:
    """The training and test images and the classes of `name` from such files in `data_dir`; None if there are none."""
    if (data_dir / BINARY[name][0]).is_dir():
        return read_binary(name, data_dir / BINARY[name][0])
    files = [path for pattern in ("*", "*/*", "*/*/*") for path in sorted(data_dir.glob(f"{pattern}.parquet"))]
    return read_parquet(name, files) if files else None


def read_binary(name: str, folder: Path) -> tuple[Split, Split, list[str]]:
    """Records of label bytes and a 3x32x32 image, red plane first."""
    _, labels, train, test, names = BINARY[name]

    def read(files):
        parts = []
        for path in (folder / file for file in files):
            content = np.fromfile(path, np.uint8)
            if len(content) == 0 or len(content) % (labels + PIXELS):
                raise Failure(DATA, f"damaged file ({path}: {len(content)} bytes)", "download it again")
            parts.append(content.reshape(-1, labels + PIXELS))
        records = np.concatenate(parts)
        return split(records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, labels - 1], classes, folder)

    classes = (folder / names).read_text().split()
    return read(train), read([test]), classes


def read_parquet(name: str, files: list[Path]) -> tuple[Split, Split, list[str]] | None:
    """Columns `img`, with the bytes of an image file, and `label` or `fine_label`; class names are in the schema."""
    parquet = optional("pyarrow.parquet", f"reads Parquet files ({files[0]})")
    fitting: list[Path] = []
    try:
        fitting = [path for path in files if {"img", LABEL[name]} <= set(parquet.read_schema(path).names)]
        parts = {kind: [path for path in fitting if path.name.startswith(kind)] for kind in ("train", "test")}
        if not (parts["train"] and parts["test"]):
            return None
        features = json.loads(parquet.read_schema(fitting[0]).metadata[b"huggingface"])["info"]["features"]
        classes = list(features[LABEL[name]]["names"])

        def read(paths):
            tables = [parquet.read_table(path, columns=["img", LABEL[name]]).to_pydict() for path in paths]
            images = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
                               for table in tables for image in table["img"]])
            return split(images, [label for table in tables for label in table[LABEL[name]]], classes, paths[0])

        return read(parts["train"]), read(parts["test"]), classes
    except Failure:
        raise
    except Exception as failure:  # pyarrow and Pillow raise many types on damaged files
        raise Failure(DATA, f"damaged or foreign Parquet file ({fitting[0] if fitting else files[0]}: {failure})",
                      "download it again") from failure


def split(images: np.ndarray, labels, classes: list[str], where: Path) -> Split:
    labels = torch.as_tensor(np.asarray(labels, np.int64))
    if images.shape[1:] != (32, 32, 3) or not 0 <= labels.min() <= labels.max() < len(classes):
        raise Failure(DATA, f"images of {images.shape[1:]} or labels up to {labels.max()} of {len(classes)} classes ({where})",
                      "download the files again")
    return Split(torch.from_numpy(np.ascontiguousarray(images)), labels)
