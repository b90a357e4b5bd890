"""Gradient checkpointing changes no number: losses, gradients, weights, running statistics, moving average, whole runs."""
import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
import torture
from command import SMALL, run
from helpers import make_images
from torch import nn
from torchvision.models import SwinTransformer
from torchvision.ops import StochasticDepth

import models
from losses import Targets, mixed_ce
from models import cifar_networks
from training.device import RunContext
from training.distributed import Ranks
from training.grad_checkpoint import FrozenStatistics, blocks, recompute
from training.optimization import Update


def small_swin(classes):
    return SwinTransformer([4, 4], 8, [1, 1], [1, 1], [4, 4], num_classes=classes)


def network(name, image_size=32):
    """`name` with random layers that draw often."""
    torch.manual_seed(0)
    net = models.build(name, 10, image_size)
    for module in net.modules():
        if isinstance(module, (StochasticDepth, nn.Dropout)):
            module.p = 0.3
    return net.train()


def images(image_size=32, count=4):
    return torch.randn(count, 3, image_size, image_size,
                       generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def train(net, opt="sgd", *, precision="off", parts=1, ema_decay=0.0, steps=2, ranks=Ranks()):
    """Losses, and all that a few steps leave in an Update."""
    context = RunContext(torch.device("cpu"), precision, ranks=ranks)
    recipe = SimpleNamespace(opt=opt, lr=0.01, momentum=0.9, weight_decay=1e-4, clip_grad=1.0, model_ema=ema_decay)
    update, losses = Update(net, recipe, context, parts), []
    model, label = ranks.data_parallel(net, 0, (3, 32, 32)), torch.arange(4 // parts)
    net.train()
    targets = Targets(label, label, torch.ones(len(label)))
    torch.manual_seed(2)
    for _ in range(steps):
        for part in images().chunk(parts):
            with context.autocast:
                logits = model(part)
            losses.append(mixed_ce(logits, targets))
            update.backward(losses[-1])
        losses.append(update(0.01).norm)
    return torch.stack(losses).detach(), update.state_dict(), torch.get_rng_state()


def same(one, other) -> bool:
    one, other = map(torture.tensors_of, (one, other))
    return one.keys() == other.keys() and all(torture.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name, options", [
    ("resnet8", {"parts": 2, "ema_decay": 0.5, "opt": "adamw"}), ("v2_pico", {"precision": "bf16"}), ("vgg8", {}),
    ("small_swin", {})])
def test_no_bit_changes(monkeypatch, name, options):
    monkeypatch.setitem(cifar_networks.NETWORKS, "small_swin", small_swin)
    plain, checkpointed = network(name), network(name)
    recompute(checkpointed, name)
    expected = train(plain, **options)
    assert same(train(checkpointed, **options), expected)
    counters = [buffer for key, buffer in plain.named_buffers() if key.endswith("num_batches_tracked")]
    assert all(count == options.get("steps", 2) * options.get("parts", 1) for count in counters)


def test_a_graph_may_be_gone_through_twice():
    found = []
    for flag in (False, True):
        net = network("v2_pico")
        if flag:
            recompute(net, "v2_pico")
        torch.manual_seed(2)
        logits = net(images())
        first = torch.autograd.grad(logits.square().mean(), list(net.parameters()), retain_graph=True)
        found.append([first, torch.autograd.grad(logits.exp().mean(), list(net.parameters())), net.state_dict()])
    assert same(*found)


def together(context, folder):
    made = []
    for flag in (False, True):
        net = network("v2_pico")
        if flag:
            recompute(net, "v2_pico")
        made.append(train(net, ranks=context.ranks))
    assert same(*made)


def test_no_bit_changes_in_two_processes(tmp_path):
    processes.together(2, together, tmp_path)


def test_less_is_kept_and_no_name_changes():
    plain, checkpointed = network("resnet8"), network("resnet8")
    recompute(checkpointed, "resnet8")
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    kept = []
    for net in (plain, checkpointed, copy.deepcopy(checkpointed)):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.update({tensor.data_ptr(): tensor.nbytes}) or tensor,
                                                      lambda tensor: tensor):
            net(images())
        kept.append(sum(seen.values()))
    assert kept[1] < 0.5 * kept[0] and kept[2] == kept[1]
    for parameter in checkpointed.parameters():
        nn.init.zeros_(parameter)
    assert net(images()).abs().sum() > 0, "a copy, such as a moving average, computes with its own weights"
    assert not net.eval()(images()).equal(checkpointed.eval()(images()))


def test_nothing_is_left_changed_where_the_computation_breaks_off():
    net = network("resnet8")
    before = [(norm.momentum, norm.num_batches_tracked) for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)]
    with pytest.raises(ZeroDivisionError), FrozenStatistics(net):
        1 / 0
    assert before == [(norm.momentum, norm.num_batches_tracked) for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)]


@pytest.mark.parametrize("name, kinds, count", [
    ("resnet20", {"BasicBlock", "Conv2dNormActivation"}, 10), ("wrn_40_2", {"PreActivationBlock"}, 18),
    ("efficientnet_v2_s", {"Conv2dNormActivation", "FusedMBConv", "MBConv"}, 42), ("resnet50", {"Bottleneck"}, 16),
    ("vit_b_16", {"EncoderBlock"}, 12), ("regnet_x_400mf", {"ResBottleneckBlock"}, 22), ("alexnet", set(), 0)])
def test_blocks_are_found(name, kinds, count):
    with torch.device("cpu" if name == "regnet_x_400mf" else "meta"):  # its weights are drawn by way of numbers
        found = blocks(models.build(name, 10, 64))
    assert ({type(block).__name__ for block in found}, len(found)) == (kinds, count)
    inside = [module for block in found for module in block.modules()]
    assert len(set(inside)) == len(inside), "no block is inside of another"


def test_a_run_has_the_same_log_and_may_change_the_flag_when_it_goes_on(tmp_path, monkeypatch, capsys):
    classes = [f"class{index}" for index in range(6)]
    for seed, split in enumerate(("train", "test")):
        make_images(tmp_path / "images" / split, classes, 16, seed=seed)
    monkeypatch.chdir(tmp_path)

    def train(output, flags=""):
        code, _, err = run(capsys, "train_teacher.py", f"--model v2_pico {SMALL} --data-dir images "
                                          f"--val-size 12 --model-ema 0.5 --sched multistep --output {output} {flags}")
        assert code == 0, err

    def weights(folder, name="best.pt"):
        return torch.load(Path(folder, name), weights_only=True)

    train("plain", "--epochs 2")
    train("changed", "--epochs 1 --grad-checkpoint")
    shutil.copytree("changed", "kept")
    train("changed", "--epochs 2 --resume")
    train("kept", "--epochs 2 --resume --grad-checkpoint")
    for folder in ("changed", "kept"):
        assert torture.log_of(Path(folder)) == torture.log_of(Path("plain")), folder
        assert same(weights(folder)["state_dict"], weights("plain")["state_dict"])
        assert same(weights(folder, "last.pt")["update"], weights("plain", "last.pt")["update"])
    assert json.loads(Path("kept/config.json").read_text())["grad_checkpoint"] is True
    code, _, err = run(capsys, "train_teacher.py", f"--model alexnet {SMALL} --data-dir images "
                                    "--image-size 64 --no-pretrained --output none --grad-checkpoint")
    assert code == 2 and "--grad-checkpoint" in err and "alexnet" in err and err.count("\n") == 1
