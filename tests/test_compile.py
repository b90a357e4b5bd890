"""--compile: the same losses, and one line where it cannot be done."""
import functools

import pytest
import torch
from command import run
from helpers import make_images, table_of

FLAGS = ("--dataset imagefolder --data-dir {place}/images --warmup-epochs 0 --batch-size 8 --val-size 12 --device cpu "
         "--model resnet8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("compile")
    make_images(place / "images", ["a", "b", "c"], 16, seed=0)
    return place


def test_networks_that_cannot_be_compiled_are_one_line(place, capsys, monkeypatch):
    def refuse(net, mode):
        def call(images):
            raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no C++ compiler\nand more"), None)
        return call

    monkeypatch.setattr(torch, "compile", refuse)
    code, out, err = run(capsys, "train_teacher.py",
                         f"{FLAGS.format(place=place)} --compile --epochs 1 --output {place / 'refused'}")
    assert code == 2 and "the first step takes a minute or more" in out
    assert err.startswith("error: the networks cannot be compiled (BackendCompilerFailed: ") and err.count("\n") == 1
    assert err.endswith("leave out --compile\n")


def test_compiled_networks_learn_the_same(place, capsys, monkeypatch):
    """As PyTorch traces them; the code generator behind it takes a minute and a C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    found, begun = [], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    for how in ("", "--compile"):
        flags = f"{FLAGS.format(place=place)} --epochs 1 {how} --output {place / f'how{how}'}"
        code, out, err = run(capsys, "train_teacher.py", flags)
        assert code == 0 and ("torch.compile" in out) == bool(how), err
        found += table_of(place / f"how{how}" / "log.csv")
    for name in ("train_loss", "val_loss", "grad_norm_mean"):
        assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-3)
    assert len(begun) == int(found[1]["steps"])
