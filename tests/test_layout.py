"""Folders as people have them: splits and classes are found by name, and what is left out is said."""
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import one_line, run
from helpers import draw, fails, folder, load_folder, table_of
from PIL import Image

from data import datasets, pictures


@pytest.fixture
def plain(tmp_path):
    root = tmp_path / "plain"
    folder(root / "train", ant=9, bee=6, cat=5)
    folder(root / "test", ant=3, bee=2, cat=2)
    return root


def pixels(loaded):
    splits = loaded.train, loaded.val, loaded.test
    return [loaded.classes, *(part.tolist() for split in splits for part in (split.images, split.labels))]


def relaid(plain, kind):
    """The same images in another layout: what to give to --data-dir."""
    other = plain.parent / "other"
    if kind == "table":
        rows = [f"{path.relative_to(plain.parent)},{path.parent.name},{path.parent.parent.name}"
                for path in sorted(plain.rglob("*.png"), reverse=True)]
        (plain.parent / "all.CSV").write_text("\n".join(["\ufeffpath,label,split", *rows]))
        return plain.parent / "all.CSV"
    shutil.copytree(plain, other)
    if kind == "Tiny ImageNet":
        lines = [f"{path.parent.name}_{path.name}\t{path.parent.name}\t0\t0\t62\t62\n"
                 for path in (other / "test").rglob("*.png")]
        (other / "val" / "images").mkdir(parents=True)
        for path in (other / "test").rglob("*.png"):
            path.rename(other / "val" / "images" / f"{path.parent.name}_{path.name}")
        (other / "val" / "val_annotations.txt").write_text("".join(sorted(lines, reverse=True)))
        for name in ("ant", "bee", "cat"):
            (other / "train" / name / "images").mkdir()
            for path in (other / "train" / name).glob("*.png"):
                path.rename(path.parent / "images" / path.name)
        shutil.rmtree(other / "test")
        draw(other / "test" / "images" / "test_0.png")  # without labels
    else:
        for old, new in zip(("train", "test"), kind.split()):
            (other / old).rename(other / new)
    return other


@pytest.mark.parametrize("kind", ["table", "Tiny ImageNet", "train val", "Training TEST", "TRAIN Validation",
                                  "train_set test-2017"])
def test_every_layout_leaves_the_same_images(plain, kind):
    wanted, loaded = load_folder(plain, val_size=4)[0], load_folder(relaid(plain, kind), val_size=4)[0]
    assert pixels(loaded) == pixels(wanted) and loaded.fingerprint == wanted.fingerprint
    is_val = kind in ("Tiny ImageNet", "train val", "TRAIN Validation")
    assert any("val is the test set" in note for note in loaded.notes) == is_val


def test_val_validates_unless_a_val_size_is_given(plain):
    folder(plain / "val", ant=2, cat=4)
    loaded, _ = load_folder(plain)
    assert [len(part.labels) for part in (loaded.train, loaded.val, loaded.test)] == [20, 6, 7]
    assert loaded.val.labels.tolist() == [0, 0, 2, 2, 2, 2] and loaded.selected_on == "validation folder of 6 images"
    assert loaded.notes == ["no validation images of 1 of 3 classes: bee"]
    drawn, _ = load_folder(plain, val_size=4)
    assert len(drawn.val.labels) == 4 and "6 images for validation are not used, because of --val-size 4" in drawn.notes
    on_test, _ = load_folder(plain, val_size=0)
    assert on_test.val is on_test.test and "6 images for validation are not used, because of --val-size 0" in on_test.notes
    assert len({drawn.fingerprint, loaded.fingerprint}) == 1


def test_train_alone_and_a_table_without_splits_are_one_tree(plain):
    """Each keeps a cache of its own."""
    shutil.rmtree(plain / "test")
    rows = [f"train/{path.parent.name}/{path.name},{path.parent.name}" for path in (plain / "train").rglob("*.png")]
    (plain / "all.csv").write_text("\n".join(["path,label", *rows]))
    tree, alone, table = (load_folder(place)[0] for place in (plain / "train", plain, plain / "all.csv"))
    assert pixels(alone) == pixels(table) == pixels(tree) and len(tree.test.labels) == 2 and "left" not in str(table.notes)
    assert len(list(plain.glob(".fusekd*"))) == 2


def test_a_class_without_test_images_keeps_the_labels_of_the_others(plain):
    shutil.rmtree(plain / "test" / "bee")
    (plain / "test" / "bee").mkdir()
    loaded, _ = load_folder(plain, val_size=4)
    assert loaded.classes == ["ant", "bee", "cat"] and loaded.test.labels.tolist() == [0, 0, 0, 2, 2]
    assert loaded.notes == ["no test images of 1 of 3 classes: bee"]


def test_an_empty_class_folder_is_left_out_where_allowed(plain):
    (plain / "train" / "asp").mkdir()
    (plain / "train" / "asp" / "a.heic").write_bytes(b"x")
    with fails(4, plain / "train" / "asp", "1 .heic", "--allow-empty-classes"):
        datasets.load("imagefolder", plain)
    loaded, _ = load_folder(plain, val_size=4, allow_empty_classes=True)
    assert loaded.classes == ["ant", "bee", "cat"]
    assert loaded.notes == ["classes without training images, left out: asp", "left out: 1 .heic"]


def test_words_of_one_split_are_classes(tmp_path):
    assert load_folder(folder(tmp_path, blood_test=4, skin_test=4))[0].classes == ["blood_test", "skin_test"]


def test_numbers_are_classes_in_the_order_of_text(tmp_path):
    folder(tmp_path, **{"10": 4, "2": 3, "1": 5})
    loaded, _ = load_folder(tmp_path, val_size=2)
    assert loaded.classes == ["1", "10", "2"] and "classes in order: 1, 10, 2" in str(loaded)


def test_columns_and_names_of_classes_that_may_be_meant_otherwise_are_noted(plain):
    rows = [f"{path},{path.parent.name.replace('ant', 'CAT')},0" for path in plain.glob("train/*/*")]
    (plain / "all.csv").write_text("\n".join(["path,label,Is_Valid", *rows]))
    noted = "class names that differ in case alone: CAT, cat"
    assert load_folder(plain / "all.csv", val_size=4)[0].notes[:2] == ["columns left out: is_valid", noted]
    for split in ("train", "test"):
        (plain / split / "ant").rename(plain / split / "CAT")
    assert load_folder(plain, val_size=4)[0].notes[:1] == [noted]


def test_what_is_left_out_is_counted(plain, capsys):
    draw(plain / "train" / "cat" / "more" / "deep.png", seed=9)
    draw(plain / "train" / "cat" / ".hidden.png")
    (plain / "train" / "cat" / ".fusekd-cache-0.pt").write_text("ours, which is not counted")
    draw(plain / "train" / ".hidden" / "a.png")
    draw(plain / "train" / "cat" / ".thumbnails" / "a.png")
    draw(plain / "train" / "__MACOSX" / "cat" / "a.png")
    draw(plain / "train" / "loose.png")
    draw(plain / "labels" / "a.png")
    (plain / "train" / "cat" / "loop").symlink_to("..")
    (plain / "train" / "cat" / "notes.txt").write_text("not an image")
    loaded, _ = load_folder(plain, val_size=0)
    assert loaded.classes == ["ant", "bee", "cat"] and loaded.train.labels.bincount().tolist() == [9, 6, 6]
    assert loaded.notes == ["left out: the folders labels beside train",
                            "left out: 1 .txt, 1 hidden, 1 outside of a class folder"]
    assert len(list(pictures.image_paths(str(plain / "train" / "cat")))) == 6
    assert capsys.readouterr().err == f"left out: 1 .txt, 1 hidden ({plain / 'train' / 'cat'})\n"


def linked(root):
    (link := root / "train" / "cat" / "link.png").symlink_to("nowhere.png")
    return root, link


def annotated(root):
    (root / "val").mkdir()
    (file := root / "val" / "val_annotations.txt").write_text("a.png\tant\n\nb.png ant\n")
    return root, f"{file}: b.png ant"


WRONG = {  # what is done to a good folder -> what is given to --data-dir, and what the line names
    "no folder": lambda root: 2 * [root / "nowhere"], "empty": lambda root: 2 * [(root / "void").mkdir() or root / "void"],
    "loose": lambda root: (cats := root / "train" / "cat", f"{cats}: 0 classes; left out: 5 outside of a class folder)"),
    "one class": lambda root: (one := folder(root / "single", cat=3), f"{one}: 1 class, cat). name cat as --data-dir"),
    "a class train": lambda root: (own := folder(root / "own", car=3, train=3, bus=3), f"{own / 'train'}, beside bus, car)"),
    "odd in test": lambda root: (root, f"emu, {folder(root / 'test', emu=1) / 'emu'}"),
    "file": lambda root: 2 * [root / "train" / "cat" / "000.png"], "broken link": linked, "annotations": annotated,
    "test without train": lambda root: (few := folder(root / "few", Test=3, apple=4), few / "Test"),
    "twice": lambda root: (root, f"{folder(root / 'Training', ant=1)} and {root / 'train'}"),
    "masks": lambda root: (voc := folder(root / "voc", images=3, Segmentations=3), voc / "Segmentations"),
    "like splits": lambda root: (own := folder(root / "own", my_train=3, my_test=3), f"{own / 'my_test'}, {own / 'my_train'}"),
    "splits of classes": lambda root: (folder(root / "own" / "ant", train=3, test=3).parent,
                                       folder(root / "own" / "bee", train=3, test=3).parent / "ant"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_layout_is_named(plain, case):
    path, named = WRONG[case](plain)
    with fails(4, f"({named}"):
        datasets.load("imagefolder", path)


@pytest.mark.parametrize("text, words", [
    ("file,class\na.png,ant\n", ["path and label", "file,class"]), ("", ["path and label", "the first line is empty"]),
    ("Path;Label\na.png;ant\n", ["path and label", "Path;Label", "commas"]),
    ("path,label\na.png,ant\nb.png,\n", ["line 3"]), ("path,label,split\na.png,ant,holdout\n", ["line 2"]),
    ("path,label\ngone.png,ant\nalso.png,bee\n", ["gone.png", "line 2 of all.csv"]), ("path,label\na.png,\xe9\n", ["UTF-8"]),
    ("path,label\na.png,ant\n", ["1 class, ant). give each class a label"]),
    ("path,label\na.png,ant\na.png,bee\n", ["line 3: a.png,bee"]),
    ("path,label\nt/a.png,ant\nt/x/../a.png,bee\n", ["line 3: t/x/../a.png,bee"])])
def test_a_wrong_table_is_named(tmp_path, text, words):
    (tmp_path / "all.csv").write_bytes(text.encode("latin1"))
    with fails(4, *words):
        datasets.load("imagefolder", tmp_path / "all.csv")
    (tmp_path / "all.csv").rename(tmp_path / "all.tsv")
    with fails(4, f"a file that is no .csv ({tmp_path / 'all.tsv'})", "commas"):
        datasets.load("imagefolder", tmp_path / "all.tsv")


def test_images_of_both_splits_are_counted(plain):
    assert not any("also training images" in note for note in load_folder(plain)[0].notes)
    for k, source in enumerate(sorted((plain / "train" / "ant").iterdir())[:2]):
        shutil.copy(source, plain / "test" / "cat" / f"copy{k}.png")
    folder(plain / "val", ant=1, bee=1, cat=1)
    shutil.copytree(plain / "test" / "cat", plain / "val" / "cat", dirs_exist_ok=True)  # of four images, two are for training
    counts = "2 of 9 test", "2 of 6 validation", "4 of 6 validation"
    assert load_folder(plain)[0].notes == [f"{count} images are also {other} images, pixel by pixel"
                                           for count, other in zip(counts, ("training", "training", "test"))]


def test_converted_images_are_counted(plain):
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(plain / "train" / "ant" / "000.png")
    for _ in range(2):  # from the cache, too
        assert load_folder(plain, val_size=4)[0].notes == [f"1 of 27 images {pictures.ON_WHITE}"]


# --- unreadable files


@pytest.fixture
def damaged(plain):
    """`plain` with two files more, of which one is cut off and the other is text."""
    content = (plain / "train" / "ant" / "000.png").read_bytes()
    draw(plain / "train" / "bee" / "zz.png")
    (plain / "train" / "ant" / "zz.png").write_bytes(content[:len(content) // 2])
    (plain / "train" / "bee" / "zz.png").write_text("text")
    return plain


def test_unreadable_files_are_skipped_on_request_and_listed(damaged):
    with fails(4, "2 of 29", damaged / "train" / "ant" / "zz.png", "--unreadable skip"):
        load_folder(damaged, val_size=4)
    loaded, _ = load_folder(damaged, val_size=4, unreadable="skip")
    again, said = load_folder(damaged, val_size=4, unreadable="skip")
    assert [os.path.relpath(path, damaged) for path, _ in loaded.unreadable] == ["train/ant/zz.png", "train/bee/zz.png"]
    assert loaded.notes == ["2 of 29 images cannot be read, left out"]
    assert said == "" and again.unreadable == loaded.unreadable and pixels(again) == pixels(loaded)
    for path, _ in loaded.unreadable:
        os.unlink(path)
    assert pixels(load_folder(damaged, val_size=4)[0]) == pixels(loaded)


def test_rows_of_a_table_without_a_readable_file_are_skipped_on_request(damaged, monkeypatch):
    """Paths are absolute or relative, the columns capitalised, and the table in the working directory; and from the cache."""
    monkeypatch.chdir(damaged)
    paths = sorted((damaged / "train").rglob("*.png"))
    for written in (paths, [f"test/../{path.relative_to(damaged)}" for path in paths]):
        rows = [f"{place}, {path.parent.name}" for place, path in zip(written, paths)]
        Path("all.csv").write_text("\n".join(["Path, LABEL", "gone.png, bee", *rows]))
        with fails(4, "3 of 23", "gone.png", "line 2 of all.csv", "zz.png", "line 12 of all.csv"):
            load_folder("all.csv")
        loaded = [load_folder("all.csv", val_size=2, unreadable="skip")[0] for _ in range(2)]
        assert loaded[0].unreadable == loaded[1].unreadable and pixels(loaded[0]) == pixels(loaded[1])
        assert {reason.rpartition(", ")[2] for _, reason in loaded[0].unreadable} == {f"line {k} of all.csv" for k in (2, 12, 19)}


def test_a_class_whose_files_are_all_unreadable(damaged):
    for path in (damaged / "train" / "ant").iterdir():
        path.write_bytes(b"")
    with fails(4, "ant"):
        load_folder(damaged, unreadable="skip")


def test_a_run_lists_all_unreadable_files(damaged, capsys, tmp_path):
    odd = os.fsencode(damaged / "train" / "cat") + b"/\xe9.png"  # a name that is not UTF-8
    with open(odd, "wb"):
        pass
    flags = (f"--dataset imagefolder --data-dir {damaged} --val-size 4 --model resnet8 --batch-size 8 --epochs 1 --device cpu "
             f"--output {tmp_path / 'run'}")
    code, _, errors = run(capsys, "train_teacher.py", flags)
    assert str(tmp_path / "run" / "unreadable.csv") in one_line(code, 4, errors)
    listed = (tmp_path / "run" / "unreadable.csv").read_bytes()
    assert listed.count(b"\n") == 4 and b'zz.png,"not an image' in listed and b"\xe9.png,empty file" in listed
    os.unlink(odd)
    code, said, errors = run(capsys, "train_teacher.py", f"{flags}2 --unreadable skip --batch-size 99")
    assert "99 of 16 images" in one_line(code, 2, errors) and "\n2 of 29 images cannot be read, left out" in said
    code, said, errors = run(capsys, "train_teacher.py", f"{flags} --unreadable skip")
    assert code == 0, errors
    assert [row["reason"] for row in table_of(tmp_path / "run" / "unreadable.csv")][1] == "not an image, or its header is damaged"
    assert '"unreadable": 2' in (tmp_path / "run" / "summary.json").read_text()


def test_any_name_of_a_class_can_be_printed_and_drawn(tmp_path, capsys, monkeypatch):
    """Names that are no UTF-8, no formula between $, without glyphs, in two lines, or long."""
    names = [b"\xe9cole", rb"$a_b$ {\frac", "熊猫".encode(), b"two\nlines", b"x" * 200]
    folder(tmp_path / "images", **{os.fsdecode(name): 3 for name in names})
    flags = f"--dataset imagefolder --data-dir {tmp_path}/images --val-size 0 --batch-size 8 --device cpu"
    for script, line in (
            ("train_teacher.py", f"{flags} --model resnet8 --epochs 1 --output {tmp_path}/run"),
            ("show_batch.py", f"{flags} --output {tmp_path}/batch.png"),
            ("predict.py", f"{tmp_path}/run/best.pt {tmp_path}/images --output {tmp_path}/sheet.png")):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        code, _, errors = run(capsys, script, line)
        assert code == 0 and not errors.count("Warning"), errors
    for name in ("batch.png", "sheet.png"):
        Image.open(tmp_path / name).verify()


# --- degenerate folders


def test_a_class_of_one_image_is_for_training(tmp_path):
    folder(tmp_path, ant=1, bee=30)
    loaded, _ = load_folder(tmp_path)
    assert loaded.train.labels.bincount().tolist()[0] == 1 and loaded.val.labels.min() == loaded.test.labels.min() == 1
    assert loaded.notes == [f"no {split} images of 1 of 2 classes: ant" for split in ("test", "validation")]


@pytest.mark.skipif("TORTURE" not in os.environ, reason="a minute; make torture runs it")
def test_a_hundred_thousand_files(tmp_path):
    for name in ("ant", "bee"):
        folder(tmp_path, **{name: 50})
        for k in range(49_950):
            os.link(tmp_path / name / f"{k % 50:03}.png", tmp_path / name / f"{k:06}.png")
    loaded, _ = load_folder(tmp_path)
    assert [len(part.labels) for part in (loaded.train, loaded.val, loaded.test)] == [81_000, 9_000, 10_000]
    assert "10000 of 10000 test images are also training images, pixel by pixel" in loaded.notes
