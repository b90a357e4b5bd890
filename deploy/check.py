"""An exported file beside the network that it was made of: what differs, whether that is too much, and how it is put in place."""
import csv
import json
import os
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from cli import options
from data import datasets
from deploy.runtime import card_path
from rundir.errors import CHECKPOINT, DIVERGED, USAGE, Failure
from rundir.files import as_csv, make_directory, write_atomic, write_json
from training.evaluation import tolerance

CALIBRATION_IMAGES = 512
TOLERANCE = 1e-4  # on logits in fp32, relative where the largest is above 1; other predictions are then ties within twice that


@dataclass(frozen=True)
class Row:
    """A line of export.csv: a file in its own runtime against its checkpoint in PyTorch, on the test set.

    Accuracies in percent, drop in percentage points; largest_difference: of two logits, and largest_logit to compare it with.
    """
    file: str
    format: str
    precision: str
    input: str
    bytes: int
    checkpoint_bytes: int
    images: int
    same_predictions: int
    accuracy: float
    checkpoint_accuracy: float
    drop: float
    largest_difference: float
    largest_logit: float

    def __str__(self) -> str:
        return (f"{self.file}: {self.bytes / 1e6:.3f} MB; {self.same_predictions} of {self.images} predictions as the "
                f"checkpoint's, accuracy {self.accuracy:.2f} % against {self.checkpoint_accuracy:.2f} % "
                f"(drop {self.drop:.2f}), logits within {self.largest_difference:.1e}")


def data_of_run(checkpoint: Path, classes, data_dir: str | None = None) -> datasets.Dataset:
    """The data set, split as it was, of the run that `checkpoint` lies in; `data_dir`: where its files are now.

    Failure CHECKPOINT: no config.json there; USAGE: other `classes` than the checkpoint's; and those of data.datasets.load.
    """
    path = Path(checkpoint).parent / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        flags = options.data(SimpleNamespace(**config))
    except (OSError, ValueError, TypeError, AttributeError) as failure:
        raise Failure(CHECKPOINT, f"nothing says which data set the checkpoint is of ({path}: {failure})",
                      "name the best.pt in its run directory") from failure
    data = datasets.load(**flags | ({"data_dir": data_dir} if data_dir else {}))
    if list(data.classes) != list(classes):
        where = f"{flags['name']} in {data_dir or flags['data_dir']}"
        raise Failure(USAGE, f"the data has other classes than the checkpoint ({where})",
                      "name the folder that it was trained on by --data-dir")
    return data


def calibration(data: datasets.Dataset) -> torch.Tensor:
    """Validation images from all over the split, uint8 (N, H, W, 3); training images where the test set was validated on."""
    images = (data.train if data.val is data.test else data.val).images
    return images[:: max(1, len(images) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]


def compare(path: Path, checkpoint: Path, card: dict, found, expected, labels) -> Row:
    """found, expected: logits of the test images, float32 (N, C) arrays, by the file and by its checkpoint; labels int64 (N,)."""
    accuracy, reference = (100 * float(np.mean(logits.argmax(1) == labels)) for logits in (found, expected))
    return Row(path.name, card["format"], card["precision"], card["input"], path.stat().st_size, Path(checkpoint).stat().st_size,
               len(labels), int(np.sum(found.argmax(1) == expected.argmax(1))), round(accuracy, 4), round(reference, 4),
               round(reference - accuracy, 4), float(np.abs(found - expected).max()), float(np.abs(expected).max()))


def judge(row: Row, max_drop: float, stated: float | None, amp: str) -> None:
    """Failure DIVERGED for a file that does not do what its checkpoint does.

    stated: accuracy as the checkpoint says, read in the precision `amp`; Failure USAGE where it has another one on this test set.
    """
    if stated is not None and abs(row.checkpoint_accuracy - stated) > tolerance(row.images, "off", amp):
        raise Failure(USAGE, f"the checkpoint's test accuracy is not what it was ({row.checkpoint_accuracy:.2f} %, it says "
                      f"{stated:.2f} %)", "nothing was written; name the folder that it was trained on by --data-dir")
    if row.precision == "fp32" and not row.largest_difference <= TOLERANCE * max(1, row.largest_logit):  # NaN is refused, too
        raise Failure(DIVERGED, f"the exported file has other logits ({row.file}: by up to {row.largest_difference:.1e})",
                      "nothing was written; choose another --format")
    if not row.drop <= max_drop:
        raise Failure(DIVERGED, f"the exported file is less accurate than --max-drop {max_drop:g} allows ({row.file}: "
                      f"{row.accuracy:.2f} % instead of {row.checkpoint_accuracy:.2f} %)",
                      "nothing was written; raise --max-drop, or choose another --precision")


@contextmanager
def workplace(directory):
    """A folder in `directory` that is removed in the end, and so is `directory` if it was made here and nothing is left there."""
    directory = Path(directory)
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        make_directory(directory)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=directory) as folder:
            yield Path(folder)
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()


def publish(path: Path, card: dict, row: Row, directory: Path) -> Path:
    """Move the file `path`, its card and its line of export.csv into `directory`, on the same disk: each in one step, the file
    first, so that a card never describes another file than it says."""
    table, beside = path.with_name("export.csv"), card_path(path)
    write_json(beside, card)
    write_atomic(table, as_csv([field.name for field in fields(Row)], [*others(directory / table.name, row), asdict(row)]))
    for each in (path, beside, table):
        os.replace(each, directory / each.name)
    return directory / path.name


def others(table: Path, row: Row) -> list[dict]:
    """The lines of an export.csv that are about other files than that of `row`."""
    with suppress(FileNotFoundError), open(table, newline="", encoding="utf-8") as file:
        return [line for line in csv.DictReader(file) if line["file"] != row.file]
    return []
