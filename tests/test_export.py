"""export.py: every format in its own runtime against the checkpoint, what lies beside a file, a refusal leaves nothing."""
import json
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import ROOT, one_line, run, succeeds
from exporting import CLASSES, NEEDS, have, images, needs_executorch, needs_onnx, needs_torchao
from helpers import fails, make_images, table_of

import models
from deploy import check, other_runtimes, runtime, writers
from rundir import files
from rundir.errors import DIVERGED, Failure

SUFFIX = {"onnx": "onnx", "pt2": "pt2", "executorch": "pte"}


def export(capsys, trained, flags, output):
    return run(capsys, "export.py", f"{trained}/best.pt --output {output} {flags}")


def writes(monkeypatch, program):
    """The exporter of .pt2 files copies this one, in a thousandth of the time."""
    monkeypatch.setitem(writers.FORMATS, "pt2", (".pt2", lambda module, batches, path: shutil.copy(program, path)))


@pytest.fixture
def quick(program, monkeypatch):
    writes(monkeypatch, program)


@pytest.fixture
def wrong(trained):
    """A .pt2 file of other weights than the run's; made once."""
    path = trained.parent / "wrong.pt2"
    if not path.exists():
        module = writers.from_checkpoint(trained / "best.pt")
        for parameter in module.net.parameters():
            parameter.data = parameter.data.flip(0)
        writers.export(module, "pt2", "fp32", None, path)
    return path


@needs_onnx
def test_weights_in_other_files_are_refused(trained, tmp_path, capsys, monkeypatch):
    import onnx
    monkeypatch.chdir(tmp_path)
    assert export(capsys, trained, "--format onnx", tmp_path)[0] == 0
    path = tmp_path / "best-fp32.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    metadata = json.loads((tmp_path / "best-fp32.onnx.json").read_text()) | {"sha256": files.digest(path)}
    (tmp_path / "best-fp32.onnx.json").write_text(json.dumps(metadata))
    with pytest.raises(Failure, match="the runtime cannot open the file") as failure:
        runtime.load(path)
    assert failure.value.code == 5 and capsys.readouterr().err == ""


@pytest.mark.parametrize("format, precision, takes", [
    pytest.param("onnx", "fp32", "uint8", marks=needs_onnx), pytest.param("onnx", "fp32", "float", marks=needs_onnx),
    pytest.param("onnx", "fp16", "uint8", marks=needs_onnx), pytest.param("onnx", "int8", "uint8", marks=needs_onnx),
    ("pt2", "fp32", "uint8"), ("pt2", "fp16", "float"), pytest.param("pt2", "int8", "uint8", marks=needs_torchao),
    pytest.param("executorch", "fp32", "uint8", marks=needs_executorch),
    pytest.param("executorch", "int8", "float", marks=needs_executorch),
])
def test_a_file_does_what_its_checkpoint_does(trained, format, precision, takes, tmp_path, capsys):
    flags = f"--format {format} --precision {precision} --input {takes} --max-drop 4"  # 2 of the 60 images, which int8 changes
    code, out, err = export(capsys, trained, flags, tmp_path / "out")
    assert code == 0, err
    name = f"best-{precision}{'-float' if takes == 'float' else ''}.{SUFFIX[format]}"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name, f"{name}.json", "export.csv"}

    metadata = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert (metadata["classes"], metadata["image_size"]) == (CLASSES, 16)
    assert (metadata["input"], metadata["precision"]) == (takes, precision)
    assert metadata["checkpoint_sha256"] == files.digest(trained / "best.pt") and metadata["test_acc1"] > 50
    row, = table_of(tmp_path / "out" / "export.csv")
    assert row["file"] == name and row["images"] == "60" and f"{row['same_predictions']} of 60" in out
    assert float(row["checkpoint_accuracy"]) == pytest.approx(metadata["checkpoint_test_acc1"])
    assert int(row["bytes"]) == (tmp_path / "out" / name).stat().st_size
    assert float(row["drop"]) <= (4 if precision == "int8" else 0)

    content = (tmp_path / "out" / name).read_bytes()
    assert b"site-packages" not in content and b"writers.py" not in content, "a folder of this machine"

    model, net = runtime.load(tmp_path / "out" / name), models.load(trained / "best.pt")
    for count, height, width in ((1, 16, 16), (19, 16, 16), (3, 9, 13)) + (((2, 40, 31),) if format != "executorch" else ()):
        some = images(count, height, width)
        probabilities, logits = model(some)
        with torch.no_grad():
            expected = net(models.normalise(torch.from_numpy(some), net.info["mean"], net.info["std"])).numpy()
        assert probabilities.shape == logits.shape == (count, 6) and probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(logits, expected, atol={"fp32": 1e-4, "fp16": 0.1, "int8": 3}[precision])
        if precision == "fp32":
            np.testing.assert_allclose(probabilities, models.predict(net, some).numpy(), atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("name, package", [("openvino", "openvino"), ("opencv", "cv2"), ("web", None)])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_is_checked_in_another_runtime(trained, name, package, precision, tmp_path, capsys):
    if package and not have(package) or name == "web" and not (ROOT / "deploy/web/node_modules/onnxruntime-web").exists():
        pytest.skip(NEEDS)
    code, out, err = export(capsys, trained, f"--precision {precision} --check {name}", tmp_path)
    assert code == 0, err
    own, other = table_of(tmp_path / "export.csv")
    assert own["runtime"].startswith("onnxruntime ") and own["same_in_onnxruntime"] == ""
    same = int(other["same_in_onnxruntime"])
    assert name.replace("web", "onnxruntime-web") in other["runtime"] and f"{other['runtime']}: {same} of 60" in out
    assert same == 60 or same == 59 and precision == "int8"
    assert abs(float(other["accuracy"]) - float(own["accuracy"])) <= 100 * (60 - same) / 60 + 1e-4


@pytest.mark.parametrize("same, images, refused", [(58, 60, True), (59, 60, False), (994, 1000, True), (995, 1000, False)])
def test_half_a_percent_of_predictions_or_one_may_differ_in_another_runtime(same, images, refused):
    row = SimpleNamespace(same_in_onnxruntime=same, images=images, runtime="opencv 5", file="best-int8.onnx")
    with fails(6, f"{same} of {images}") if refused else nullcontext():
        check.judge_other(row, "opencv")


def test_the_version_of_a_package_without_metadata_is_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "built_here", SimpleNamespace(__version__="9.0"))
    assert other_runtimes.version_of("built_here.part") == "built_here 9.0"


@needs_onnx
@pytest.mark.parametrize("words, run_wrongly", [
    (" of 60 as in ONNX Runtime", lambda path: lambda images: np.eye(6, dtype=np.float32)[np.full(len(images), 0)] - 1e9),
    ("no rule for Gemm", lambda path: {}["no rule for Gemm"]), ("bad shape", lambda path: lambda images: {}["bad shape"]),
])
def test_a_file_that_another_runtime_gets_wrong_is_refused_there(trained, words, run_wrongly, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(other_runtimes, "version", lambda name: f"{name} 1.0")
    monkeypatch.setitem(other_runtimes.RUNTIMES, "opencv", run_wrongly)
    code, _, err = export(capsys, trained, "--check opencv", tmp_path / "out")
    assert words in (line := one_line(code, DIVERGED, err)) and "leave opencv out of --check" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision, words", [("fp32", "different logits"), ("fp16", "--max-drop 1")])
def test_a_file_that_predicts_otherwise_is_refused_and_leaves_nothing(trained, wrong, precision, words, tmp_path, capsys,
                                                                      monkeypatch):
    writes(monkeypatch, wrong)
    code, out, err = export(capsys, trained, f"--format pt2 --precision {precision}", tmp_path / "a" / "b")
    assert words in one_line(code, DIVERGED, err) and not list(tmp_path.iterdir()), out


def test_an_export_replaces_its_line_and_a_refused_one_nothing(trained, quick, wrong, capsys, monkeypatch):
    """By default in the folder export/ of the run."""
    place = trained / "export"
    for flags in ("", "--precision fp16", ""):
        succeeds(capsys, "export.py", f"{trained}/best.pt --format pt2 {flags}")
    assert [row["file"] for row in table_of(place / "export.csv")] == ["best-fp16.pt2", "best-fp32.pt2"]
    assert json.loads((place / "best-fp32.pt2.json").read_text())["precision"] == "fp32"
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    writes(monkeypatch, wrong)
    assert run(capsys, "export.py", f"{trained}/best.pt --format pt2")[0] == DIVERGED
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    shutil.rmtree(place)


@pytest.mark.parametrize("blocked, content, code", [
    ("best-fp32.pt2", None, 8), ("best-fp32.pt2.json", None, 8), ("export.csv", None, 4),
    ("export.csv", b"file;format\na;b\n", 4),
    ("export.csv", b"file,format\na,b,c\n", 4), ("export.csv", b"\xff\n", 4)])
def test_what_stands_in_the_way_is_named_and_nothing_is_written(trained, quick, blocked, content, code, tmp_path, capsys):
    """content: of the file that is there; None for a directory."""
    (tmp_path / blocked).mkdir() if content is None else (tmp_path / blocked).write_bytes(content)
    found, _, err = export(capsys, trained, "--format pt2", tmp_path)
    assert str(tmp_path / blocked) in one_line(found, code, err)
    assert [path.name for path in tmp_path.iterdir()] == [blocked]
    assert content is None or (tmp_path / blocked).read_bytes() == content


def test_a_table_of_an_older_version_gets_the_new_columns(trained, quick, tmp_path, capsys):
    (tmp_path / "export.csv").write_text("file,format\nolder.onnx,onnx\n")
    assert export(capsys, trained, "--format pt2", tmp_path)[0] == 0
    assert [(row["file"], bool(row["runtime"])) for row in table_of(tmp_path / "export.csv")] == [
        ("older.onnx", False), ("best-fp32.pt2", True)]


def test_a_drop_is_judged_by_its_limit():
    def row(precision, drop, difference=0.0):
        return SimpleNamespace(file="f", precision=precision, images=100, accuracy=50 - drop, checkpoint_accuracy=50, drop=drop,
                               largest_difference=difference, largest_logit=5.0)

    check.judge(row("int8", 0.5, difference=2.0), max_drop=0.5, stated=None, amp="off")
    check.judge(row("int8", -3), max_drop=0, stated=50.05, amp="off")
    check.judge(row("fp32", 0, difference=4e-4), max_drop=0, stated=50.0, amp="off")
    for refused, stated in ((row("int8", 0.51), 50), (row("int8", float("nan")), 50), (row("fp32", 0, 6e-4), 50),
                            (row("fp32", 0, float("nan")), 50), (row("fp32", 0), 60)):
        with pytest.raises(Failure):
            check.judge(refused, max_drop=0.5, stated=stated, amp="off")


def test_a_network_that_cannot_be_exported_is_one_line(trained, tmp_path, capsys, monkeypatch):
    def fails(module, batches, path):
        path.write_bytes(b"half")
        raise ValueError("no such operator\nand much more")

    monkeypatch.setitem(writers.FORMATS, "pt2", (".pt2", fails))
    code, _, err = export(capsys, trained, "--format pt2", tmp_path / "out")
    assert "no such operator)" in one_line(code, 2, err) and not list(tmp_path.iterdir())


def test_calibration_leaves_the_test_set_alone():
    labels = torch.zeros(2000, dtype=torch.int64)
    split = {name: check.datasets.Split(torch.full((2000, 2, 2, 3), value, dtype=torch.uint8), labels)
             for value, name in enumerate(("train", "val", "test"))}
    rest = dict(name="", classes=[""], mean=(), std=(), selected_on="", fingerprint="")
    data = check.datasets.Dataset(**split, **rest)
    assert len(check.calibration(data)) == check.CALIBRATION_IMAGES and (check.calibration(data) == 1).all()
    assert (check.calibration(check.datasets.Dataset(**split | {"val": split["test"]}, **rest)) == 0).all()
    places = torch.arange(1000).view(-1, 1, 1, 1)  # of images in the order of their classes
    val = check.datasets.Split(places, labels[:1000])
    found = check.calibration(check.datasets.Dataset(**split | {"val": val}, **rest)).flatten()
    assert (found[0], found[-1], found.diff().max()) == (0, 999, 2)


@pytest.mark.parametrize("package, flags", [
    ("onnxruntime", ""), ("onnxscript", ""), ("torchao.quantization.pt2e", "--format pt2 --precision int8"),
    ("executorch.exir", "--format executorch"),
])
def test_a_missing_package_is_named_with_the_command_that_installs_it(trained, package, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", sys)  # so that the one named is the first that is missing
    for name in ("onnxscript", "onnxruntime", "torchao.quantization.pt2e", "executorch.exir"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    code, _, err = export(capsys, trained, flags, tmp_path / "out")
    assert package in one_line(code, 2, err) and "pip install -r requirements-export.txt" in err and not list(tmp_path.iterdir())


BAD = [  # what is wrong, arguments, exit code, words of the line
    ("no such checkpoint", "nowhere.pt", 5, ["nowhere.pt"]),
    ("text", "text.pt", 5, ["text.pt"]),
    ("a run directory", "run", 5, ["folder", "best.pt"]),
    ("an exported file", "exported.onnx", 5, ["exported.onnx", "best.pt"]),
    ("a training state", "run/last.pt", 5, ["last.pt", "best.pt"]),
    ("not in a run directory", "alone/best.pt", 5, ["config.json"]),
    ("unknown format", "run/best.pt --format tflite", 2, ["tflite"]),
    ("unknown precision", "run/best.pt --precision int4", 2, ["int4"]),
    ("fp16 of ExecuTorch", "run/best.pt --format executorch --precision fp16", 2, ["fp16"]),
    ("a checkpoint behind --check", "--check opencv run/best.pt", 2, ["after the checkpoint", "(run/best.pt)"]),
    ("another runtime for a .pt2", "run/best.pt --check opencv", 2, ["--check", "pt2"]),
    ("unknown runtime", "run/best.pt --check tflite", 2, ["tflite"]),
    ("a drop below nothing", "run/best.pt --max-drop -1", 2, ["--max-drop"]),
    ("the data is gone", "run/best.pt --data-dir nowhere", 4, ["nowhere"]),
    ("other data", "run/best.pt --data-dir other", 2, ["other", "--data-dir"]),
    ("output below a file", "run/best.pt --output text.pt/out", 8, ["text.pt"]),
    ("output where nothing can be made", "run/best.pt --output /proc/nothing", 8, ["/proc/nothing"]),
]


@pytest.mark.parametrize("arguments, code, words", [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_one_line_and_an_exit_code_for_what_is_wrong(trained, quick, arguments, code, words, capsys, monkeypatch):
    monkeypatch.chdir(place := trained.parent)
    for name in ("text.pt", "exported.onnx"):
        (place / name).write_text("hello")
    (place / "alone").mkdir(exist_ok=True)
    shutil.copy(trained / "best.pt", place / "alone")
    if not (place / "other").exists():
        make_images(place / "other" / "train", ["a", "b"], 30, seed=2)
        make_images(place / "other" / "test", ["a", "b"], 4, seed=3)
    format = "" if "--format" in arguments else "--format pt2"
    found, _, err = run(capsys, "export.py", f"{arguments} {format}")
    assert all(word in one_line(found, code, err) for word in words), err
    assert not (trained / "export").exists() and not (place / "alone" / "export").exists()
