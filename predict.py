"""Classify images with a trained network or an exported file; prints a line per image or CSV, draws a contact sheet.

    python predict.py runs/v2-s42/best.pt photo.jpg other.png             the five most probable classes
    python predict.py runs/v2-s42/export/best-int8.onnx photos --csv      every image in a folder; needs no torch
    find photos -newer last | python predict.py MODEL - --top 1 --output sheet.png

A best.pt and an .onnx file are data; a .pt2 or .pte file is a program: open only trusted ones.
Images are resized and cropped as for training.  Unreadable ones are listed on stderr and skipped; the exit code is then 4.
"""
import csv
import sys
from io import TextIOWrapper
from itertools import chain

from deploy.options import parse_predict
from rundir import errors

BATCH, MAX_SHEET = 64, 96  # images in a batch and on the contact sheet


def batches(sources: list[str], stored_size: int, unreadable: dict):
    """(paths, images uint8 (N, side, side, 3)) of consecutive images of one size; `unreadable` gets path and reason of others."""
    import numpy as np

    from data import pictures
    batch = []
    for path in chain.from_iterable(map(pictures.image_paths, sources)):
        image, reason = pictures.read(path, stored_size)
        if reason:
            unreadable[path] = reason
            if [path] != sources:
                print(f"skipped: {path} ({reason})", file=sys.stderr)
        else:
            if batch and (len(batch) == BATCH or batch[0][1].shape != image.shape):
                yield [path for path, _ in batch], np.stack([image for _, image in batch])
                batch = []
            batch.append((path, image))
    if batch:
        yield [path for path, _ in batch], np.stack([image for _, image in batch])


def main(args):
    from data import pictures
    from deploy import runtime
    from rundir.files import write_atomic
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # file names as the bytes that they are
    model, unreadable, cells, count = runtime.load(args.model), {}, [], 0
    classes = model.metadata["classes"]
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        table.writerow(["path", "rank", "class", "probability"])
    stored_size = model.metadata.get("stored_size", model.metadata["image_size"])  # older files have none
    for paths, images in batches(args.images, stored_size, unreadable):
        for path, image, row in zip(paths, images, model(images)[0]):
            best = [(classes[index], row[index]) for index in row.argsort()[::-1][:args.top]]
            if args.csv:
                table.writerows([path, rank, name, f"{probability:.6f}"] for rank, (name, probability) in enumerate(best, 1))
            else:
                print(path, *(f"{name} {100 * probability:.2f} %" for name, probability in best), sep="  ")
            if len(cells) < MAX_SHEET:
                cells.append((image, f"{best[0][0]} {100 * best[0][1]:.0f} %\n{path[-24:]}", ""))
        count += len(paths)
    if args.output and cells:
        write_atomic(args.output, pictures.contact_sheet(cells, height=1.25))
        print(f"{args.output}: {len(cells)} of {count} images", file=sys.stderr)
    if unreadable or not count:
        counts = f"{len(unreadable)} of {len(unreadable) + count} images could not be read" if unreadable else "no images"
        named, reason = " ".join(args.images), f": {next(iter(unreadable.values()))}" if [*unreadable] == args.images else ""
        raise errors.Failure(errors.DATA, f"{counts} ({named}{reason})", "replace unreadable files, or check the path")


if __name__ == "__main__":
    errors.run(main, parse_predict(*__doc__.split("\n\n", 1)))
