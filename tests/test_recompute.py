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
from command import SMALL, one_line, run, succeeds
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


def networks(name) -> list:
    """`name` with random layers that draw often, as it is, and checkpointed."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(models.build(name, 10).train())
        for module in found[-1].modules():
            if isinstance(module, (StochasticDepth, nn.Dropout)):
                module.p = 0.3
    recompute(found[1], name)
    return found


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def train(net, opt="sgd", *, precision="off", parts=1, ema_decay=0.0, ranks=Ranks()):
    """Losses, and all that a few steps leave in an Update."""
    context = RunContext(torch.device("cpu"), precision, ranks=ranks)
    recipe = SimpleNamespace(opt=opt, lr=0.01, momentum=0.9, weight_decay=1e-4, clip_grad=1.0, model_ema=ema_decay)
    update, losses = Update(net, recipe, context, parts), []
    model, label = ranks.data_parallel(net, 0, (3, 32, 32)), torch.arange(4 // parts)
    net.train()
    targets = Targets(label, label, torch.ones(len(label)))
    torch.manual_seed(2)
    for _ in range(2):
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
    plain, checkpointed = networks(name)
    assert same(train(checkpointed, **options), train(plain, **options))
    counters = [buffer for key, buffer in plain.named_buffers() if key.endswith("num_batches_tracked")]
    assert all(count == 2 * options.get("parts", 1) for count in counters)


def test_a_graph_may_be_gone_through_twice():
    found = []
    for net in networks("v2_pico"):
        torch.manual_seed(2)
        logits = net(images())
        first = torch.autograd.grad(logits.square().mean(), list(net.parameters()), retain_graph=True)
        found.append([first, torch.autograd.grad(logits.exp().mean(), list(net.parameters())), net.state_dict()])
    assert same(*found)


def together(context):
    assert same(*(train(net, ranks=context.ranks) for net in networks("v2_pico")))


def test_no_bit_changes_in_two_processes():
    processes.together(2, together)


def test_less_is_kept_and_no_name_changes():
    plain, checkpointed = networks("resnet8")
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
    net = models.build("resnet8", 10)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)]
    with pytest.raises(ZeroDivisionError), FrozenStatistics(net):
        1 / 0
    assert before == [(norm.momentum, norm.num_batches_tracked) for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)]


@pytest.mark.parametrize("name, kinds, count", [
    ("resnet20", {"BasicBlock", "Conv2dNormActivation"}, 10), ("wrn_16_2", {"PreActivationBlock"}, 6),
    ("efficientnet_v2_s", {"Conv2dNormActivation", "FusedMBConv", "MBConv"}, 42), ("resnet50", {"Bottleneck"}, 16),
    ("vit_b_16", {"EncoderBlock"}, 12), ("regnet_x_400mf", {"ResBottleneckBlock"}, 22), ("alexnet", set(), 0)])
def test_blocks_are_found(name, kinds, count):
    with torch.device("cpu" if name == "regnet_x_400mf" else "meta"):  # its weights are drawn by way of numbers
        found = blocks(models.build(name, 10, 64))
    assert ({type(block).__name__ for block in found}, len(found)) == (kinds, count)
    inside = [module for block in found for module in block.modules()]
    assert len(set(inside)) == len(inside), "no block is inside of another"


def test_a_run_has_the_same_log_and_may_change_the_flag_when_it_goes_on(tmp_path, monkeypatch, capsys):
    make_images(tmp_path / "images", ["a", "b", "c"], 16, seed=0)
    monkeypatch.chdir(tmp_path)

    def train(output, flags):
        succeeds(capsys, "train_teacher.py", f"--model v2_pico {SMALL} --data-dir images --val-size 12 --model-ema 0.5 "
                                             f"--sched multistep --output {output} {flags}")
        return Path(output)

    plain, kept = train("plain", "--epochs 2"), train("kept", "--epochs 1 --grad-checkpoint")
    changed = shutil.copytree(kept, Path("changed"))
    train("changed", "--epochs 2 --resume")
    train("kept", "--epochs 2 --resume --grad-checkpoint")
    assert torture.difference(changed, plain) == torture.difference(kept, plain) == ""
    assert json.loads((kept / "config.json").read_text())["grad_checkpoint"] is True
    code, _, err = run(capsys, "train_teacher.py", f"--model alexnet {SMALL} --data-dir images "
                                    "--image-size 64 --no-pretrained --output none --grad-checkpoint")
    assert "alexnet has no blocks to checkpoint (--grad-checkpoint)" in one_line(code, 2, err)
