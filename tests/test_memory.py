"""The estimate of a run's memory against what steps hold: ours on fake tensors, which have shapes only, within 2 %; a forward
pass under CUDA's autocast on fake CUDA tensors, within 2 %, a ViT within 10 %; a whole run on real tensors, within 10 %."""
import copy
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_scripts
import torch
from cuda_path import CudaPath
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks import memory as benchmark
from losses import Targets, kd_loss
from training import memory, models
from training.machine import Machine
from training.memory import Estimate, Live
from training.options import parse_teacher
from training.recompute import recompute
from training.run import Run
from training.step import Update, build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # deep copies ask for it
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def update_of(name, size=32, *, precision="off", checkpoint=False, parts=1, opt="adamw", ema_decay=0.0):
    net = models.build(name, 100, size)
    if checkpoint:
        recompute(net, name)
    recipe = SimpleNamespace(opt=opt, lr=1e-3, momentum=0.9, weight_decay=0.05)
    return Update(net, build_optimizer(net, recipe), Machine(CPU, precision), 1.0, ema_decay, parts)


def teacher_of(name, size, dtype):
    net = models.build(name, 100, size).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(dtype)
    return net


def step(update, machine, rows, size, parts=1, teacher=None, look=True) -> None:
    """As the scripts take one."""
    for _ in range(parts):
        images = torch.empty(rows, 3, size, size, dtype=machine.dtype).contiguous(memory_format=torch.channels_last)
        label = torch.zeros(rows, dtype=torch.int64)
        with machine.autocast():
            with torch.no_grad():
                teacher_logits = teacher(images) if teacher else torch.empty(rows, 100)
            logits = update.net(images)
        loss, _ = kd_loss(logits, teacher_logits, Targets(label, label, torch.empty(rows)))
        update.backward(loss)
    update(0.1, look)


def held(update, teacher) -> list:
    """One tensor of each storage that is there before a step."""
    moments = [tensor for state in update.optimizer.state.values() for tensor in state.values()]
    averaged = [*update.average.module.parameters(), update.average_buffers.words] if update.average else []
    taught = [*teacher.parameters(), *teacher.buffers()] if teacher else []
    return [*update.parameters, update.buffers.words, update.before, *moments, *averaged, *taught]


CASES = [  # student, teacher, images at once, their size, flags
    ("resnet8", None, 64, 32, {"opt": "sgd"}), ("resnet8", "resnet20", 64, 32, {"precision": "bf16", "ema_decay": 0.5}),
    ("resnet8", "resnet20", 64, 32, {"precision": "bf16", "checkpoint": True}),
    ("resnet8", "resnet20", 16, 64, {"checkpoint": True, "parts": 2, "ema_decay": 0.5, "opt": "sgd"}),
    ("resnet8x4", "resnet32x4", 128, 32, {"opt": "sgd"}),
    ("resnet8x4", "resnet32x4", 128, 32, {"opt": "sgd", "precision": "bf16", "checkpoint": True}),
    ("v2_pico", "v2_tiny", 32, 32, {}), ("v2_pico", "v2_tiny", 32, 32, {"precision": "bf16", "parts": 2, "checkpoint": True}),
    ("v2_pico", "v2_tiny", 256, 32, {"precision": "fp16", "checkpoint": True}),
    ("efficientnet_v2_s", None, 128, 32, {"precision": "bf16"}),
    ("efficientnet_v2_s", None, 64, 128, {"precision": "bf16", "checkpoint": True, "ema_decay": 0.9}),
    ("swin_t", None, 32, 64, {"checkpoint": True, "parts": 2})]


@pytest.mark.parametrize("student, teacher, rows, size, flags", CASES)
def test_a_step_holds_what_was_estimated(student, teacher, rows, size, flags):
    machine, parts = Machine(CPU, flags.get("precision", "off")), flags.get("parts", 1)
    real, taught = update_of(student, size, **flags).net, teacher and teacher_of(teacher, size, machine.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in [*real.modules(), *(taught.modules() if taught else ())]:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        empty = torch.empty_like(tensor, requires_grad=tensor.requires_grad)
                        table[name] = torch.nn.Parameter(empty, tensor.requires_grad) if table is module._parameters else empty
        recipe = SimpleNamespace(opt=flags.get("opt", "adamw"), lr=1e-3, momentum=0.9, weight_decay=0.05)
        update = Update(real.train(), build_optimizer(real, recipe), machine, 1.0, flags.get("ema_decay", 0.0), parts)
    estimate = Estimate.of(update, machine, rows=rows, image_size=size, parts=parts, teacher=taught)
    before = held(update, taught)
    with mode, Live(before) as live:
        for _ in range(2):
            step(update, machine, rows, size, parts, taught)
    truth = sum(tensor.untyped_storage().nbytes() for tensor in before) + live.peak
    assert estimate.total == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("name, rows, size, tolerance", [
    ("resnet8x4", 64, 32, 0.02), ("efficientnet_v2_s", 32, 64, 0.02), ("resnet50", 16, 64, 0.02), ("convnext_tiny", 16, 64, 0.02),
    ("swin_v2_t", 16, 64, 0.02), ("vit_b_32", 32, 224, 0.1)])
def test_autocast_on_cuda_keeps_what_was_estimated(tmp_path, name, rows, size, tolerance):
    """All that is alive at the end of a forward pass: activations, and weights that were cast."""
    net = models.build(name, 100, size).train()
    images, tensors = torch.empty(rows, 3, size, size, dtype=torch.float16, device="meta"), memory.on_meta(net)
    with Live([*tensors.values(), images]) as estimated, memory.Autocast(torch.float16):
        logits = torch.func.functional_call(net, tensors, images)
    with CudaPath(tmp_path) as path:
        net.to("cuda")
        with path.mode:
            images = torch.empty(rows, 3, size, size, dtype=torch.float16, device="cuda")
            with Live([*net.parameters(), *net.buffers(), images]) as live, torch.autocast("cuda", torch.float16):
                logits = logits, net(images)
    assert estimated.now == pytest.approx(live.now, rel=tolerance) and len(logits) == 2


@pytest.mark.parametrize("name, rows, flags", [("resnet8", 64, {}), ("v2_pico", 128, {"precision": "bf16"})])
def test_pytorchs_own_tracker_counts_the_same(name, rows, flags):
    """On real tensors, and without a step before, so that it sees AdamW's moments being made."""
    update, machine = update_of(name, **flags), Machine(CPU, flags.get("precision", "off"))
    estimate, tracker = Estimate.of(update, machine, rows=rows, image_size=32), MemTracker()
    tracker.track_external(update.net, update.optimizer, update.before)
    update.net.train()
    with tracker:
        step(update, machine, rows, 32, look=False)
    assert estimate.total == pytest.approx(tracker.get_tracker_snapshot("peak")[CPU]["Total"], rel=0.03)


def test_a_whole_run_holds_what_it_prints(tmp_path, monkeypatch, capsys):
    """Data, augmentation, loss and diagnostics included: real tensors, each counted from when it is made."""
    start, end, peaks = Run.start, Run.end_training, []
    for seed, split in enumerate(("train", "test")):
        test_scripts.make_images(tmp_path / "images" / split, [f"class{index}" for index in range(6)], 24, seed, size=32)
    monkeypatch.chdir(tmp_path)
    with Live(()) as live:
        monkeypatch.setattr(Run, "start", lambda *args, **facts: (start(*args, **facts), setattr(live, "peak", live.now)))
        monkeypatch.setattr(Run, "end_training", lambda run: (peaks.append(live.peak), end(run)))
        for script, flags in (("train_teacher.py", "--model resnet20 --output teacher"),
                              ("distill.py", "--student resnet8 --teacher-checkpoint teacher/best.pt --model-ema 0.9")):
            code, out, err = test_scripts.run(capsys, script, f"{test_scripts.SMALL} --data-dir images --epochs 1 "
                                              f"--batch-size 100 {flags}")
            assert code == 0, err
            said = re.search(r"^memory: about (\d+) MiB \(.*\), of [\d.]+ GiB$", out, re.M)
            assert int(said[1]) * 2**20 == pytest.approx(peaks.pop(), rel=0.1) and "warning" not in err


def test_nothing_is_drawn_and_nothing_changes():
    update = update_of("efficientnet_v2_s", checkpoint=True)
    net = update.net.train()
    net.features[1].eval()
    teacher = teacher_of("resnet8", 32, torch.bfloat16)
    state, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [module.training for module in net.modules()]
    Estimate.of(update, Machine(CPU, "bf16"), rows=8, image_size=32, teacher=teacher)
    assert torch.equal(torch.get_rng_state(), generator) and [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None and not parameter.is_meta for parameter in net.parameters())


def test_each_flag_that_saves_memory_saves_it():
    def step_of(rows=64, parts=1, **flags):
        return Estimate.of(update_of("efficientnet_v2_s", 128, **flags), Machine(CPU, "bf16"), rows=rows, image_size=32,
                           parts=parts).step

    plain = step_of()
    assert step_of(checkpoint=True) < 0.4 * plain and step_of(rows=16, parts=4) < 0.5 * plain


def test_a_graph_has_memory_of_its_own():
    """The teacher works beside the student, on the next batch, and evaluation comes on top."""
    update, teacher, machine = update_of("resnet8"), teacher_of("resnet20", 32, torch.float32), Machine(CPU, "off")
    images = torch.zeros(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def peak(net) -> int:
        with torch.no_grad(), Live([*net.parameters(), *net.buffers(), images]) as live:
            net.eval()(images)
        return live.peak

    def total(**more) -> int:
        return Estimate.of(update, machine, rows=16, image_size=32, **more).total

    weights = memory.nbytes([*teacher.parameters(), *teacher.buffers()])
    for parts in (1, 2):
        alone = total(parts=parts)
        assert total(parts=parts, graph=True) - alone == pytest.approx(peak(update.net) + images.nbytes, rel=1e-3)
        assert total(parts=parts, graph=True, teacher=teacher) - alone == pytest.approx(
            weights + peak(update.net) + images.nbytes, rel=1e-3)


def test_a_copy_of_all_gradients_is_for_other_processes():
    update, machine = update_of("resnet8"), Machine(CPU, "off")
    both = machine._replace(ranks=SimpleNamespace(size=2, first=True))
    more = [Estimate.of(update, each, rows=8, image_size=32).weights for each in (machine, both)]
    assert more[1] - more[0] == sum(parameter.nbytes for parameter in update.parameters)


def test_where_it_may_not_fit_a_warning_names_what_helps(monkeypatch, capsys):
    args, update, machine = parse_teacher("", "", ["--batch-size", "8"]), update_of("resnet8"), Machine(CPU, "off")

    def said(limit, update=update, machine=machine, **rest):
        monkeypatch.setattr(memory, "available", lambda device: limit)
        memory.report(args, update, machine, rows=8, image_size=32, **rest)
        return capsys.readouterr()

    total = Estimate.of(update, machine, rows=8, image_size=32).total
    out, err = said(total * 2)
    assert out == "memory: about 6 MiB (weights and optimizer 1, images 0, activations and gradients 5), of 0.0 GiB\n"
    assert err == ""
    _, err = said(total)
    assert err.startswith("warning: ") and err.endswith(" use --grad-checkpoint or --grad-accum 2 or --batch-size 4\n")
    _, err = said(total, graph=True)
    assert err.endswith(" use --grad-checkpoint or --grad-accum 2 or --batch-size 4 or --no-cuda-graph\n")
    args.grad_checkpoint, args.grad_accum = True, 2
    assert said(total).err.endswith(" use --grad-accum 4 or --batch-size 4\n")
    assert said(total, machine=machine._replace(ranks=SimpleNamespace(size=2, first=False))) == ("", "")
    update.net.register_forward_pre_hook(lambda net, inputs: inputs[0].sum().item())
    out, err = said(total)
    assert out.startswith("memory: not estimated (") and (out.count("\n"), err) == (1, "")


def test_the_memory_of_this_machine():
    assert 2**28 < memory.available(CPU) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_it_is_quick():
    update, begun = update_of("efficientnet_v2_s", checkpoint=True), time.process_time()
    Estimate.of(update, Machine(CPU, "bf16"), rows=128, image_size=32)
    assert time.process_time() - begun < 5  # under 1 s alone; this only catches arithmetic on real tensors


def test_the_largest_batch_is_the_largest_that_fits():
    pair = benchmark.Pair("resnet20", "resnet8", 32)
    study = benchmark.Study(pair)
    for checkpoint in (False, True):
        rows = study.largest(checkpoint, 0.5)
        assert study.total(checkpoint, rows) <= 0.5 * memory.GIB * memory.USABLE < study.total(checkpoint, rows + benchmark.STEP)
    assert study.largest(True, 0.5) > study.largest(False, 0.5) and study.largest(False, 0.01) == 0


def test_the_table_is_made_by_its_command():
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^resnet20 -> resnet8 ", done.stdout, re.M)) == 2
