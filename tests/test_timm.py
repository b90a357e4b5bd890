"""timm's networks: built, trained, distilled, exported; as teachers with their published inputs; refused in one line."""
import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from command import SMALL, one_line, run
from helpers import fails, make_images

import models
from rundir.errors import CHECKPOINT, DATA, USAGE
from training.grad_checkpoint import recompute

DATASET = SimpleNamespace(image_size=32, classes=list("abcd"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), name="synthetic")
SIZES = {"image_size": 32, "stored_size": 32}
NETWORKS = {  # parameters with ten classes, FLOPs at 32 pixels
    "timm/resnet18": (11_181_642, 74_033_152), "timm/vit_tiny_patch16_224": (5_489_482, 54_498_048),
    "timm/mobilenetv4_conv_small": (2_505_834, 9_972_864), "timm/convnext_atto": (3_377_730, 22_333_440)}


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def test_a_missing_package_is_named_and_others_do_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    net, name, path = models.build("resnet8", 4), "timm/resnet18", tmp_path / "best.pt"
    models.save(path, net, model=name, classes=DATASET.classes, image_size=32, mean=[0.5] * 3, std=[0.2] * 3, dataset="synthetic")
    torch.save(net.state_dict(), tmp_path / "teacher.pth")
    for use in (models.check_name, models.has_weights, lambda name: models.build(name, 4), lambda name: models.load(path),
                lambda name: models.read_teacher(tmp_path / "teacher.pth", name)):
        with fails(USAGE, name, "python -m pip install timm"):
            use(name)
    assert "resnet8" in models.names() and not [each for each in models.names() if each.startswith("timm/")]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_built_folded_and_checkpointed(timm, name):
    net, images = models.build(name, 10, 32), torch.randn(4, 3, 32, 32)
    assert (models.parameters(net), models.flops(net, 32)) == NETWORKS[name]
    assert ("published for 224" in models.describe(name, net, 32)) == ("vit" not in name)  # has no feature map that shrinks
    gradients = []
    for each in (net, copy.deepcopy(net)):
        if gradients:
            recompute(each, name)
        torch.manual_seed(0)
        F.cross_entropy(each(images), torch.arange(4)).backward()
        gradients.append(list(each.state_dict().values()) + [parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with torch.no_grad():
        expected = net.eval()(images)
        torch.testing.assert_close(models.fold(net, 32)(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_unknown_names_get_a_suggestion(timm):
    names = models.names()
    assert {*NETWORKS, "resnet8"} <= {*names} and len(names) == len({*names})
    for name, word in (("timm/resnet81", "timm/resnet18"), ("timm/resnet18.a1_in2k", "timm/resnet18.a1_in1k"),
                       ("timm/", "list_models()")):
        for use in (models.check_name, models.has_weights, lambda name: models.build(name, 4)):
            with fails(USAGE, f"({name})", word):
                use(name)
    with fails(USAGE, "timm/crossvit_tiny_240", "--image-size 240"):
        models.build("timm/crossvit_tiny_240", 4, 8)
    assert models.has_weights("timm/resnet18.a1_in1k")


def test_a_teacher_has_its_published_inputs(timm, tmp_path):
    """A transformer of 224 pixels, with a mean and a standard deviation of 0.5, for normalised images of 32 pixels."""
    name, path = "timm/vit_tiny_patch16_224", tmp_path / "teacher.pth"
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    torch.save({"state_dict_ema": theirs.state_dict(), "epoch": 3}, path)
    content = models.read_teacher(path, name)
    info = models.complete(content, DATASET, SIZES)
    assert (info["image_size"], info["mean"], info["std"], info["classes"]) == (224, [0.5] * 3, [0.5] * 3, DATASET.classes)
    stated = models.complete(content, DATASET, SIZES, {"image_size": 96, "mean": [0.1, 0.2, 0.3]})
    assert (stated["image_size"], stated["mean"], stated["std"]) == (96, [0.1, 0.2, 0.3], [0.5] * 3)
    with fails(CHECKPOINT, "pos_embed", "--teacher-image-size"):
        models.load(stated)
    images, (mean, std) = torch.rand(2, 3, 32, 32), (torch.tensor(each).view(3, 1, 1) for each in (DATASET.mean, DATASET.std))
    with torch.no_grad():
        expected = theirs(F.interpolate((images - 0.5) / 0.5, size=(224, 224), mode="bilinear", align_corners=False))
        got = models.load(info, folded=True, inputs=(DATASET.mean, DATASET.std))((images - mean) / std)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_pretrained_weights_fit_the_image_size_and_keep_the_head(timm, monkeypatch):
    name = "timm/vit_tiny_patch16_224"
    published = timm.create_model("vit_tiny_patch16_224").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(published))
    net = models.build(name, 10, 64)
    before, random = {key: tensor.clone() for key, tensor in net.state_dict().items()}, torch.get_rng_state()
    assert models.initialise(net, name, pretrained=True) is None
    for key, tensor in net.state_dict().items():
        if key != "pos_embed":  # resized
            assert torch.equal(tensor, (before if key.startswith("head.") else published)[key]), key
    assert not torch.equal(net.pos_embed, before["pos_embed"]) and torch.equal(random, torch.get_rng_state())


def test_a_failed_download_says_where_to_put_the_file(timm, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", offline)
    for name, source, place in (("timm/resnet18", "timm/resnet18.a1_in1k", "models--timm--resnet18.a1_in1k"),
                                ("timm/legacy_seresnet18", "seresnet18-4bb0ce65.pth", "hub/checkpoints")):
        with fails(DATA, name, source, "no network", place, "--init PATH"):
            models.initialise(models.build(name, 10), name, pretrained=True)
    with fails(USAGE, "timm/test_vit4"):
        models.initialise(models.build("timm/test_vit4", 10, 160), "timm/test_vit4", pretrained=True)


def test_scripts_train_distil_export_and_predict(timm, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, each in (("train", 12), ("test", 6)):
        make_images(tmp_path / "images" / split, ["a", "b", "c"], each, seed=each, size=32)
    weights = timm.create_model("test_vit", num_classes=3).state_dict()
    weights["head.bias"][0] = 9  # always the first class
    torch.save(weights, "teacher.pth")
    flags = SMALL.replace("--epochs 2", "--epochs 1").replace("--val-size 20", "--val-size 6") + " --data-dir images"
    teacher = "--teacher-checkpoint teacher.pth --teacher timm/test_vit --allow-weak-teacher"
    student = f"{flags} {teacher} --student timm/test_resnet"
    code, out, errors = run(capsys, "distill.py", f"{student} --dry-run")
    assert code == 0 and "student timm/test_resnet: " in out, errors
    code, out, errors = run(capsys, "distill.py", f"{student} --output run")
    assert code == 0 and "teacher timm/test_vit: 0.31 M parameters, 160 pixels, test accuracy 33.33 %" in out, errors
    assert run(capsys, "export.py", "run/best.pt --format pt2")[0] == 0
    answers = [run(capsys, "predict.py", f"{path} images/test/a --csv") for path in ("run/best.pt", "run/export/best-fp32.pt2")]
    assert answers[0][0] == 0 and len(answers[0][1].splitlines()) == 19 and len(answers[1][1].splitlines()) == 19
    code, _, errors = run(capsys, "train_teacher.py", f"{flags} --model timm/resnet81 --dry-run")
    assert "timm/resnet18" in one_line(code, USAGE, errors)
