"""Several teachers: the mean of their probabilities, in runs, resumed runs, sweeps and error lines."""
import json

import pytest
import torch
from command import SMALL, one_line, run
from helpers import fails, make_images, table_of
from torch import nn

import models
from cli import sweep_grid
from cli.options import parse_distill
from rundir.errors import USAGE

CLOCK = {"images_per_s", "epoch_s", "val_s", "total_s", "peak_mem_mb"}
FLAGS = f"{SMALL} --data-dir images --student v2_pico --allow-weak-teacher"


class Fixed(nn.Module):
    """A teacher with given logits (N, C)."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.info, self.size = logits, {"model": "fixed", "classes": list("abc")}, 7

    def forward(self, images):
        return self.logits


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1), (torch.float32, 1e4), (torch.bfloat16, 30)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_are_averaged_at_the_temperature(temperature, dtype, scale):
    logits = [(scale * torch.randn(5, 3)).to(dtype) for _ in range(3)]
    teacher = models.Ensemble([Fixed(each) for each in logits], temperature)
    got = teacher(torch.zeros(5))
    expected = sum((each.double() / temperature).softmax(1) for each in logits) / 3
    assert got.dtype == torch.float32 and got.isfinite().all()
    assert teacher.size == 21 and teacher.info["model"].count("fixed") == 3
    torch.testing.assert_close((got.double() / temperature).softmax(1), expected, rtol=0, atol=1e-6)
    if scale == 1:
        torch.testing.assert_close(got.double(), temperature * expected.log(), rtol=0, atol=1e-5)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Images, and the weights of four teachers: one twice under two names, another one, and one of other classes."""
    monkeypatch.chdir(tmp_path)
    for split, each in (("train", 22), ("test", 10)):
        make_images(tmp_path / "images" / split, ["a", "b", "c"], each, seed=each)
    for name, seed, classes in (("one", 0, "abc"), ("same", 0, "abc"), ("two", 1, "abc"), ("other", 0, "abcd")):
        torch.manual_seed(seed)
        net = models.build("resnet8", len(classes), 16)
        [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1].bias.data[0] = 9  # always the first class
        models.save(tmp_path / f"{name}.pt", net, model="resnet8", classes=list(classes), image_size=16,
                    mean=[0.5, 0.4, 0.3 + 0.1 * seed], std=[0.2] * 3, dataset="imagefolder", test_acc1=None)
    return tmp_path


def log(path):
    return [{name: float(value) for name, value in row.items() if value and name not in CLOCK}
            for row in table_of(path / "log.csv")]


def test_two_equal_teachers_are_as_one_and_resume(place, capsys):
    for output, files in (("alone", "one.pt"), ("both", "one.pt same.pt")):
        code, out, errors = run(capsys, "distill.py", f"{FLAGS} --output {output} --teacher-checkpoint {files}")
        assert code == 0, errors
    assert out.count("\nteacher resnet8: ") == 2 == out.count("test accuracy 33.33 %, measured here, with mean 0.")
    assert "ensemble of 2 teachers: 0.16 M parameters, test accuracy 33.33 %" in out
    for alone, both in zip(log(place / "alone"), log(place / "both"), strict=True):
        assert both == pytest.approx(alone, rel=1e-4)
    config, single = (json.loads((place / output / "config.json").read_text()) for output in ("both", "alone"))
    assert config["teacher"] == "resnet8 + resnet8" and config["teacher_sha256"] == 2 * [single["teacher_sha256"]]
    assert single["teacher_checkpoint"] == "one.pt" and config["teacher_checkpoint"] == ["one.pt", "same.pt"]
    summary = json.loads((place / "both/summary.json").read_text())
    assert summary["teacher_test_acc1"] == pytest.approx(100 / 3)

    again = f"{FLAGS} --output both --resume auto --teacher-checkpoint"
    code, out, _ = run(capsys, "distill.py", f"{again} same.pt one.pt")
    assert code == 0 and "already finished" in out, "the content counts, not the path"
    code, out, _ = run(capsys, "distill.py", f"{again} same.pt one.pt --epochs 3")
    assert code == 0 and "continuing after epoch 2" in out and len(log(place / "both")) == 3
    for files in ("one.pt two.pt", "one.pt"):
        code, _, errors = run(capsys, "distill.py", f"{again} {files} --epochs 3")
        assert "teacher_sha256" in one_line(code, USAGE, errors)


def test_each_sees_the_centre_for_which_it_was_trained():
    images = torch.rand(2, 3, 16, 16)
    teachers = [models.build("resnet8", 3, side).eval() for side in (14, 8)]
    for net, side, stored in zip(teachers, (14, 8), (16, 9)):
        net.info, net.size = {"model": "resnet8", "classes": list("abc"), "image_size": side, "stored_size": stored}, 7
    with torch.no_grad():
        expected = sum(models.infer(net, images).softmax(1) for net in teachers) / 2
        assert not torch.allclose(expected, sum(net(images).softmax(1) for net in teachers) / 2, atol=1e-3)
        torch.testing.assert_close(models.infer(models.Ensemble(teachers, 1.0), images).softmax(1), expected)


def test_teachers_that_do_not_fit_are_one_line(place, capsys):
    for output in ("--output run", "--dry-run"):
        code, _, errors = run(capsys, "distill.py", f"{FLAGS} {output} --teacher-checkpoint one.pt other.pt")
        assert "other.pt: 4 classes, the data 3; number 3 is 'd', in the data none" in one_line(code, USAGE, errors)
        assert not (place / "run").exists()
    code, _, errors = run(capsys, "distill.py", f"{FLAGS} --output run --teacher-checkpoint one.pt two.pt --teacher resnet8")
    assert "--teacher" in one_line(code, USAGE, errors)
    strict = FLAGS.replace("--allow-weak-teacher", "--teacher-checkpoint one.pt")
    code, _, errors = run(capsys, "distill.py", f"{strict} --output run")
    assert "near chance (33.33 % of 30 test images; chance is 33.33 %)" in one_line(code, USAGE, errors)
    assert "--allow-weak-teacher" in errors
    code, _, errors = run(capsys, "distill.py", f"{FLAGS} --output . --overwrite --teacher-checkpoint images/x.pt two.pt")
    assert code == 5
    code, out, _ = run(capsys, "distill.py", f"{FLAGS} --dry-run --teacher-checkpoint one.pt two.pt --teacher resnet8 resnet8")
    assert code == 0 and "teacher on" in out
    code, _, errors = run(capsys, "distill.py", f"{FLAGS} --output . --overwrite --teacher-checkpoint one.pt two.pt")
    assert "--overwrite" in one_line(code, USAGE, errors) and (place / "two.pt").exists()


def test_a_sweep_takes_several_teachers_as_one_value(place):
    first, second = sweep_grid.expand("distill.py", "--teacher-checkpoint one.pt,two.pt one.pt --seed 0".split())
    assert first.label == "--teacher-checkpoint one.pt two.pt" and second.label == "--teacher-checkpoint one.pt"
    from cli.sweep_jobs import Sweep, digests
    job = Sweep("", place, [first], first, place).jobs[0]
    sha256 = digests(["one.pt", "two.pt"])
    job.directory.mkdir()
    (job.directory / "config.json").write_text(json.dumps(
        vars(parse_distill(argv=["--teacher-checkpoint", "same.pt", "two.pt", "--seed", "0"]))
        | {"script": "distill", "teacher_sha256": sha256}))
    assert job.compare(None)["teacher_checkpoint"] == ["one.pt", "two.pt"]
    job.flags = job.flags | {"teacher_checkpoint": ["one.pt", "other.pt"]}
    with fails(USAGE, "teacher_sha256"):
        job.compare(None)
