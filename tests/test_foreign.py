"""Weights of other projects: whatever their file looks like, they give the logits of the same network; others are refused."""
import json
import os
import pickle
import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Touch, fails
from torch import nn

import models
from diagnostics.classes import Confusion
from models import foreign
from rundir import checkpoint
from rundir.errors import CHECKPOINT, USAGE

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
DATA = SimpleNamespace(classes=[f"class {k}" for k in range(10)], mean=MEAN, std=STD, name="synthetic", image_size=32)
SIZES = {"image_size": 32, "stored_size": 32}
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net():
    """A resnet8 with random weights and statistics."""
    net, generator = models.build("resnet8", 10), torch.Generator().manual_seed(1)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return net.eval()


def other_names(weights):
    """The same tensors as another project calls them."""
    return OrderedDict((f"layer{k // 5}.{k % 5}.{key.rpartition('.')[2]}", tensor)
                       for k, (key, tensor) in enumerate(weights.items()))


LAYOUTS = {
    "bare": lambda w: w, "model": lambda w: {"model": w}, "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "net": lambda w: {"net": w, "acc": 60.28}, "average": lambda w: {"state_dict": {"x": torch.zeros(1)}, "state_dict_ema": w},
    "DataParallel": lambda w: {"state_dict": {f"module.{key}": tensor for key, tensor in w.items()}},
    "compiled": lambda w: {f"_orig_mod.{key}": tensor for key, tensor in w.items()},
    "Lightning": lambda w: {"state_dict": {"criterion.weight": torch.ones(10)} | {f"model.{key}": w[key] for key in w}},
    "torchvision": lambda w: {"model": {"x": torch.zeros(1)}, "epoch": 3, "model_ema": {"n_averaged": torch.tensor(3)} | {
        f"module.{key}": tensor for key, tensor in w.items()}},
    "another entry": lambda w: {"params": {f"timm_model.{key}": tensor for key, tensor in w.items()}, "optimizer": {"state": {}}},
    "both networks": lambda w: {"model": {f"module.{who}.{key}": tensor for who in ("teacher", "student")
                                          for key, tensor in w.items() if who == "student" or "0" in key}, "best_acc": 1.0},
    "without counters": lambda w: {key: tensor for key, tensor in w.items() if not key.endswith("num_batches_tracked")},
    "RepDistiller": lambda w: {"epoch": 240, "model": w, "accuracy": torch.tensor(60.0), "optimizer": {"state": {}}},
    "timm": lambda w: {"arch": "resnet8", "state_dict": w, "state_dict_ema": None, "metric": np.float64(60.0),
                       "args": Namespace(lr=np.float32(0.1), output=Path("x"))},
}


def teacher(path, network="resnet8"):
    return models.load(models.complete(models.read_teacher(path, network), DATA, SIZES))


@pytest.mark.parametrize("layout, renamed, legacy", [*((layout, False, False) for layout in LAYOUTS), ("bare", True, True),
                                                     ("both networks", True, False), ("timm", False, True)])
def test_every_layout_gives_the_same_logits(net, tmp_path, layout, renamed, legacy):
    """Under the names here or others, in the present format of torch.save or that of before torch 1.6."""
    path, weights = tmp_path / "teacher.pth", net.state_dict()
    torch.save(LAYOUTS[layout](other_names(weights) if renamed else weights), path, _use_new_zipfile_serialization=not legacy)
    loaded = teacher(path)
    assert torch.equal(loaded(IMAGES), net(IMAGES)) and loaded.info["classes"] == DATA.classes
    student = models.build("resnet8", 10)
    assert len(models.initialise(student, "resnet8", init=path)) == 64  # the SHA-256 of the file
    assert torch.equal(student.eval()(IMAGES), net(IMAGES)), "with its head, for the same number of classes"


def test_safetensors_are_read(net, tmp_path, monkeypatch):
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        patch.setitem(sys.modules, "safetensors.torch", None)
        with fails(USAGE, path, "safetensors"):
            models.read_teacher(path)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({key: tensor.contiguous() for key, tensor in net.state_dict().items()}, path)
    assert torch.equal(teacher(path)(IMAGES), net(IMAGES))
    names = {f"layer{k}.{key.rpartition('.')[2]}": tensor.contiguous()
             for k, (key, tensor) in enumerate(net.state_dict().items())}
    safetensors.save_file(names, path)
    assert torch.equal(teacher(path)(IMAGES), net(IMAGES)), "by the numbers in the names"
    path.write_bytes(path.read_bytes()[:-9])
    with fails(CHECKPOINT, path, "not made by safetensors"):
        models.read_teacher(path)


def test_a_network_is_known_by_its_tensors(net, tmp_path, capsys):
    torch.save(other_names(net.state_dict()), tmp_path / "teacher.pth")
    assert teacher(tmp_path / "teacher.pth", None).info["model"] == "resnet8"
    assert "resnet8" in capsys.readouterr().out
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "linear.pth")
    with fails(CHECKPOINT, tmp_path / "linear.pth", "--teacher"):
        models.read_teacher(tmp_path / "linear.pth")


def swapped(weights):
    """Running means and variances under each other's names."""
    swap = {"running_mean": "running_var", "running_var": "running_mean"}
    parts = (key.split(".") for key in weights)
    return {".".join([*layer, swap.get(kind, kind)]): tensor for (*layer, kind), tensor in zip(parts, weights.values())}


FIRST, LAST = "layer0.0.weight", "layer11.0.bias"
UNFIT = {  # what is done to the weights under their other names, and words of the line
    "missing": (lambda w: {key: tensor for key, tensor in w.items() if key != FIRST},
                ["layer0.1.weight (16,)", "features.0.0.weight (16, 3, 3, 3)"]),
    "more": (lambda w: w | {"extra.weight": torch.zeros(3)}, ["extra.weight is unexpected"]),
    "shape": (lambda w: w | {FIRST: torch.zeros(2, 2)}, [f"{FIRST} (2, 2)"]),
    "kind": (swapped, ["running_var"]), "not weights": (lambda w: {"model": "resnet8"}, ["no weights"]),
    "head": (lambda w: w | {LAST: torch.zeros(7)}, [f"{LAST} (7,)"]),
    "classes": (lambda w: {key: torch.zeros(7, *tensor.shape[1:]) if tensor.shape[:1] == (10,) else tensor
                           for key, tensor in w.items()},
                ["7 classes, the data 10", "train_teacher.py --model resnet8 --init "]),
    "NaN": (lambda w: w | {FIRST: w[FIRST] * torch.nan}, [FIRST, "not finite"]),
    "quantised": (lambda w: w | {FIRST: w[FIRST].to(torch.int8)}, ["features.0.0.weight is of type int8"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_named(net, tmp_path, case):
    (change, words), weights, path = UNFIT[case], other_names(net.state_dict()), tmp_path / "bad.pth"
    assert [next(iter(weights)), next(reversed(weights))] == [FIRST, LAST]
    torch.save(change(dict(weights)), path)
    with fails(CHECKPOINT, path, *words):
        teacher(path)


@pytest.mark.parametrize("classes, words", [([*DATA.classes[:9], "x"], "10 classes, the data 10; number 9 is 'x', in the data"),
                                            (DATA.classes[:3], "3 classes, the data 10; number 3 is none, in the data")])
def test_other_classes_are_named(classes, words):
    with fails(USAGE, f"t.pt: {words}"):
        models.complete({"classes": classes, "path": "t.pt"}, DATA, SIZES)


def test_the_order_of_classes_in_a_file_is_that_of_the_data(net, tmp_path, capsys):
    path, turned = tmp_path / "teacher.pth", DATA.classes[::-1]
    indices = {name: 9 - k for k, name in enumerate(DATA.classes)}
    for entries in ({"classes": turned}, {"classes": tuple(turned)}, {"class_to_idx": indices}):
        torch.save({"model": net.state_dict()} | entries, path)
        with fails(USAGE, path, "number 0 is 'class 9', in the data 'class 0'"):
            teacher(path)
    torch.save({"model": net.state_dict(), "classes": [f"{name}s" for name in DATA.classes]}, path)
    assert teacher(path).info["classes"] == DATA.classes and "other names (class 0s" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"label_names": turned}))
    assert foreign.class_names({}, tmp_path / "model.safetensors") == turned


def test_exchanged_classes_are_found():
    """Of a, b and c the last two are exchanged; d has no image, and e is taken for a, which is no other order."""
    counts = np.array([[5, 0, 0, 0, 0], [2, 0, 3, 0, 0], [1, 4, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 5]])
    for counts[4] in ((0, 0, 0, 0, 5), (5, 0, 0, 0, 4)):
        assert Confusion(list("abcde"), counts).exchanged == {"b": "c", "c": "b"}
    for counts in (np.ones((5, 1)) * [0, 0, 1, 0, 0], np.random.default_rng(0).multinomial(50, [0.2] * 5, 5)):
        assert Confusion(list("abcde"), counts).exchanged == {}, "one class for all images, and any class"


def test_a_teacher_of_another_image_size_sees_the_same_part_of_an_image(net, tmp_path):
    """Photographs may be stored with a margin: 74 pixels for a student of 64."""
    torch.save(net.state_dict(), tmp_path / "teacher.pth")
    content = models.read_teacher(tmp_path / "teacher.pth", "resnet8")
    for side, crop, stated, image_size, stored_size in ((74, "resized", None, 64, 74), (74, "resized", 96, 96, 111),
                                                        (74, "pad", None, 64, 64), (32, "resized", 32, 32, 32)):
        sizes = models.input_sizes(64, side, crop)
        loaded = models.load(models.complete(content, DATA, sizes, {"image_size": stated}))
        assert [loaded.info[name] for name in ("image_size", "stored_size")] == [image_size, stored_size]
        assert models.centre_crop(loaded, torch.rand(2, 3, side, side)).shape[-1] in (image_size, side)


def test_a_file_with_code_is_refused_and_not_run(tmp_path, recwarn):
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"model": Touch(tmp_path / "ran")}))
    torch.save({"model": os.getpid}, tmp_path / "blocked.pth")  # of a module that torch names in another way
    for name in ("code.pth", "blocked.pth"):
        with fails(CHECKPOINT, tmp_path / name, "not only plain data", "state_dict"):
            models.read_teacher(tmp_path / name)
    for text in ("<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1"):
        (tmp_path / "page.pth").write_text(text)
        with fails(CHECKPOINT, tmp_path / "page.pth", "not made by torch.save"):
            models.read_teacher(tmp_path / "page.pth")
    assert not (tmp_path / "ran").exists() and not recwarn.list


def test_flags_and_numbers_beside_the_weights_are_not_made(net, tmp_path):
    """Also of NumPy before 2.0; nothing but the weights is used of such a file."""
    path = tmp_path / "own.pth"
    torch.save({"model": net.state_dict(), "acc": np.float32(60), "args": Namespace(lr=0.1)}, path,
               _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    assert torch.equal(teacher(path)(IMAGES), net(IMAGES))
    content, _ = checkpoint.read_tensors(path)
    assert [type(content[key]) for key in ("acc", "args")] == 2 * [checkpoint.Ignored] and not vars(content["args"])


def test_a_teacher_sees_images_in_its_own_normalisation(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "teacher.pth")
    own_mean, own_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    stated = {"mean": own_mean, "std": own_std, "image_size": None}
    info = models.complete(models.read_teacher(tmp_path / "teacher.pth", "resnet8"), DATA, SIZES, stated)
    for folded in (False, True):
        loaded = models.load(info, folded=folded, inputs=(MEAN, STD))
        raw, (mean, std, own_mean_, own_std_) = IMAGES, (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD, own_mean, own_std))
        wanted = net((raw - own_mean_) / own_std_)
        torch.testing.assert_close(loaded((raw - mean) / std), wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
    same = models.load(models.complete(models.read_teacher(tmp_path / "teacher.pth", "resnet8"), DATA, SIZES), inputs=(MEAN, STD))
    assert torch.equal(same(IMAGES), net(IMAGES))
