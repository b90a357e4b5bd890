"""predict.py: the same rows from a checkpoint and from what was exported of it; unreadable images; one line for errors."""
import csv
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from command import ROOT, SMALL, one_line, run, succeeds
from exporting import CLASSES, needs_onnx
from helpers import make_images
from PIL import Image, ImageOps

import models
from data import pictures
from deploy import pt2, runtime
from rundir import files


@pytest.fixture
def place(trained):
    """A folder with `images`, and a `run` that was trained on them."""
    return trained.parent


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def check_rows(text, trained, folder):
    """They are the three likeliest classes of every image below the folder, by the checkpoint."""
    rows, paths = table(text), sorted(map(str, folder.glob("*/*.png")))
    assert len(paths) == 60 and [row["path"] for row in rows] == [path for path in paths for _ in range(3)]
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    expected = models.predict(models.load(trained / "best.pt"), images).numpy()
    for number, row in enumerate(rows):
        image, rank = divmod(number, 3)
        index = expected[image].argsort()[::-1][rank]
        assert (row["rank"], row["class"]) == (str(rank + 1), CLASSES[index])
        assert float(row["probability"]) == pytest.approx(expected[image, index], abs=1e-5)


def test_csv_has_the_likeliest_classes_of_every_image_below_a_folder(trained, program, place, capsys):
    folder = place / "images" / "test"
    for model in (trained / "best.pt", program):
        code, out, err = run(capsys, "predict.py", f"{model} {folder} --csv --top 3")
        assert code == 0 and not err, err
        check_rows(out, trained, folder)


@needs_onnx
def test_an_onnx_file_needs_no_torch(trained, place, tmp_path, capsys):
    succeeds(capsys, "export.py", f"{trained}/best.pt --output {tmp_path}")
    without = ("import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, '.')\n"
               "runpy.run_path('predict.py', run_name='__main__')")
    folder, flags = place / "images" / "test", ("--csv", "--top", "3")
    result = subprocess.run([sys.executable, "-c", without, "predict.py", tmp_path / "best-fp32.onnx", folder, *flags],
                            cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    check_rows(result.stdout, trained, folder)


def test_a_line_per_image(trained, place, capsys):
    path, folder = place / "images" / "test" / CLASSES[0] / "000.png", place / "images" / "test" / CLASSES[1]
    several = succeeds(capsys, "predict.py", f"{trained}/best.pt {path} {folder} {path}").splitlines()
    assert [line.split("  ")[0] for line in several] == [str(path), *sorted(map(str, folder.iterdir())), str(path)]
    code, out, _ = run(capsys, "predict.py", f"{trained}/best.pt {path} --top 99")
    named, *shares = out.rstrip("\n").split("  ")
    assert code == 0 and named == str(path) and out.count("\n") == 1 and len(shares) == len(CLASSES), out
    assert sum(float(share.split()[1]) for share in shares) == pytest.approx(100, abs=0.1)


def test_what_cannot_be_read_is_named_and_nothing_else_is_lost(trained, place, tmp_path, capsys, monkeypatch):
    good = sorted(map(str, (place / "images" / "test" / CLASSES[1]).glob("*.png")))[:3]
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((place / "images" / "test" / CLASSES[1] / "000.png").read_bytes()[:-30])
    lines = [good[0], str(tmp_path / "bad.png"), good[1], "nowhere.png", str(tmp_path / "cut.png"), "", *good[2:]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, err = run(capsys, "predict.py", f"{trained}/best.pt - --csv --top 1 --output {tmp_path}/sheet.png")
    assert code == 4 and [row["path"] for row in table(out)] == good, err
    *named, _, last = err.splitlines()
    assert [line.split()[1] for line in named] == [str(tmp_path / "bad.png"), "nowhere.png", str(tmp_path / "cut.png")]
    assert last.startswith("error: 3 of 6 images could not be read (-). ") and "3 of 3 images" in err
    Image.open(tmp_path / "sheet.png").verify()


def test_images_of_other_sizes_are_cropped_and_shrunk_as_for_training(trained, place, tmp_path, capsys):
    wide = Image.open(place / "images" / "test" / CLASSES[2] / "000.png").resize((90, 40))
    fitted, small = ImageOps.fit(wide, (16, 16), Image.Resampling.BILINEAR), wide.crop((0, 0, 9, 9))
    for name, image, read in (("wide", wide, fitted), ("small", small, small), ("fitted", fitted, fitted)):
        image.save(path := tmp_path / f"{name}.png")
        assert np.array_equal(pictures.read(str(path), 16)[0], np.asarray(read))
    rows = table(succeeds(capsys, "predict.py", f"{trained}/best.pt {tmp_path} --csv"))
    of = {name: [row["probability"] for row in rows if row["path"].endswith(name)] for name in ("fitted.png", "wide.png")}
    assert len(rows) == 3 * 5 and of["fitted.png"] == of["wide.png"]


def test_a_network_of_resized_windows_sees_the_centre_everywhere(place, tmp_path, capsys):
    """Images are stored with 1.15 times --image-size; validation, predict.py and the exported file take the middle."""
    assert [pictures.stored_side(size, "resized") for size in (224, 64, 32, None)] == [256, 72, 36, None]
    assert pictures.stored_side(224, "pad") == 224
    make_images(tmp_path / "images" / "train", CLASSES[:2], 12, seed=0, size=26)
    make_images(tmp_path / "images" / "test", CLASSES[:2], 4, seed=1, size=26)
    flags = f"--val-size 4 --image-size 16 --crop resized --epochs 1 --data-dir {tmp_path}/images --output {tmp_path}/run"
    assert "images of 20x20" in succeeds(capsys, "train_teacher.py", f"--model resnet8 {SMALL} {flags}")
    succeeds(capsys, "export.py", f"{tmp_path}/run/best.pt --format pt2")
    net, file = models.load(tmp_path / "run" / "best.pt"), f"{tmp_path}/run/export/best-fp32.pt2"
    assert (net.info["image_size"], net.info["stored_size"]) == (16, 20)
    assert json.loads(Path(f"{file}.json").read_text())["stored_size"] == 20

    paths = sorted(map(str, (tmp_path / "images" / "test").glob("*/*.png")))
    stored = np.stack([np.asarray(ImageOps.fit(Image.open(path), (20, 20), Image.Resampling.BILINEAR)) for path in paths])
    centre = torch.from_numpy(stored[:, 2:18, 2:18].copy())
    with torch.no_grad():
        logits = net(models.normalise(centre, net.info["mean"], net.info["std"]))
    expected, labels = logits.softmax(1).numpy(), [int("class1" in path) for path in paths]
    accuracy = 100 * float(np.mean(logits.argmax(1).numpy() == labels))
    assert accuracy == json.loads((tmp_path / "run" / "summary.json").read_text())["test_acc1_best"]
    np.testing.assert_allclose(models.predict(net, stored).numpy(), expected, atol=1e-6)
    for model in (f"{tmp_path}/run/best.pt", file):
        rows = table(succeeds(capsys, "predict.py", f"{model} {tmp_path}/images/test --csv"))
        found = {(row["path"], row["class"]): float(row["probability"]) for row in rows}
        assert found == pytest.approx({(path, CLASSES[index]): expected[number, index]
                                       for number, path in enumerate(paths) for index in (0, 1)}, abs=1e-5)


def test_many_images_go_in_batches_and_a_sheet_shows_the_first(trained, place, tmp_path, capsys, monkeypatch):
    some = sorted(map(str, (place / "images" / "train" / CLASSES[3]).glob("*.png")))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(some * 5)))
    sheets = []
    monkeypatch.setattr(pictures, "contact_sheet", lambda shown, height: sheets.append(shown) or b"")
    code, out, err = run(capsys, "predict.py", f"{trained}/best.pt - --csv --top 1 --output {tmp_path}/sheet.png")
    assert code == 0 and len(table(out)) == 150 and "96 of 150 images" in err and len(sheets[0]) == 96


def test_names_that_are_no_text_are_printed_as_they_are(trained, place, tmp_path, capsys, monkeypatch):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(place / "images" / "test" / CLASSES[0] / "000.png", name)
    for images in (tmp_path, "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(name)))
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out := io.BytesIO(), write_through=True))
        code, _, err = run(capsys, "predict.py", f"{trained}/best.pt {images}")
        assert code == 0 and out.getvalue().startswith(name), err


def put(program, path, content: bytes, **changes) -> Path:
    """Write an exported file of this content; its metadata are the program's, with the right SHA-256 and these changes."""
    path.write_bytes(content)
    metadata = json.loads(runtime.metadata_path(program).read_text()) | {"sha256": files.digest(path)} | changes
    runtime.metadata_path(path).write_text(json.dumps(metadata))
    return path


BAD = [  # what is wrong, arguments, exit code, words of the line
    ("no such model", "nowhere.pt images", 5, ["nowhere.pt"]),
    ("the model is text", "text.pt images", 5, ["text.pt"]),
    ("a kind of file that is not ours", "model.tflite images", 5, ["model.tflite"]),
    ("no such exported file", "nowhere.onnx images", 5, ["nowhere.onnx"]),
    ("an exported file without its description", "alone.pt2 images", 5, ["alone.pt2.json"]),
    ("a description that is none", "wrong.pt2 images", 5, ["wrong.pt2.json", "classes"]),
    ("an exported file that was damaged", "damaged.pt2 images", 5, ["damaged.pt2", "SHA-256"]),
    ("an exported file that its runtime refuses", "refused.pt2 images", 5, ["refused.pt2", "export it again"]),
    ("no such image", "run/best.pt nowhere.png", 4, ["nowhere.png: No such file"]),
    ("an image that is text", "run/best.pt text.pt", 4, ["text.pt: not an image"]),
    ("an empty folder", "run/best.pt empty", 4, ["no images (empty)"]),
    ("no classes at all", "run/best.pt images --top 0", 2, ["--top"]),
    ("a sheet that cannot be written", "run/best.pt images/test/class0 --output /proc/nothing/a.png", 8, ["/proc/nothing"]),
]


@pytest.mark.parametrize("arguments, code, words", [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_one_line_and_an_exit_code_for_what_is_wrong(program, arguments, code, words, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    (place / "empty").mkdir(exist_ok=True)
    for name in ("text.pt", "model.tflite"):
        (place / name).write_text("hello")
    content = program.read_bytes()
    for name in ("alone.pt2", "wrong.pt2"):
        (place / name).write_bytes(content)
    (place / "wrong.pt2.json").write_text("{}")
    put(program, place / "damaged.pt2", content.replace(b"aten", b"Aten", 1), sha256=files.digest(program))
    put(program, place / "refused.pt2", b"hello")
    found, _, err = run(capsys, "predict.py", arguments)
    assert all(word in one_line(found, code, err) for word in words), err


@pytest.mark.parametrize("suffix, precision, package", [
    ("onnx", "fp32", "onnxruntime"), ("pte", "fp32", "executorch.runtime"), ("pt2", "int8", "torchao.quantization.pt2e"),
])
def test_a_missing_runtime_is_named_with_the_command_that_installs_it(program, suffix, precision, package, tmp_path, capsys,
                                                                      monkeypatch):
    put(program, tmp_path / f"best.{suffix}", program.read_bytes(), precision=precision)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(capsys, "predict.py", f"{tmp_path}/best.{suffix} {tmp_path}")
    assert package in one_line(code, 2, err) and "pip install -r requirements-export.txt" in err


def saved(value) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def edited(program, edit) -> bytes:
    """The content of an exported program with its members, by name, changed by `edit`."""
    with zipfile.ZipFile(program) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()


def replaced(name, old, new):
    """An edit that puts `new` for the first place in the member `name` where the pattern `old` is."""
    def edit(members):
        members[name], count = re.subn(old, new, members[name], count=1)
        assert count == 1
    return edit


GRAPH, WEIGHTS = "archive/models/model.json", "archive/data/weights/model_weights_config.json"
FOREIGN = {  # each harmless, and each of a kind that torch.export.load would unpickle, evaluate, or call
    "a member of another kind": lambda members: members.update({"archive/data/other/note": b"hello"}),
    "inputs, pickled": lambda members: members.update({pt2.SAMPLES: saved(((torch.zeros(1),), {}))}),
    "a weight, pickled": replaced(WEIGHTS, b'"use_pickle": false', b'"use_pickle": true'),
    "a size that is no arithmetic": replaced(GRAPH, rb'"expr_str": "[^"]*"', b'"expr_str": "hello"'),
    "a guard": replaced(GRAPH, rb'"guards_code": \[\]', b'"guards_code": ["True"]'),
    "a function that is no operator": replaced(GRAPH, rb"torch\.ops\.aten\.relu_\.default", b"torch.relu_"),
    "an operator that is given a text": replaced(GRAPH, rb'"as_int": 1\b', b'"as_string": "text"'),
    "other containers": replaced(GRAPH, rb"builtins\.tuple", b"collections.deque"),
    "a name that is none": replaced(GRAPH, rb'"cpu"', b'"c p u"'),
}


@pytest.mark.parametrize("edit", [pytest.param(edit, id=name) for name, edit in FOREIGN.items()])
def test_a_pt2_file_that_export_does_not_write_is_not_opened(program, edit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda *arguments: pytest.fail("it was opened"))
    code, _, err = run(capsys, "predict.py", f"{put(program, tmp_path / 'foreign.pt2', edited(program, edit))} {tmp_path}")
    assert "foreign.pt2" in one_line(code, 5, err) and "best.pt" in err


@pytest.mark.parametrize("name, value", [("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"), ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")])
def test_only_plain_data_is_unpickled_whatever_the_environment_says(program, name, value, tmp_path, monkeypatch):
    def opened(*arguments, load=torch.export.load):
        with pytest.raises(pickle.UnpicklingError):
            torch.load(io.BytesIO(saved(Fraction(1, 2))), weights_only=False)
        return load(*arguments)

    monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.export, "load", opened)
    model = runtime.load(put(program, tmp_path / "same.pt2", edited(program, lambda members: None)))
    assert model(np.zeros((2, 16, 16, 3), np.uint8))[0].shape == (2, len(CLASSES))
    assert os.environ[name] == value and torch.load(io.BytesIO(saved(Fraction(1, 2))), weights_only=False) == Fraction(1, 2)
