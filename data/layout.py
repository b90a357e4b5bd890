"""Where the images of a data set are: a folder of splits or classes, or a CSV file.  Imports no torch.

    train/CLASS/*, test/CLASS/*, val/CLASS/*     val without test is the test set, as in the literature
    CLASS/*                                      one tree, from which test images are split off
    val/images/* and val/val_annotations.txt     Tiny ImageNet as unzipped: file and class, separated by tabs
    FILE.csv                                     columns path (relative to the file), label, and split if there are several

Classes are matched by name, and sorted as text, as in torchvision's ImageFolder.
"""
import csv
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data.pictures import counted, image_files, is_hidden, size_of
from rundir.errors import DATA, Failure
from rundir.terminal import live

SPLITS = {name: split for split, names in {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"),
                                           "test": ("test", "testing", "eval", "evaluation")}.items() for name in names}
IMAGES, MASKS = {"images", "image", "imgs", "img"}, {"masks", "mask", "segmentations", "segmentation", "annotations", "labels"}
ANNOTATIONS = "val_annotations.txt"
Labelled = list[tuple[str, str]]  # class and path of each image, sorted


class Layout(NamedTuple):
    """The images by split, "train" first.  root: folder of the cache.  notes: lines for the user.  lines: of a CSV, by path."""
    root: Path
    classes: list[str]
    splits: dict[str, Labelled]
    notes: list[str]
    lines: dict[str, int]


def find(data_dir: Path, allow_empty: bool) -> Layout:
    """The images below a folder or in a CSV file.  allow_empty: leave out training classes without images.

    Failure DATA: no such folder or file, or a layout that is not one of the above.
    """
    if data_dir.suffix.lower() == ".csv" and data_dir.is_file():
        splits, lines, notes = read_table(data_dir)
        return matched(data_dir.parent, splits, notes, Counter(), lines)
    if not data_dir.is_dir():
        raise Failure(DATA, f"{'a file that is no .csv' if data_dir.is_file() else 'no such folder'} ({data_dir})", "--data-dir "
                      "names a folder that holds train/CLASS/* and test/CLASS/*, or CLASS/* alone, or a .csv file with commas")
    left_out: Counter = Counter()
    folders, notes = split_folders(data_dir)
    splits, empty = {}, []
    for split, folder in folders.items():
        names = subfolders(folder)
        if split != "train" and not (folder / ANNOTATIONS).is_file() and set(names) <= IMAGES:
            notes.append(f"left out: {folder}, which has no class folders")
            continue
        splits[split], without = read_classes(folder, names, left_out)
        if split == "train":
            empty = without
    if empty and not allow_empty:
        files: Counter = Counter()
        list(image_files(folders["train"] / empty[0], files))
        has = f", only {counted(files)}" if files else ""
        raise Failure(DATA, f"{len(empty)} of {len(empty) + len(set(dict(splits['train'])))} class folders without images "
                            f"({folders['train'] / empty[0]}{has})", "add images, remove it, or use --allow-empty-classes")
    if empty:
        notes.append(f"classes without training images, left out: {', '.join(empty)}")
    return matched(data_dir, splits, notes, left_out, {})


def native_side(data_dir) -> int:
    """The longer side in pixels of the first readable image below a folder or in a CSV file; 0 without one."""
    data_dir = Path(data_dir)
    try:
        paths = (path for images in read_table(data_dir)[0].values() for _, path in images) if data_dir.is_file() else (
            image_files(data_dir, Counter()))
        return max(next(filter(None, map(size_of, paths)), (0, 0)))
    except (OSError, Failure):  # `find` names it
        return 0


def matched(root: Path, splits: dict[str, Labelled], notes: list[str], left_out: Counter, lines: dict[str, int]) -> Layout:
    classes = sorted({name for name, _ in splits["train"]})
    times = Counter(map(str.lower, classes))
    if alike := sorted((name for name in classes if times[name.lower()] > 1), key=str.lower):
        notes.append(f"class names that differ in case alone: {', '.join(alike)}")
    if left_out:
        notes.append(f"left out: {counted(left_out)}")
    if len(classes) < 2:
        found = "; ".join([f"1 class, {classes[0]}" if classes else "0 classes", *notes])
        alone = f"name {classes[0]} as --data-dir if it holds the classes, or " if classes and not lines else ""
        raise Failure(DATA, f"fewer than two classes with training images ({root}: {found})",
                      f"{alone}give each class a {'label' if lines else 'folder'} of its own there")
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
        notes.append("val is the test set, as in the literature; validation images are split off from train")
    for images in splits.values():
        present = dict(images)
        if unknown := sorted(set(present) - set(classes)):
            raise Failure(DATA, f"class without training images ({unknown[0]}, {present[unknown[0]]})",
                          "add some, or remove it from the other splits")
    return Layout(root, classes, {split: sorted(splits[split]) for split in ("train", "val", "test") if split in splits},
                  notes, lines)


def split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, `root` itself as "train" if it holds classes; notes on folders beside them."""
    names, others = subfolders(root), []
    folders: dict[str, Path] = {}
    for name in names:
        split = split_of(name)
        if split in folders:
            raise Failure(DATA, f"two folders of one split ({folders[split]} and {root / name})", "keep one, or rename the other")
        if split:
            folders[split] = root / name
        else:
            others.append(name)
    if folders and "train" not in folders:
        raise Failure(DATA, f"a folder named like a split, and none for training ({next(iter(folders.values()))})",
                      "name the training images train, or rename the folder if it is a class")
    like = {word: str(root / name) for name in names for word in re.split("[-_ ]", name.lower()) if word in SPLITS}
    if not folders and len(set(like.values())) > 1:  # such as my_train, my_test
        raise Failure(DATA, f"folders that look like splits ({', '.join(like.values())})", "rename them to train and test")
    if not folders and len(names) > 1 and all(any(map(split_of, subfolders(root / name))) for name in names):
        raise Failure(DATA, f"a train or test folder in each class folder ({root / names[0]}, ...)",
                      "sort the images into train/CLASS and test/CLASS, or list them in a CSV file of path,label,split")
    lower = {name.lower() for name in names}
    if not folders and lower & IMAGES and lower & MASKS:
        raise Failure(DATA, f"images beside masks or annotations are not classes ({root / sorted(names)[0]})",
                      "sort the images into a folder per class, or list them in a CSV file of path,label")
    if folders and others and not subfolders(folders["train"]):
        raise Failure(DATA, f"a folder for training without class folders ({folders['train']}, beside {', '.join(others)})",
                      "rename it if it is a class, or give each class a folder there")
    notes = [f"left out: the folders {', '.join(others)} beside {folders['train'].name}"] if folders and others else []
    return folders or {"train": root}, notes


def split_of(name: str) -> str | None:
    """The split that a folder is by its name, such as train, train_set or train2017."""
    return SPLITS.get(re.sub("[-_ ]?(set|data|images|split|[0-9]+)$", "", name.lower()))


def subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def read_classes(folder: Path, names: list[str], left_out: Counter) -> tuple[Labelled, list[str]]:
    """The images of the class folders `names`, and the names of those without any."""
    if (folder / ANNOTATIONS).is_file():
        text = (folder / ANNOTATIONS).read_text(encoding="utf-8")
        rows = [line.split("\t") for line in text.splitlines() if line.strip()]
        if broken := [row[0] for row in rows if len(row) < 2]:
            raise Failure(DATA, f"not file and class, separated by a tab ({folder / ANNOTATIONS}: {broken[0]})", "mend the line")
        return [(row[1], str(folder / "images" / row[0])) for row in rows], []
    images, empty = [], []
    for name in names:
        files = list(image_files(folder / name, left_out))
        images += [(name, path) for path in files]
        if not files:
            empty.append(name)
        live(f"listing {folder}: {len(images)} images")
    with os.scandir(folder) as entries:
        if loose := sum(entry.is_file() and not is_hidden(entry.name) for entry in entries):
            left_out["outside of a class folder"] += loose
    return images, empty


def read_table(file: Path) -> tuple[dict[str, Labelled], dict[str, int], list[str]]:
    """The images of a CSV file, without a column `split` all for training; the line of each path; notes on other columns."""
    splits: dict[str, Labelled] = {"train": []}
    lines: dict[str, int] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream, skipinitialspace=True)
            header = ",".join(rows.fieldnames or [])
            rows.fieldnames = names = [name.strip().lower() for name in rows.fieldnames or []]
            columns = [name for name in ("path", "label", "split") if name in names]
            if columns[:2] != ["path", "label"]:
                raise Failure(DATA, f"no columns path and label ({file}: the first line is {header or 'empty'})",
                              "make it path,label or path,label,split, separated by commas")
            others = [name for name in names if name and name not in columns]
            for row in rows:
                path, label, *split_name = (row[name] for name in columns)
                split = SPLITS.get((split_name[0] or "").strip().lower()) if split_name else "train"
                where = f"{file}, line {rows.line_num}: {','.join(str(value) for value in row.values())}"
                if not (path and label and label.strip() and split):
                    raise Failure(DATA, f"incomplete or unknown value ({where})",
                                  "give each row a path, a label, and a split of train, val or test")
                path = os.path.normpath(file.parent / path)
                if path in lines:
                    raise Failure(DATA, f"a path that was there before ({where})", "keep one row for each image")
                lines[path] = rows.line_num
                splits.setdefault(split, []).append((label.strip(), path))
    except (csv.Error, UnicodeDecodeError) as failure:
        raise Failure(DATA, f"not a CSV file in UTF-8 ({file}: {failure})", "save it as one") from failure
    return splits, lines, [f"columns left out: {', '.join(others)}"] if others else []
