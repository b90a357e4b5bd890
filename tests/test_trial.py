"""--amp auto, --compile and --compile auto: what is tried, what is said, and what a resumed run does."""
import functools
import json

import pytest
import torch
from test_scripts import make_images, run
from torch import nn

from training import models, trial
from training.machine import Machine, prepare_machine

CPU = Machine(torch.device("cpu"), "auto", compiled="auto")
FLAGS = ("--dataset imagefolder --data-dir {place}/images --warmup-epochs 0 --batch-size 8 --val-size 12 --device cpu "
         "--model resnet8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("trial")
    make_images(place / "images", ["a", "b", "c"], 16, seed=0, size=32)
    return place


def networks(machine):
    """A teacher and a student that are as slow as the machine is named to be."""
    return nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)


def settle(monkeypatch, machine, steps, **ms):
    """With a clock that says `ms` for each kind of machine."""
    asked = []

    def step_ms(machine, teacher, student, images):
        asked.append((machine.precision, machine.compiled, images.dtype))
        return ms["compiled" if machine.compiled else machine.precision]

    monkeypatch.setattr(trial, "step_ms", step_ms)
    return trial.settle(machine, networks, 4, 8, steps), asked


@pytest.mark.parametrize("fp32, bf16, chosen", [(30.0, 20.0, "bf16"), (20.0, 30.0, "off")])
def test_the_faster_precision_is_taken(monkeypatch, capsys, fp32, bf16, chosen):
    machine, asked = settle(monkeypatch, CPU._replace(compiled=False), 100, off=fp32, bf16=bf16)
    assert machine == CPU._replace(precision=chosen, compiled=False)
    assert f"--amp auto: {chosen}; the networks took {bf16} ms a step in bf16, {fp32} in fp32" in capsys.readouterr().out
    assert asked[:2] == [("off", False, torch.float32), ("bf16", False, torch.bfloat16)] and len(asked) == 2 * (trial.STEPS + 1)


@pytest.mark.parametrize("steps, compiled_ms, compiled, said", [
    (29_999, 1.0, False, "--compile auto: no, because the run takes about 10.0 minutes"),
    (30_000, 15.0, True, "--compile auto: yes; the networks took 15.0 ms a step compiled, 20.0 as they are"),
    (30_000, 25.0, False, "--compile auto: no; the networks took 25.0 ms a step compiled, 20.0 as they are")])
@pytest.mark.parametrize("precision", ["auto", "off"])
def test_networks_are_compiled_where_the_run_is_long_enough(monkeypatch, capsys, precision, steps, compiled_ms, compiled, said):
    monkeypatch.setattr(torch, "compile", lambda net, mode: net)
    machine, asked = settle(monkeypatch, CPU._replace(precision=precision), steps, off=20.0, bf16=22.0, compiled=compiled_ms)
    assert machine == CPU._replace(precision="off", compiled=compiled) and said in capsys.readouterr().out
    assert any(each[1] for each in asked) == (steps >= 30_000)


def test_networks_that_cannot_be_compiled_are_left_as_they_are(monkeypatch, capsys):
    def refuse(net, mode):
        raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no C++ compiler\nand more"), None)

    monkeypatch.setattr(torch, "compile", refuse)
    machine, _ = settle(monkeypatch, CPU._replace(precision="off"), 30_000, off=20.0)
    assert machine == CPU._replace(precision="off", compiled=False)
    assert "--compile auto: no, because they cannot be compiled (BackendCompilerFailed: " in capsys.readouterr().out


def test_compiled_networks_are_tried(monkeypatch):
    """As PyTorch traces them: a folded teacher and a student of ours."""
    def networks(machine):
        teacher, student = (models.build("resnet8", 10) for _ in range(2))
        return models.fold(teacher.eval().requires_grad_(False), 32), student

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(trial, "STEPS", 2)
    machines = {name: CPU._replace(precision="off", compiled=name == "compiled") for name in ("eager", "compiled")}
    ms = trial.compare(machines, networks, 4, 32)
    assert set(ms) == set(machines) and min(ms.values()) > 0


def test_a_trial_step_trains_nothing(monkeypatch):
    teacher, student = nn.Conv2d(3, 4, 3).requires_grad_(False), nn.Conv2d(3, 4, 3)
    before = student.weight.clone()
    assert trial.step_ms(CPU._replace(compiled=False), teacher, student, torch.rand(2, 3, 8, 8)) > 0
    assert trial.step_ms(CPU._replace(compiled=False), None, student, torch.rand(2, 3, 8, 8)) > 0
    assert torch.equal(before, student.weight) and student.weight.grad is None


def test_a_cpu_without_bf16_instructions_stays_with_fp32(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert prepare_machine("cpu", "auto", 0).precision == "off"
    assert "this CPU has no instructions for bf16" in capsys.readouterr().out


def test_a_resumed_run_keeps_what_the_trial_found(place, capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(trial, "step_ms", lambda machine, *_: 1.0 if machine.precision == "bf16" else 2.0)
    flags = f"{FLAGS.format(place=place)} --amp auto --compile auto --output {place / 'auto'}"
    weights = torch.random.get_rng_state()
    code, out, err = run(capsys, "train_teacher.py", f"{flags} --epochs 1")
    assert code == 0 and "--amp auto: bf16" in out and "--compile auto: no, because the run takes about 0.0 minutes" in out, err
    assert not torch.equal(weights, torch.random.get_rng_state())
    monkeypatch.setattr(trial, "step_ms", None)  # no second trial
    code, out, err = run(capsys, "train_teacher.py", f"{flags} --epochs 2 --resume auto --patience 0")
    config = json.loads((place / "auto" / "config.json").read_text())
    assert (code, config["amp"], config["compile"]) == (0, "bf16", False), err
    code, _, err = run(capsys, "train_teacher.py", f"{flags.replace('--amp auto', '--amp off')} --epochs 2 --resume auto")
    assert code == 2 and "--amp bf16 -> off" in err


def test_a_trial_leaves_the_weights_of_the_run_as_they_are(place, capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(trial, "step_ms", lambda machine, *_: 2.0 if machine.precision == "bf16" else 1.0)
    logs = []
    for amp in ("off", "auto"):
        folder = place / f"weights-{amp}"
        code, _, err = run(capsys, "train_teacher.py", f"{FLAGS.format(place=place)} --amp {amp} --epochs 1 --output {folder}")
        assert code == 0, err
        logs.append([line.split(",")[:-5] for line in (folder / "log.csv").read_text().splitlines()])
    assert logs[0] == logs[1]


def test_networks_that_cannot_be_compiled_are_one_line(place, capsys, monkeypatch):
    def refuse(net, mode):
        def call(images):
            raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no C++ compiler\nand more"), None)
        return call

    monkeypatch.setattr(torch, "compile", refuse)
    code, out, err = run(capsys, "train_teacher.py",
                         f"{FLAGS.format(place=place)} --compile --epochs 1 --output {place / 'refused'}")
    assert code == 2 and "compiling the networks, which takes a minute or more" in out
    assert err.startswith("error: the networks cannot be compiled (BackendCompilerFailed: ") and err.count("\n") == 1
    assert err.endswith("leave out --compile\n")


def test_compiled_networks_learn_the_same(place, capsys, monkeypatch):
    """As PyTorch traces them; the code generator behind it takes a minute and a C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found, begun = [], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    for how in ("", "--compile"):
        flags = f"{FLAGS.format(place=place)} --epochs 1 {how} --output {place / f'how{how}'}"
        code, out, err = run(capsys, "train_teacher.py", flags)
        assert code == 0 and ("compiled in" in out) == bool(how), err
        header, row = ((place / f"how{how}" / "log.csv").read_text()).splitlines()
        found.append(dict(zip(header.split(","), row.split(","))))
    for name in ("train_loss", "val_loss", "grad_norm_mean"):
        assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-3)
    assert len(begun) == int(found[1]["steps"])
