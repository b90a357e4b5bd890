"""CIFAR-10 and CIFAR-100 from files other than torchvision's: the binary version, and the Parquet files of Hugging Face."""
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.split import Split
from rundir.errors import DATA, USAGE, Failure

BINARY = {  # data set: folder, label bytes before an image (the last counts), training files, test file, names of the classes
    "cifar10": ("cifar-10-batches-bin", 1, [f"data_batch_{k}.bin" for k in range(1, 6)], "test_batch.bin", "batches.meta.txt"),
    "cifar100": ("cifar-100-binary", 2, ["train.bin"], "test.bin", "fine_label_names.txt"),
}
LABEL = {"cifar10": "label", "cifar100": "fine_label"}  # column of the Parquet files
PIXELS = 3 * 32 * 32


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
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise Failure(USAGE, f"missing package pyarrow, which reads Parquet files ({files[0]})",
                      "python -m pip install pyarrow") from None
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
