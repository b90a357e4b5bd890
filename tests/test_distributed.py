"""Two and three processes do what one would: the same images, weights and accuracies, and one message."""
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from helpers import fails
from processes import ALONE, together

import losses
from augment import BatchAugmenter
from data.datasets import Split
from training.evaluation import evaluate
from training.metrics import Metrics
from training.optimization import Update


def first_come(context, path):
    with context.ranks.local_main_first():
        assert path.exists() == (context.ranks.rank > 0), "the second did not wait for the first"
        time.sleep(context.ranks.is_main)
        path.touch()


def test_one_downloads_and_the_others_find_it(tmp_path):
    together(2, first_come, tmp_path / "downloaded", timeout=timedelta(seconds=0.5))  # of a step: a download may take longer


def evaluate_in_shares(context):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6))
    for count in (13, 16):
        images = torch.randint(256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
        split = Split(images, torch.randint(6, (count,), generator=generator))
        whole = evaluate(net, split, (0.5,) * 3, (0.25,) * 3, ALONE, 500)
        for batch_size in (1, 3, 5):
            shared = evaluate(net, split, (0.5,) * 3, (0.25,) * 3, context, batch_size)
            assert torch.equal(shared.predictions, whole.predictions)
            assert (shared.acc1, shared.acc5) == (whole.acc1, whole.acc5)
            assert shared.loss == pytest.approx(whole.loss, rel=1e-6) and shared.ece == pytest.approx(whole.ece, rel=1e-6)
            assert shared.agreement(whole) == 1
    few = Split(images[:1], split.labels[:1])  # fewer images than processes
    shared, whole = (evaluate(net, few, (0.5,) * 3, (0.25,) * 3, each, 500) for each in (context, ALONE))
    assert shared.acc1 == whole.acc1


@pytest.mark.parametrize("size", [2, 3])
def test_every_image_is_evaluated_once(size):
    together(size, evaluate_in_shares)


def train(context, each, matches, steps=24):
    """A network in float64 and without BatchNorm -> its weights and the means of the epoch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (768, 8, 8, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (768,), generator=generator)
    augmenter = BatchAugmenter(images, labels, batch_size=each * context.ranks.size, seed=1, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.manual_seed(0)
    teacher, net = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 24), torch.nn.GELU(),
                                        torch.nn.Linear(24, 10)).double()
                    for _ in range(2))
    recipe = SimpleNamespace(opt="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, clip_grad=0.5, model_ema=0.0)
    update, metrics = Update(net, recipe, context), Metrics(context.ranks, steps, 0.5)
    model, rows = context.ranks.data_parallel(net, 0, (192,)), context.ranks.rows(each)
    for step in range(steps):
        batch = augmenter(step % augmenter.steps, rows)
        with torch.no_grad():
            teacher_logits = teacher(batch.images.double()).float()
        logits = model(batch.images.double()).float()
        loss, _ = losses.dkd_loss(logits, teacher_logits, batch.targets, beta=2.0, label_smoothing=0.1)
        update.backward(loss, losses.kd_loss(logits, teacher_logits, batch.targets)[0] if matches else None)
        count(metrics, update(0.1), logits, batch.targets, loss)
    return torch.cat([weight.detach().flatten() for weight in net.parameters()]), *metrics.epoch_columns(1)


def count(metrics, result, logits, targets, loss):
    metrics.add(logits, targets, loss, {})
    metrics.end_step(metrics.taken, result)
    metrics.log()


def train_like_one(context, matches):
    (shared, *columns), (whole, *expected) = train(context, 16 // context.ranks.size, matches), train(ALONE, 16, matches)
    assert (shared - whole).norm() <= 1e-12 * whole.norm()
    assert len(columns) == 2 and ("match_factor" in columns[1]) == matches
    for one, two in zip(columns, expected):
        assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("matches", [False, True])
def test_two_processes_train_the_network_that_one_would(matches):
    together(2, train_like_one, matches)


def one_statistic(context):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    update = Update(net, SimpleNamespace(opt="adamw", lr=0.1, weight_decay=0.05, clip_grad=1.0, model_ema=0.9), context)
    before = net[1].running_mean.clone(), torch.get_rng_state()
    model = context.ranks.data_parallel(net, 0, (4,))
    assert torch.equal(net[1].running_mean, before[0]) and (context.ranks.rank or torch.equal(torch.get_rng_state(), before[1]))
    assert net[0].weight.grad is None
    assert not torch.equal(*context.ranks.gather(torch.rand(4))), "every process has dropout of its own"
    net.train()
    for _ in range(3):
        update.backward(model(torch.randn(8, 4)).square().mean())
        update(0.1)
    own = [(each[1].running_mean.clone(), each[1].running_var.clone()) for each in (net, update.average.module)]
    update.sync_buffers()
    for each, statistics in zip((net, update.average.module), own):
        mean, variance = (torch.stack(context.ranks.gather(statistic)).double().mean(0).float() for statistic in statistics)
        assert not torch.equal(statistics[0], mean), "the processes saw different images"
        assert torch.equal(each[1].running_mean, mean) and torch.equal(each[1].running_var, variance)
    before = net[1].running_mean.clone()
    update.sync_buffers()
    assert net[1].num_batches_tracked == 3
    assert torch.equal(net[1].running_mean, before), "the mean of equal numbers is that number"


def test_running_statistics_are_averaged():
    together(2, one_statistic)


def drift(context):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    update = Update(net, SimpleNamespace(opt="adamw", lr=0.1, weight_decay=0, clip_grad=1.0, model_ema=0.0), context)
    update.sync_buffers()
    with torch.no_grad():
        if context.ranks.rank == 1:
            net.weight[0, 0, 0, 0] = torch.nextafter(net.weight[0, 0, 0, 0], torch.tensor(9.0))
    with fails(1, "diverged"):
        update.sync_buffers()


def test_weights_that_drift_apart_by_one_bit_are_noticed():
    together(2, drift)


def a_sick_loss_on_one(context):
    """Its gradient is finite; yet no process may take a step that another one refuses."""
    weight = torch.nn.Linear(2, 1, bias=False)
    recipe = SimpleNamespace(opt="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_grad=0.0, model_ema=0.0)
    update, metrics = Update(weight, recipe, context), Metrics(context.ranks, 1)
    model, before = context.ranks.data_parallel(weight, 0, (2,)), weight.weight.detach().clone()
    logits = model(torch.ones(1, 2))
    loss = logits.sum() + (0, float("inf"))[context.ranks.rank]
    update.backward(loss)
    result = update(1.0)
    count(metrics, result, logits, losses.Targets(torch.zeros(1).long(), torch.zeros(1).long(), torch.ones(1)), loss)
    assert result.skipped and torch.equal(weight.weight, before)
    assert "train_loss is not finite" in str(metrics.failure("")), "the other process must name it, too"


def test_a_loss_that_is_sick_on_one_process_is_skipped_by_all():
    together(2, a_sick_loss_on_one)
