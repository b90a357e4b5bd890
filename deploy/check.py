"""Comparison of an exported file with its checkpoint, acceptance limits, and atomic publication."""
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from cli import options
from data import datasets
from deploy import other_runtimes
from deploy.runtime import RUNTIMES, metadata_path
from rundir.errors import CHECKPOINT, DATA, DIVERGED, USAGE, Failure, Unwritable
from rundir.files import as_csv, write_atomic, write_json
from training.evaluation import has_other_images, tolerance

CALIBRATION_IMAGES = 512
AGREEMENT = 0.995  # of the predictions of an .onnx file in another runtime with those in ONNX Runtime; else one may differ
TOLERANCE = 1e-4  # on fp32 logits; relative where the largest is above 1


def data_of_run(checkpoint: Path, classes, data_dir: str | None = None) -> datasets.Dataset:
    """The data set of the run that wrote `checkpoint`, with the same split.  data_dir: its new place, if it has moved.

    Failure CHECKPOINT: no config.json beside the checkpoint; USAGE: classes other than `classes`; and those of datasets.load.
    """
    path = Path(checkpoint).parent / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        flags = options.data(SimpleNamespace(**config))
    except (OSError, ValueError, TypeError, AttributeError) as failure:
        raise Failure(CHECKPOINT, f"the data set of the checkpoint is unknown ({path}: {failure})",
                      "name the best.pt in its run directory") from failure
    data = datasets.load(**flags | ({"data_dir": data_dir} if data_dir else {}))
    if list(data.classes) != list(classes):
        where = f"{flags['name']} in {data_dir or flags['data_dir']}"
        raise Failure(USAGE, f"the classes of the data differ from the checkpoint's ({where})",
                      "set --data-dir to its training data")
    return data


def calibration(data: datasets.Dataset) -> torch.Tensor:
    """Evenly spaced validation images, uint8 (N, H, W, 3); training images if validation used the test set."""
    split = data.train if data.val is data.test else data.val
    return split.part(torch.linspace(0, len(split.labels) - 1, min(CALIBRATION_IMAGES, len(split.labels))).round().long())


def compare(path: Path, checkpoint: Path, metadata: dict, exported, expected, labels, other=None, own=None) -> SimpleNamespace:
    """A row of export.csv: an exported file in a runtime and its checkpoint in PyTorch, on the test set.

    exported, expected: test logits of the file and of its checkpoint, float32 (N, C) arrays.  labels: int64 (N,).
    other: the one of other_runtimes.RUNTIMES that gave `exported`; then own: the logits in ONNX Runtime.
    Accuracies are in percent, drop in percentage points; largest_difference is that of a logit between the two.
    same_in_onnxruntime: equal predictions of the same file in ONNX Runtime, for another runtime.
    """
    predicted, reference = exported.argmax(1), expected.argmax(1)
    accuracy, checkpoint_accuracy = (100 * float(np.mean(each == labels)) for each in (predicted, reference))
    return SimpleNamespace(
        file=path.name, format=metadata["format"], precision=metadata["precision"], input=metadata["input"],
        runtime=other_runtimes.version(other) if other else other_runtimes.version_of(RUNTIMES[path.suffix][0][-1]),
        bytes=path.stat().st_size, checkpoint_bytes=checkpoint.stat().st_size, images=len(labels),
        same_predictions=int(np.sum(predicted == reference)),
        same_in_onnxruntime=int(np.sum(predicted == own.argmax(1))) if other else None,
        accuracy=round(accuracy, 4), checkpoint_accuracy=round(checkpoint_accuracy, 4),
        drop=round(checkpoint_accuracy - accuracy, 4),
        largest_difference=float(np.abs(exported - expected).max()), largest_logit=float(np.abs(expected).max()))


def described(row) -> str:
    """A row in words."""
    if row.same_in_onnxruntime is not None:
        return (f"{row.file} in {row.runtime}: {row.same_in_onnxruntime} of {row.images} predictions as in ONNX Runtime, "
                f"accuracy {row.accuracy:.2f} %")
    return (f"{row.file}: {row.bytes / 1e6:.3f} MB; compared with the checkpoint: {row.same_predictions} of {row.images} "
            f"predictions equal, accuracy {row.accuracy:.2f} % and {row.checkpoint_accuracy:.2f} % "
            f"(drop {row.drop:.2f}), logits within {row.largest_difference:.1e}")


def stated_accuracy(info: dict, data: datasets.Dataset) -> float | None:
    """The accuracy in the metadata of a checkpoint, if it is of these images; else None, and a line says so."""
    stated = info["test_acc1"]
    if stated is None or not has_other_images(info, data):
        return stated
    print(f"other images than the run's, or an older run: its accuracy of {stated:.2f} % is not compared")
    return None


def judge(row, max_drop: float, stated: float | None, amp: str) -> None:
    """Failure DIVERGED for an exported file beyond the limits; USAGE if the checkpoint's accuracy is not reproduced.

    stated: accuracy in the metadata of the checkpoint, measured in the precision `amp`.
    """
    if stated is not None and abs(row.checkpoint_accuracy - stated) > tolerance(row.images, "off", amp):
        raise Failure(USAGE, f"test accuracy does not match the checkpoint ({row.checkpoint_accuracy:.2f} % instead of "
                      f"{stated:.2f} %)", "nothing was written; its images must be those of the run, at --data-dir")
    if row.precision == "fp32" and not row.largest_difference <= TOLERANCE * max(1, row.largest_logit):  # also refuses NaN
        raise Failure(DIVERGED, f"the exported file has different logits ({row.file}: by up to {row.largest_difference:.1e})",
                      "nothing was written; choose another --format")
    if not row.drop <= max_drop:
        raise Failure(DIVERGED, f"the exported file is less accurate than --max-drop {max_drop:g} allows ({row.file}: "
                      f"{row.accuracy:.2f} % instead of {row.checkpoint_accuracy:.2f} %)",
                      "nothing was written; raise --max-drop, or choose another --precision")


def judge_other(row, other: str) -> None:
    """Failure DIVERGED for an .onnx file that another runtime computes otherwise than ONNX Runtime."""
    if row.same_in_onnxruntime < min(AGREEMENT * row.images, row.images - 1):
        counts = f"{row.same_in_onnxruntime} of {row.images} as in ONNX Runtime"
        raise Failure(DIVERGED, f"the exported file has other predictions in {row.runtime} ({row.file}: {counts})",
                      f"nothing was written; leave {other} out of --check")


def publish(path: Path, metadata: dict, new: list, directory: Path) -> Path:
    """Write the exported file, its metadata and the updated export.csv to `directory`, each atomically.

    new: rows of `compare`.  The file is first, so that the metadata never describes an older file.  A failure leaves no new file.
    Failure DATA: export.csv is not of this project.  Raises Unwritable.
    """
    published, table, columns = directory / path.name, directory / "export.csv", list(vars(new[0]))
    rows = [row for row in table_rows(table, columns) if row["file"] != path.name]
    outputs = (published, metadata_path(published), table)
    added = [output for output in outputs if not output.exists()]
    try:
        write_atomic(published, path.read_bytes())
        write_json(metadata_path(published), metadata)
        write_atomic(table, as_csv(columns, [*rows, *map(vars, new)]))
    except OSError:
        for output in added:
            output.unlink(missing_ok=True)
        raise
    return published


def table_rows(path: Path, columns: list[str]) -> list[dict]:
    """The rows of an export.csv; none if it is missing."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
            if rows and not {"file"} <= set().union(*rows) <= set(columns):
                raise ValueError("other columns")
    except FileNotFoundError:
        return []
    except NotADirectoryError as failure:
        raise Unwritable(failure.errno, failure.strerror, str(path)) from failure
    except (OSError, ValueError, csv.Error) as failure:
        raise Failure(DATA, f"unreadable table ({path}: {failure})", "nothing was written; move it away") from failure
    return rows
