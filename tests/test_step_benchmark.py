"""benchmarks/step.py measures what it says: our contender is the loop of distill.py, the plain loop is right, rows add up."""
import ast
import copy
import math
from pathlib import Path

import pytest
import torch

from augment import BatchAugmenter
from benchmarks import loops
from benchmarks import step as benchmark
from benchmarks.loss import published_dkd
from benchmarks.table import MEAN, STD
from cli import options
from data.synthetic import CLASSES
from losses import dkd_loss
from training.device import setup_context

BATCH, STEPS, SIZE = 8, 2, 32
CASE = ("v2_tiny", "v2_pico")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def context():
    return setup_context("cpu", None, seed=0)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH * STEPS, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(len(CLASSES), (BATCH * STEPS,), generator=generator)


def test_every_contender_but_one_that_fails_has_a_row_that_adds_up(context, data, monkeypatch):
    def fail_in_channels_last(*args, layout=torch.contiguous_format, **named):
        if layout == torch.channels_last:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loops.PlainLoop(*args, layout=layout, **named)

    monkeypatch.setattr(benchmark, "PlainLoop", fail_in_channels_last)
    rows = list(benchmark.benchmark(CASE, context, *data, BATCH, repeats=2, compiled=False, steps=STEPS))
    half = [("ours, bf16", "bf16", 0)] if torch.cpu.get_capabilities().get("avx512_bf16") else []
    assert [(row.contender, row.precision, row.workers) for row in rows] == [
        (benchmark.BASE, "off", 2), ("ours", "off", 0), ("ours, stored teacher", "off", 0), *half]
    for row in rows:
        assert 0 < row.ms_min <= row.ms <= row.ms_max < math.inf and 0 < row.times_base_min <= row.times_base_max
        assert row.images_per_s == pytest.approx(1000 * BATCH / row.ms, rel=1e-3)
        shares = {phase: getattr(row, f"share_{phase}") for phase in benchmark.PHASES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
        nothing = {"waiting"} if row.contender.startswith("ours") else {"augment"}
        assert {phase for phase, share in shares.items() if share == 0} <= nothing | {"bookkeeping"} and not shares[nothing.pop()]
    assert {row.times_base for row in rows if row.contender == row.base} == {1.0}


def test_our_first_step_has_the_loss_of_a_direct_computation(context, data):
    args, (teacher, student) = loops.recipe(BATCH), loops.networks(CASE, context.device)
    before = copy.deepcopy(student)
    ours = loops.Ours(teacher, student, args, context, *data)
    columns = ours.run(1)

    augmenter = BatchAugmenter(*data, **options.augmentation(args), mean=MEAN, std=STD, batch_size=BATCH)
    augmenter.set_epoch(1)
    images, targets = augmenter(0)
    loss, terms = dkd_loss(before(images), teacher(images), targets, alpha=1.0, beta=8.0, temperature=4.0, label_smoothing=0.1)
    close = {"rel": 1e-4}  # the teacher in the loop is folded
    assert columns["train_loss"] == pytest.approx(loss.item(), **close)
    assert {name: columns[f"train_loss_{name}"] for name in terms} == pytest.approx(
        {name: term.item() for name, term in terms.items()}, **close)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in before.parameters()])
    assert columns["grad_norm_mean"] == pytest.approx(norm.item(), **close)
    assert columns["steps"] == 1 and columns["images"] == BATCH
    assert any(not torch.equal(*pair) for pair in zip(before.parameters(), student.parameters()))


def calls(loop: ast.AST) -> list[str]:
    """What a loop calls, in the order of the source, by the last part of its name."""
    found = [node for node in ast.walk(loop) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func).rpartition(".")[2] for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def test_loops_calls_what_the_script_calls():
    def tree(path, kind, found):
        return next(node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, kind) and found(node))

    def within(path):
        return calls(tree(path, ast.FunctionDef, lambda node: node.name == "step"))

    assert [name for name in within("benchmarks/loops.py") if name not in ("lap", "range")] == within("distill.py")

    def folded(path, load):
        found = tree(path, ast.Call, lambda node: ast.unparse(node.func) == load)
        return [ast.unparse(each.value) for each in found.keywords if each.arg == "folded"]

    assert folded("benchmarks/loops.py", "models.load") == folded("distill.py", "models.load_teachers") == ["True"]


def test_the_plain_loop_trains_on_the_published_loss(context, data):
    teacher, student = loops.networks(CASE, context.device, torch.contiguous_format)
    assert all(parameter.is_contiguous() for net in (teacher, student) for parameter in net.parameters())
    before = copy.deepcopy(student)
    loop = loops.PlainLoop(teacher, student, loops.recipe(BATCH), context, *data, workers=1)
    batches = []
    loop.batches = (batches.append(batch) or batch for batch in loop.batches)
    losses = loop.run(2)
    images, soft = batches[0]
    assert len(losses) == len(batches) == 2 and images.shape == (BATCH, 3, SIZE, SIZE) and soft.shape == (BATCH, len(CLASSES))
    torch.testing.assert_close(losses[0], loops.published_mixed_dkd(before(images), teacher(images), soft).item())
    assert any(not torch.equal(*pair) for pair in zip(before.parameters(), student.parameters()))


def test_soft_labels_of_one_class_give_the_published_loss():
    student, teacher = torch.randn(2, BATCH, len(CLASSES), generator=torch.Generator().manual_seed(0))
    label = torch.arange(BATCH)
    soft = torch.nn.functional.one_hot(label, len(CLASSES)).float()
    torch.testing.assert_close(loops.published_mixed_dkd(student, teacher, soft), published_dkd(student, teacher, label))
