"""Say what is on images, with a trained network or an exported file: a line per image, CSV, a contact sheet.

    python predict.py runs/v2-s42/best.pt photo.jpg                       the five likeliest classes
    python predict.py runs/v2-s42/export/best-int8.onnx photos --csv      every image below a folder; needs no torch
    find photos -newer last | python predict.py MODEL - --top 1 --output sheet.png

A best.pt and an .onnx file are data; a .pt2 or .pte file is a program: open only your own, or of someone you trust.
Images are cropped and shrunk as for training.  One that cannot be read is named on stderr and left out; the exit code is then 4.
"""
import csv
import sys

from deploy.options import parse_predict
from rundir import errors

BATCH, SHEET = 64, 96


def batches(paths, image_size: int, unreadable: list):
    """(paths, images uint8 (N, side, side, 3)) of neighbours of one size; paths that cannot be read are added to `unreadable`."""
    import numpy as np

    from data import pictures
    batch = []
    for path in paths:
        image = pictures.read(path, image_size)
        if image is None:
            print(f"left out: {path} is no 8-bit image that can be read", file=sys.stderr)
            unreadable.append(path)
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
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # names of files may be any bytes
    model, unreadable, shown, count = runtime.load(args.model), [], [], 0
    classes = model.card["classes"]
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        table.writerow(["path", "rank", "class", "probability"])
    for paths, images in batches(pictures.named_by(args.images), model.card["image_size"], unreadable):
        for path, image, row in zip(paths, images, model(images)[0]):
            best = [(classes[index], row[index]) for index in row.argsort()[::-1][:args.top]]
            if args.csv:
                table.writerows([path, rank, name, f"{share:.6f}"] for rank, (name, share) in enumerate(best, 1))
            else:
                print(path, *(f"{name} {100 * share:.2f} %" for name, share in best), sep="  ")
            if len(shown) < SHEET:
                shown.append((image, f"{best[0][0]} {100 * best[0][1]:.0f} %\n{path[-24:]}", ""))
        count += len(paths)
    if args.output and shown:
        write_atomic(args.output, pictures.contact_sheet(shown, height=1.25))
        print(f"{args.output}: {len(shown)} of {count} images", file=sys.stderr)
    if unreadable or not count:
        counts = f"{len(unreadable)} of {len(unreadable) + count} images could not be read"
        raise errors.Failure(errors.DATA, f"{counts} ({args.images})", "replace those named above, or check the path")


if __name__ == "__main__":
    errors.run(main, parse_predict(*__doc__.split("\n\n", 1)))
