"""Schedule, step, evaluation, early stopping: against numbers worked out by hand or by plain PyTorch."""
import argparse
import copy
import io
import math
import platform
import re
import resource
import sys
from contextlib import redirect_stdout
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import fails
from processes import together

from data.datasets import Split
from losses import Targets
from rundir import errors, terminal
from rundir.errors import Failure
from rundir.run_directory import EpochRow
from training.device import RunContext, global_batch_size, micro_batches, setup_context
from training.distributed import Ranks
from training.evaluation import EarlyStop, Evaluation, check_teacher, evaluate
from training.metrics import MAX_SKIPPED, Metrics, Progress
from training.optimization import StepResult, Update, learning_rate

CPU = RunContext(torch.device("cpu"), "off")
RECIPE = {"lr": 1.0, "epochs": 10, "warmup_epochs": 2, "sched": "cosine", "milestones": [4, 8]}
OPTIMIZERS = [{"opt": "adamw", "lr": 0.1, "weight_decay": 0.05, "momentum": 0.9},
              {"opt": "sgd", "lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9}]
ALL_OPTIMIZERS = [*OPTIMIZERS, OPTIMIZERS[1] | {"momentum": 0.0}]
both_optimizers = pytest.mark.parametrize("recipe", OPTIMIZERS, ids=["adamw", "sgd"])
all_optimizers = pytest.mark.parametrize("recipe", ALL_OPTIMIZERS, ids=["adamw", "sgd", "sgd without momentum"])


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU(),
                               torch.nn.Linear(8, 6))


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 4, 4, generator=g), torch.randint(6, (16,), generator=g)


def updater(model, recipe, *, precision="off", clip_grad=0.0, ema_decay=0.0):
    return Update(model, SimpleNamespace(**recipe, clip_grad=clip_grad, model_ema=ema_decay), RunContext(CPU.device, precision))


def unmixed(labels):
    return Targets(labels, labels, torch.ones(len(labels)))


def take(update, loss, metrics=None):
    """A step with one loss -> whether it was skipped; counted by `metrics`, too."""
    update.backward(loss)
    result = update(0.1)
    if metrics:
        count(metrics, result, loss)
    return result.skipped


def count(metrics, result, loss, terms={}, correct=0.0):
    """Count a step of four images, of which a share is `correct`."""
    metrics.add(torch.eye(4), unmixed((torch.arange(4) + (torch.arange(4) >= 4 * correct)) % 4), loss, terms)
    metrics.end_step(metrics.taken, result)
    metrics.log()


def test_learning_rate_warms_up_linearly_and_falls_by_cosine_or_steps():
    args = SimpleNamespace(**RECIPE)
    rates = [learning_rate(step, args, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 40) for step in range(40)])
    args.sched = "multistep"
    rates = [learning_rate(step, args, 5) for step in range(50)]
    assert (rates[10], rates[19]) == (1.0, 1.0)
    assert rates[20] == rates[39] == pytest.approx(0.1) and rates[40] == rates[49] == pytest.approx(0.01)
    args.warmup_epochs = 0
    assert learning_rate(0, args, 5) == 1.0


@pytest.mark.parametrize("precision, rtol", [("off", 1e-5), ("fp16", 1e-3)])
@both_optimizers
def test_update_is_clip_then_step_of_the_plain_optimizer(recipe, precision, rtol):
    ours, theirs = net(), net()
    plain = (torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.05) if recipe["opt"] == "adamw" else
             torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4))
    update, means, norms = updater(ours, recipe, precision=precision, clip_grad=0.5), Metrics(CPU.ranks, 4, 0.5), []
    for step in range(4):
        images, labels = batch(step)
        take(update, F.cross_entropy(ours(images), labels), means)
        F.cross_entropy(theirs(images), labels).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).item())
        plain.step()
        plain.zero_grad()
    for one, two in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, two, rtol=rtol, atol=0.1 * rtol)
    columns, looked = means.epoch_columns(1)
    assert columns["grad_norm_mean"] == pytest.approx(sum(norms) / 4, rel=rtol)
    assert columns["grad_norm_max"] == pytest.approx(max(norms), rel=rtol)
    assert columns["clip_frac"] == sum(norm > 0.5 for norm in norms) / 4 and columns["steps"] == 4
    assert looked["clip_factor"] == pytest.approx(sum(min(1, 0.5 / norm) for norm in norms) / 4, rel=rtol)
    assert update.amp_scale() == (65536 if precision == "fp16" else None) and columns["skipped_steps"] == 0
    take(update, F.cross_entropy(ours(images), labels), means)
    assert means.epoch_columns(2)[0]["steps"] == 1, "the counts start again every epoch"


@both_optimizers
def test_a_batch_in_parts_takes_the_step_of_the_whole(recipe):
    """In a network without BatchNorm, whose statistics are those of a part."""
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6))
        update = Update(model, SimpleNamespace(**recipe, clip_grad=0.5, model_ema=0.0), CPU, parts)
        means = Metrics(CPU.ranks, 3, 0.5)
        for step in range(3):
            images, labels = batch(step)
            for rows in micro_batches(range(16), parts):
                logits = model(images[rows.start:rows.stop])
                loss = F.cross_entropy(logits, labels[rows.start:rows.stop])
                update.backward(loss)
                means.add(logits, unmixed(labels[rows.start:rows.stop]), loss, {})
            means.end_step(means.taken, update(0.1))
            means.log()
        results.append((model[1].weight.detach(), means.epoch_columns(1)[0]))
    (whole, columns), (parted, of_parts) = results
    torch.testing.assert_close(parted, whole, rtol=1e-5, atol=1e-6)
    assert of_parts == pytest.approx(columns, rel=1e-5)
    for rows, count in ((range(16), 3), (range(12), 4), (range(4), 8)):
        with fails(2, f"--grad-accum {count} of {len(rows)} images"):
            micro_batches(rows, count)
    data, pair = SimpleNamespace(train=SimpleNamespace(labels=range(76))), replace(CPU, ranks=Ranks(size=2))
    for each, words in ((7, "odd --batch-size"), (40, "2 times 40 of 76 images")):
        with fails(2, words):
            global_batch_size(each, data, pair)


@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
@all_optimizers
@pytest.mark.parametrize("sick", [0, 2])
def test_a_sick_step_leaves_no_trace(recipe, precision, sick):
    """Weights, momentum and running statistics are bit for bit those of a run without that step, the first or a later one."""
    ours, without = net(), net()
    update, plain = (updater(model, recipe, precision=precision, clip_grad=1.0) for model in (ours, without))
    counts, healthy = Metrics(CPU.ranks, 5, 1.0), Metrics(CPU.ranks, 4, 1.0)
    for step in range(5):
        images, labels = batch(step)
        if step == sick:
            skipped = take(update, F.cross_entropy(ours(images * math.nan), labels), counts)
        else:
            skipped = take(update, F.cross_entropy(ours(images), labels), counts)
            take(plain, F.cross_entropy(without(images), labels), healthy)
        assert skipped.item() == (step == sick)
    both = [tensors(each.state_dict()) for each in (update, plain)]
    assert both[0].keys() == both[1].keys()
    assert [key for key, value in both[0].items() if not torch.equal(value, both[1][key])] == []
    columns, healthy = counts.epoch_columns(1)[0], healthy.epoch_columns(1)[0]
    assert columns["skipped_steps"] == 1 and columns["grad_norm_mean"] == healthy["grad_norm_mean"]
    assert update.amp_scale() == (32768 if precision == "fp16" else None)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@all_optimizers
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(recipe, ema_decay):
    update = updater(torch.nn.Linear(1000, 100), recipe, ema_decay=ema_decay)
    foreseen = update.checkpoint_bytes
    take(update, update.net(torch.ones(2, 1000)).sum())
    kept = sum(value.nbytes for value in tensors(update.state_dict()).values())
    assert foreseen == update.checkpoint_bytes == pytest.approx(kept, rel=1e-3)


def tensors(tree, path=""):
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    inside = tree.items() if isinstance(tree, dict) else ()
    return {name: leaf for key, value in inside for name, leaf in tensors(value, f"{path}/{key}").items()}


def test_a_loss_scale_that_cannot_fall_any_more_ends_the_run():
    model, (images, labels) = net(), batch()
    update = updater(model, OPTIMIZERS[1], precision="fp16", clip_grad=1.0)
    for _ in range(31):
        take(update, F.cross_entropy(model(images), labels) * math.inf)
    with fails(6, "overflows FP16 at any loss scale (now 3.05e-05"):
        update.amp_scale()


def test_moving_average():
    """Its decay is 0, 1 / 10, 2 / 11, ... up to the given one, and counts on in a restored run, bit for bit."""
    model, other = net(), net(seed=1)
    update, restored = (updater(each, OPTIMIZERS[0], ema_decay=0.15) for each in (model, other))
    images, labels = batch()
    expected = torch.zeros(8, 48)
    for decay in (0, 0.1, 0.15, 0.15):
        take(update, F.cross_entropy(model(images), labels))
        if decay:
            take(restored, F.cross_entropy(other(images), labels))
        else:
            restored.load_state_dict(copy.deepcopy(update.state_dict()))
        expected = decay * expected + (1 - decay) * model[1].weight.detach()
        torch.testing.assert_close(update.evaluated[1].weight, expected)
    assert torch.equal(restored.evaluated[1].weight, update.evaluated[1].weight)
    assert update.evaluated is not model and updater(model, OPTIMIZERS[0]).evaluated is model


def test_means_leave_out_skipped_steps_and_name_the_first_term_that_is_not_finite():
    means = Metrics(CPU.ranks, 3 + MAX_SKIPPED)
    no, yes = torch.tensor([0.0, 1.0])
    sick = {"loss": math.nan, "ce": 1.0, "kl": math.inf}
    healthy = {"loss": 3.0, "ce": 2.0, "kl": 1.0}

    def add(skipped, correct, **losses):
        loss, *terms = map(torch.tensor, losses.values())
        result = StepResult(skipped, torch.tensor(1.0), None, match_factor=torch.tensor(correct))
        count(means, result, loss, dict(zip(("ce", "kl"), terms)), correct)

    add(no, 1.0, **healthy | {"loss": 1.0})
    add(no, 0.5, **healthy)
    add(yes, 0.0, **sick)
    assert means.means() == {"train_loss": 2.0, "train_loss_ce": 2.0, "train_loss_kl": 1.0, "train_acc1": 75.0}
    columns, diagnostics = means.epoch_columns(1)
    assert diagnostics["match_factor"] == 0.75 and columns["train_loss"] == 2.0
    assert (columns["steps"], columns["skipped_steps"]) == (3, 1)
    add(yes, 0.0, **sick)
    with fails(6, "train_loss_kl is not finite (all steps of epoch 2 were skipped"):
        means.epoch_columns(2)
    means.clear()
    add(no, 0.0, **healthy)
    for _ in range(MAX_SKIPPED):
        add(yes, 0.0, **healthy)
    with fails(6, "the gradient is not finite (more than 20 consecutive steps"):
        add(yes, 0.0, **healthy)


def test_evaluate_counts_every_image_once():
    """In batches of one size: cuDNN searches for its fastest convolutions at each new size."""
    g = torch.Generator().manual_seed(0)
    split = Split(torch.randint(256, (53, 4, 4, 3), generator=g, dtype=torch.uint8), torch.randint(6, (53,), generator=g))
    model, sizes = net().train(), []
    hook = model.register_forward_pre_hook(lambda net, inputs: sizes.append(len(inputs[0])))
    result = evaluate(model, split, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), CPU, batch_size=10)
    hook.remove()
    assert model.training and sizes == [10] * 6
    images = (split.images.float() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    logits = model.eval()(images.permute(0, 3, 1, 2)).detach()
    assert result.loss == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-5)
    assert result.acc1 == pytest.approx(100 * (logits.argmax(1) == split.labels).float().mean().item())
    rank = (logits > logits.gather(1, split.labels[:, None])).sum(1)
    assert result.acc5 == pytest.approx(100 * (rank < 5).float().mean().item())
    assert torch.equal(result.predictions, logits.argmax(1))
    confidence, predicted = logits.softmax(1).max(1)
    bins, right = (confidence * 15).long().clamp(max=14), (predicted == split.labels).float()
    ece = sum(abs((confidence - right)[bins == each].sum().item()) for each in range(15)) / 53
    assert result.ece == pytest.approx(ece, abs=1e-6)
    flipped = result._replace(predictions=torch.cat([result.predictions[:50], (result.predictions[50:] + 1) % 6]))
    assert result.agreement(flipped) == pytest.approx(50 / 53)


def test_early_stop_counts_epochs_without_a_better_one():
    def val(loss, acc1=50.0):
        return Evaluation(loss, acc1, 90.0, 0.1, torch.zeros(1))

    stop = EarlyStop("val_loss", patience=2)
    assert [stop.update(epoch, val(loss)) for epoch, loss in enumerate([2.0, 1.0, 1.0], 1)] == [True, True, False]
    assert not stop.stop and stop.columns() == {"best_val_loss": 1.0, "best_epoch": 2, "bad_epochs": 1}
    stop.update(4, val(1.5))
    assert stop.stop and stop.best_epoch == 2
    accuracy = EarlyStop("val_acc1", patience=0)
    assert [accuracy.update(epoch, val(1.0, acc1)) for epoch, acc1 in enumerate([10, 30, 20], 1)] == [True, True, False]
    assert not accuracy.stop, "patience 0 never stops"
    with fails(6, "val_loss is not finite in epoch 3"):
        stop.update(3, val(math.nan))


def test_a_teacher_that_does_not_match_its_checkpoint_is_refused(capsys):
    split = Split(torch.randint(256, (200, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
                  torch.arange(200) % 6)
    data = SimpleNamespace(classes=list("abcdef"), name="imagefolder", test=split, image_size=4, mean=(0.5,) * 3, std=(0.25,) * 3,
                           fingerprint="0")
    teacher = net().eval()
    found = evaluate(teacher, split, data.mean, data.std, CPU, 50)
    info = {"classes": list("abcdef"), "dataset": "imagefolder", "test_acc1": found.acc1, "amp": "off", "model": "net",
            "image_size": 4, "stored_size": 4, "mean": data.mean, "std": data.std, "data_sha256": "0"}
    teacher.size = 0
    for change in ({}, {"test_acc1": found.acc1 + 0.5}, {"test_acc1": found.acc1 - 3, "amp": "bf16"}):  # one image, and six
        teacher.info = info | change
        assert check_teacher(teacher, data, CPU, 50, allow_weak=True).acc1 == found.acc1
    data.image_size = 8  # photographs, decoded to another size than for the teacher: not the same pixels
    teacher.info = info | {"test_acc1": 90.0}
    assert check_teacher(teacher, data, CPU, 50, allow_weak=True).acc1 == found.acc1
    assert "on images of 8 pixels; in its checkpoint 90.00 %, of 4" in capsys.readouterr().out
    data.image_size = 4
    teacher.info |= {"data_sha256": "1"}  # as after a photograph was added
    assert check_teacher(teacher, data, CPU, 50, allow_weak=True).acc1 == found.acc1
    assert "on these images; on those of its checkpoint 90.00 %" in capsys.readouterr().out
    never_right = SimpleNamespace(**vars(data) | {"test": Split(split.images, (found.predictions + 1) % 6)})
    for data, change, words in ((data, {"test_acc1": found.acc1 + 1}, "0.78 points"),
                                (data, {"test_acc1": found.acc1 - 4, "amp": "bf16"}, "3.33 points"),
                                (never_right, {"test_acc1": None}, "0.00 % of 200 test images")):
        teacher.info = info | change
        with fails(2, words):
            check_teacher(teacher, data, CPU, 50)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_and_its_estimate_after_a_pause(monkeypatch):
    """Epochs of 10 s, and an hour's pause in the second of nine."""
    now, means, row = [0.0], Metrics(CPU.ranks, 1), dict.fromkeys(field.name for field in fields(EpochRow))
    monkeypatch.setattr("training.metrics.time.perf_counter", lambda: now[0])
    count(means, StepResult(torch.tensor(0.0), torch.tensor(1.0), None), torch.tensor(1.5))
    row |= {"lr": 1.0, "train_loss": 1.0, "train_acc1": 1.0, "val_acc1": 1.0, "val_loss": 1.0, "images_per_s": 1.0}
    for screen in (io.StringIO(), Terminal()):
        with redirect_stdout(screen):
            progress = Progress(9, 2, 8)
            for epoch in range(1, 5):
                now[0] += 5 + 3600 * (epoch == 2)
                progress.step(epoch, 0, 0.1, means)
                now[0] += 5
                progress.epoch(EpochRow(**row | {"epoch": epoch}), best=False)
        assert ("[1/2]" in screen.getvalue() and " loss 1.500" in screen.getvalue()) == screen.isatty()
    assert re.findall(r"eta (\S+)", screen.getvalue()) == [
        "0:01:25", "0:01:20", "0:01:15", "0:01:10", "0:01:05", "0:01:00", "0:00:55", "0:00:50"]
    assert terminal.clock(3725.4) == "1:02:05"


def test_a_line_takes_the_place_of_the_live_one(monkeypatch):
    def stop(args):
        raise Failure(6, "the loss is not finite", "lower --lr")

    monkeypatch.setenv("COLUMNS", "12")
    screen, log = Terminal(), io.StringIO()
    with redirect_stdout(screen):
        terminal.live("epoch 1/20 [1/100]")
        terminal.say("a line")
    terminal.say("a line", log)
    assert screen.getvalue() == "\r\033[Kepoch 1/20 \r\033[Ka line\n" and log.getvalue() == "a line\n"
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with pytest.raises(SystemExit):
        errors.run(stop, argparse.Namespace(debug=False))
    assert screen.getvalue() == "\r\033[Kerror: the loss is not finite. lower --lr\n"


def keep_the_pages_of_a_tensor(context):
    setup_context("cpu", None, 0)
    faults = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**20)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[10:]) < 1000, faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_memory_that_a_step_frees_is_there_for_the_next_one():
    """Without it, each 4 MB tensor is 1024 pages that the kernel hands out anew; measured in a process of its own."""
    together(1, keep_the_pages_of_a_tensor)
