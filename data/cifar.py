"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009); names, addresses and checksums of the files are torchvision's."""
import hashlib
import io
import os
import pickle
import tarfile
import tempfile
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5, download_url

from data.split import Source, Split
from rundir.errors import DATA, DISK, Failure


def cifar10(data_dir: Path, image_size) -> Source:
    train, test, meta = read_cifar(CIFAR10, data_dir)
    return Source(cifar_split(train, "labels"), cifar_split(test, "labels"), meta["label_names"],
                  mean_and_std=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), val_size=5000)


def cifar100(data_dir: Path, image_size) -> Source:
    train, test, meta = read_cifar(CIFAR100, data_dir)
    return Source(cifar_split(train, "fine_labels"), cifar_split(test, "fine_labels"), meta["fine_label_names"],
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
