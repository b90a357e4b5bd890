"""diagnostics.csv against plain loops over single images in float64, and the verdict against made-up runs."""
import argparse
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from augment import BatchAugmenter
from cli import method_flags, options
from diagnostics import alarms
from diagnostics.classes import Confusion
from diagnostics.gradients import TREATMENTS, Diagnostics
from losses import Targets
from losses.methods import LABELS, METHODS, resolved
from plots.confusion import picture
from rundir.run_directory import RunDirectory
from training.device import RunContext
from training.distributed import Ranks
from training.evaluation import Evaluation
from training.optimization import Recipe, StepResult, Update

ROOT = Path(__file__).parent.parent
CLASSES, BATCH = 7, 12
NO = torch.tensor(0.0)
STUDENTS = ("--method kd", "--method kd --kl reverse --alpha 0.4 --standardize", "--method kd --alpha 8 --ce-weight 1",
            "--method dkd --beta 8", "--method dkd --mixed-target dominant --temperature 2",
            "--method dkd --mixed-target first --standardize", "--method dist --beta 2 --gamma 0.5")


def augmenter(mix_mode="elem", batch_size=BATCH, **more):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 8, 8, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (60,), generator=generator)
    return BatchAugmenter(images, labels, batch_size=batch_size, seed=3, mean=(0.5,) * 3, std=(0.25,) * 3, mix_prob=0.6,
                          mix_mode=mix_mode, **more)


def student(flags):
    return options.parse_distill("", "", f"{flags} --label-smoothing 0.1".split())


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(BATCH, CLASSES, generator=generator), 3 * torch.randn(BATCH, CLASSES, generator=generator)


def diagnose(args, augment, skipped=(), count=1, every=1, rows=slice(0, BATCH)):
    """Diagnostics of epoch 1 after `count` steps, one of `every`, that move the weights by 0; `skipped` ones hold NaN."""
    steps, method = range(0, count * every, every), method_flags.chosen(args)
    found = Diagnostics(method, augment, range(BATCH)[rows], Ranks(), steps)
    found.set_epoch(1)
    for step in steps:
        z, v = logits(step) if step not in skipped else 2 * [torch.full((BATCH, CLASSES), torch.nan)]
        targets = Targets(*(part[rows] for part in augment(step).targets))
        result = StepResult(torch.tensor(float(step in skipped)), NO, NO)
        found.add(step, result, targets, z[rows], v[rows] if method.record is not LABELS else None)
    return found


@pytest.mark.parametrize("policy", ["autoaugment", "none"])
@pytest.mark.parametrize("mix_mode, batch_size", [("batch", 12), ("batch", 13), ("elem", 13)])
def test_treatments_are_what_describe_says(mix_mode, batch_size, policy):
    augment, seen = augmenter(mix_mode, batch_size, policy=policy), set()
    for epoch in range(6):
        done = augment.treatments(epoch, range(0, 4, 2), range(2, batch_size))
        augment.set_epoch(epoch)
        for index, step in enumerate(range(0, 4, 2)):
            for row, words in enumerate(augment.describe(step)[2:]):
                own, _, mix = words.partition(" | ")
                policy_words = [word for word in own.split(", ")
                                if word not in ("erase", "as it is", "mirrored", "") and not word.startswith("crop ")]
                told = bool(policy_words), "erase" in own, "mixup" in mix, "cutmix" in mix
                assert told == tuple(bool(part[index, row]) for part in done), words
                seen.add(told)
    assert len(seen) >= (6 if policy == "none" else 9)


def by_hand(args, augment, steps):
    """The columns from single images, one after the other, by autograd and in float64."""
    function, record = method_flags.chosen(args).function, METHODS[args.method]
    numbers = resolved(record, method_flags.chosen(args).arguments)
    images, groups = [], {treatment: [] for treatment in TREATMENTS}
    treatments = augment.treatments(1, steps, range(BATCH))
    for index, step in enumerate(steps):
        (z, v), targets, gradients = logits(step), augment(step).targets, {}
        for term, number in {**record.weight_of, "whole": None}.items():
            leaf, off = z.clone().requires_grad_(), {other: 0.0 for other in record.weight_of.values() if other != number}
            function(leaf, v, targets, **numbers | (off if number else {}))[0].backward()
            gradients[term] = BATCH * leaf.grad.double()
        assert torch.allclose(gradients["whole"], sum(gradients[term] for term in record.terms), atol=1e-5), "terms add up"
        for i, (label, other, lam) in enumerate(zip(*(part.tolist() for part in targets))):
            major, minor = (label, other) if lam >= 0.5 else (other, label)
            p, p_T, q = (each.double().softmax(0) for each in (v[i], v[i] / numbers["temperature"], z[i]))
            images.append({"mixed": label != other, "gradients": {term: grad[i] for term, grad in gradients.items()},
                           "major": major, "minor": minor, "means": {
                "update_ratio": 0.0, "student_entropy": -(q * q.log()).sum(), "teacher_entropy": -(p * p.log()).sum(),
                "student_scale": z[i].std(correction=0), "teacher_scale": v[i].std(correction=0),
                "teacher_acc1": 100.0 * (p.argmax() == major), "teacher_either": 100.0 * (p.argmax() in (label, other)),
                "teacher_target": p[major], "teacher_target_T": p_T[major],
                "teacher_outside_T": sum(p_T[c] for c in range(CLASSES) if c not in (label, other))}})
            policy, erased, mixup, cutmix = (bool(part[index, i]) for part in treatments)
            inside = True, not (policy or erased or mixup or cutmix), policy, erased, mixup, cutmix
            for members in itertools.compress(groups.values(), inside):
                members.append(images[-1])

    def mean(members, value):
        return sum(float(value(image)) for image in members) / len(members)

    mixed = [image for image in images if image["mixed"]]
    columns = {name: mean(images, lambda image: image["means"][name]) for name in images[0]["means"]}
    for treatment, members in groups.items():
        suffix = "" if treatment == "all" else f"_{treatment}"
        columns["images" + suffix] = len(members)
        for name in ("teacher_acc1", "teacher_either"):
            columns[name + suffix] = mean(members, lambda image: image["means"][name])
    norms = {term: mean(images, lambda image: image["gradients"][term].square().sum()) ** 0.5 for term in gradients}
    for term, norm in norms.items():
        columns |= {f"grad_{term}": norm, f"pull_{term}": mean(mixed, lambda image: -image["gradients"][term][image["major"]]),
                    f"pull_minor_{term}": mean(mixed, lambda image: -image["gradients"][term][image["minor"]])}
        if term != "whole":
            columns[f"share_{term}"] = norm / sum(norms[other] for other in record.terms)
        if term != "ce":
            both = [torch.cat([image["gradients"][each] for image in images]) for each in (term, "ce")]
            columns[f"cos_{term}"] = float(F.cosine_similarity(*both, dim=0))
    return columns


@pytest.mark.parametrize("flags", STUDENTS)
def test_columns_are_means_over_single_images(flags):
    args, augment = student(flags), augmenter()
    augment.set_epoch(1)
    columns = diagnose(args, augment, count=3, every=2).columns()
    assert columns == pytest.approx(by_hand(args, augment, range(0, 6, 2)), rel=1e-3, abs=1e-4)
    assert all(columns[f"images_{treatment}"] > 0 for treatment in TREATMENTS[1:])


def test_a_teacher_has_cross_entropy_alone_and_an_empty_group_is_empty():
    columns = diagnose(options.parse_teacher("", "", []), augmenter(random_erasing=0.0, policy="none")).columns()
    assert columns["images_policy"] == columns["images_erased"] == 0 and columns["share_ce"] == 1.0
    assert columns["grad_ce"] == pytest.approx(columns["grad_whole"]) and not any(name.startswith("teacher") for name in columns)
    columns = diagnose(student("--method kd"), augmenter(random_erasing=0.0, policy="none")).columns()
    assert columns["images_policy"] == 0 and columns["teacher_acc1_policy"] is columns["teacher_either_policy"] is None


def test_a_method_without_weights_has_the_gradient_of_the_whole(monkeypatch):
    """And where one term has no weight of its own, it is what is left when all others are off."""
    args, augment, found = student("--method kd"), augmenter(), []
    for weight_of in ({}, {"kl": "alpha"}, {"ce": "ce_weight", "kl": "alpha"}):
        monkeypatch.setitem(METHODS, "kd", METHODS["kd"]._replace(weight_of=weight_of))
        found.append(diagnose(args, augment, count=3).columns())
    none, one, both = found
    assert "grad_ce" not in none and none["grad_whole"] == pytest.approx(both["grad_whole"], rel=1e-4)
    assert one == pytest.approx(both, rel=1e-4)


def test_a_skipped_step_adds_nothing():
    args, augment = student("--method dkd"), augmenter()
    assert diagnose(args, augment, skipped=(1,), count=2).columns() == diagnose(args, augment).columns()
    columns = diagnose(args, augment, skipped=(0,)).columns()
    assert columns["images"] == 0 and columns["grad_nckd"] is columns["share_nckd"] is columns["update_ratio"] is None


def test_gradients_are_those_of_the_scaled_loss():
    plain, scaled = (diagnose(student(f"--method dkd --loss-scale {scale}"), augmenter()).columns() for scale in (1, 4))
    for name, value in scaled.items():
        assert value == (4 * plain[name] if name.startswith(("grad_", "pull_")) else plain[name]), name


def test_ranks_add_up():
    """Two halves of a batch, summed, are the whole batch."""
    whole, one, other = (diagnose(student("--method dkd"), augmenter(), rows=rows).sums
                         for rows in (slice(0, BATCH), slice(0, 6), slice(6, BATCH)))
    torch.testing.assert_close(whole, one + other, rtol=1e-4, atol=1e-4)


def test_how_far_a_step_goes():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3, bias=False)
    recipe = argparse.Namespace(opt="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip_grad=0.5, model_ema=0.0)
    update = Update(net, recipe, RunContext(torch.device("cpu"), "off"))
    for scale in (1, 3, math.inf):  # the last is skipped
        before = net.weight.detach().clone()
        update.backward(net(torch.full((2, 4), 0.2)).square().mean() * scale)
        ratio = update(0.1, diagnose=True).relative_update
        assert ratio.item() == pytest.approx(((net.weight - before).norm() / before.norm()).item(), rel=1e-5)
    update.backward(net(torch.ones(2, 4)).sum())
    assert update(0.1).relative_update is None


def test_predicted_classes():
    """Four equally often, or three of which one takes half: entropies ln 4 and 1.5 ln 2."""
    val = Evaluation(1.0, 50.0, 90.0, 0.1, torch.arange(48) % 4)
    assert [val.class_columns(classes)["dead_classes"] for classes in (6, 4, 11)] == [2, 0, None]
    assert val.class_columns(6)["predicted_classes"] == 4 and val.class_columns(6)["effective_classes"] == pytest.approx(4)
    val = val._replace(predictions=(torch.arange(48) % 4).clamp(max=2))
    assert val.class_columns(6)["predicted_classes"] == 3
    assert val.class_columns(6)["effective_classes"] == pytest.approx(2 ** 1.5)


def test_confusion_with_a_class_without_images():
    labels, predictions = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 0, 0, 2, 1, 2])
    found = Evaluation(1.0, 50.0, 90.0, 0.1, predictions).confusion(labels, ["a", "b", "bad \udcff name"])
    assert found.names == ["a", "b", "bad \\udcff name"], "it can be written as UTF-8"
    assert found.counts.tolist() == [[3, 0, 1], [0, 0, 0], [0, 1, 1]]
    assert (found.labels.tolist(), found.predicted.tolist()) == ([4, 0, 2], [3, 1, 2])
    assert found.accuracies == [75.0, None, 50.0] and found.balanced_accuracy == 62.5
    assert found.chance == pytest.approx(100 * 4 / 6)
    png = picture(found, "a picture")
    assert png.startswith(b"\x89PNG")


def test_every_column_is_documented():
    text = (ROOT / "docs" / "diagnostics.md").read_text()
    of_classes = Evaluation(1.0, 50.0, 90.0, 0.1, torch.arange(4)).class_columns(4)
    for column in (*diagnose(student("--method dkd"), augmenter()).columns(), *of_classes):
        name, _, last = column.rpartition("_")
        documented = {"_<treatment>": TREATMENTS, "_<term>": ("ce", "tckd", "nckd", "whole")}
        suffix = next((suffix for suffix, values in documented.items() if last in values), None)
        assert f"`{name}{suffix}`" in text if suffix else f"`{column}`" in text, column


def test_a_run_from_before_columns_were_removed_or_added_goes_on(tmp_path):
    """It keeps the old ones, empty in the new epochs, and gets the new ones, empty in the old epochs."""
    run = RunDirectory(tmp_path, overwrite=False)
    run.diagnostics_rows = [{"epoch": 1, "agree": 0.5, "dead_classes": 3}, {"epoch": 2, "dead_classes": 4, "train_acc1": 6}]
    assert run.tables()["diagnostics.csv"] == b"epoch,agree,dead_classes,train_acc1\n1,0.5,3,\n2,,4,6\n"


# --- the verdict

SGD = "--opt sgd --lr 1 --weight-decay 5e-4 --momentum 0.9 --warmup-epochs 0"  # equilibrium: 2.29 % after 100 steps


def row(epoch, val_acc1, **values):
    columns = {"best_epoch": 1, "clip_frac": 0.5, "skipped_steps": 0, "steps": 100, "lr": 1.0}
    return argparse.Namespace(epoch=epoch, val_acc1=val_acc1, **columns | values)


def looked(epoch, **values):
    return {"epoch": epoch, "images": 100, "clip_factor": 0.5, "update_ratio": 0.01, "dead_classes": 0, "teacher_acc1": 80.0,
            "teacher_either": 90.0, "pull_whole": 0.5, "pull_minor_whole": 0.2, "share_ce": 0.4, "share_tckd": 0.1,
            "share_nckd": 0.5} | values


def perfect(*images):
    """The confusion matrix of classes with so many images, all predicted right."""
    return Confusion([f"class {number}" for number in range(len(images))], np.diag(images))


def judged(accuracies, flags="--method dkd", early=False, log=None, val=perfect(*[10] * 100), lrs=None, **values):
    args = student(f"{flags} {SGD}")
    rows = [row(epoch, accuracy, **log or {}) for epoch, accuracy in enumerate(accuracies, 1)]
    for each, lr in zip(rows, lrs or []):
        each.lr = lr
    diagnostics = [looked(each.epoch, **values) for each in rows]
    return alarms.judge(method_flags.chosen(args), Recipe.of(args), "val_loss", rows, diagnostics, val, early)


def names(result):
    return [alarm["name"] for alarm in result["alarms"]]


@pytest.mark.parametrize("accuracies, early, classes, expected, raised", [
    ([10, 30, 50], False, 100, "completed", []), ([10, 50, 46], True, 100, "early stop", []),
    ([10, 60, 54.9], True, 100, "collapsed", ["collapse"]), ([10, 60, 55.1], False, 100, "completed", []),
    ([1, 1.2, 1.5], False, 100, "collapsed", ["chance"]), ([3.2, 1, 1.9], True, 100, "collapsed", ["chance"]),
    ([10, 60, 1.0], False, 100, "collapsed", ["collapse", "chance"]), ([90.0], False, 2, "completed", []),
    ([54.0], False, 2, "collapsed", ["chance"]), ([16.0], False, 10, "completed", []),
    ([15.0], False, 10, "collapsed", ["chance"]), ([0.2], False, 1000, "collapsed", ["chance"])])
def test_verdict(accuracies, early, classes, expected, raised):
    """A fall, or an accuracy near chance, which depends on the number of classes."""
    result = judged(accuracies, early=early, val=perfect(*[10] * classes), lrs=[1.0, 1.0, 0.1])
    assert result["verdict"] == expected and [name for name in names(result) if name != "early stop"] == raised
    assert (result["health"] == "healthy") == (result["alarms"] == []) and result["advice"] is None
    assert all(f"{100 / classes:g} %" in alarm["text"] for alarm in result["alarms"] if alarm["name"] == "chance")


@pytest.mark.parametrize("images, most, limit", [(11, 3, "27.3"), (30, 3, "10"), (59, 3, "5.08"), (100, 5, "5"), (1000, 50, "5")])
def test_a_collapse_is_a_fall_of_more_than_three_images(images, most, limit):
    """most: the images by which accuracy may fall."""
    val = perfect(images - images // 2, images // 2)
    assert judged([100.0, 100 * (images - most) / images], val=val)["verdict"] == "completed"
    fallen, = judged([100.0, 100 * (images - most - 1) / images], val=val)["alarms"]
    assert fallen["name"] == "collapse" and f"above {limit} points" in fallen["text"] and f"{fallen['limit']:.3g}" == limit


@pytest.mark.parametrize("images, accuracy, chance, limit", [
    ((60, 20, 3), 75, 72.3, 77.3), ((96, 4), 97.9, 96, 98), ((50, 50, 0), 54, 50, 55)])
def test_chance_is_the_share_of_the_largest_class(images, accuracy, chance, limit):
    alarm, = judged([accuracy], val=perfect(*images))["alarms"]
    assert alarm["name"] == "chance" and alarm["limit"] == pytest.approx(limit, abs=0.05) and f"{chance} %" in alarm["text"]
    assert names(judged([limit + 0.1], val=perfect(*images))) == []


@pytest.mark.parametrize("counts, value, limit", [
    ([[60, 0, 0], [20, 0, 0], [3, 0, 0]], 1.0, 1.504), ([[60, 0, 0], [5, 15, 0], [2, 1, 0]], None, None),
    ([[6, 0, 0], [2, 0, 0], [0, 0, 0]], 1.0, 1.377), ([[1, 9], [1, 9]], 1.384, 1.5), ([[2, 8], [2, 8]], None, None),
    ([[9, 0], [0, 0]], None, None)])
def test_concentrated_predictions(counts, value, limit):
    """Effective numbers of classes, worked out by hand: exp(-sum p ln p)."""
    val = Confusion(["mostly", "rare", "rarest"][:len(counts)], np.array(counts))
    found = [alarm for alarm in judged([100.0], val=val)["alarms"] if alarm["name"] == "concentrated"]
    assert [(alarm["value"], alarm["limit"]) for alarm in found] == [
        (pytest.approx(value, abs=1e-3), pytest.approx(limit, abs=1e-3))] * (value is not None)
    if counts[0][0] == 60 and found:
        assert "100%" in found[0]["text"] and "'mostly'" in found[0]["text"] and "72%" in found[0]["text"]


def test_the_demo_is_not_concentrated_and_advice_depends_on_the_flags():
    """Predictions as uneven as those of a network of 42 %: from 1 to 19 images where the labels have 10."""
    uneven = Confusion([str(number) for number in range(100)], np.diag(1 + np.arange(100) * 18 // 99))
    even = uneven._replace(counts=np.roll(uneven.counts, 1, 1) + np.diag(20 - uneven.predicted))
    assert names(judged([42.0], val=even)) == []
    val = Confusion(["a", "b"], np.array([[8, 0], [8, 0]]))
    assert "--class-weights balanced" in judged([50.0], val=val)["advice"]
    assert "--class-weights" not in judged([50.0], "--method kd --class-weights balanced", val=val)["advice"]


@pytest.mark.parametrize("name, values, words", [
    ("dead", {"dead_classes": 34}, ["34 of 100 classes"]),
    ("move", {"update_ratio": 0.05}, ["5.0%", "2.18 times", "NCKD", "50%"]),
    ("inverted", {"pull_minor_whole": 0.6}, ["0.600 against 0.500"]), ("share", {"share_nckd": 0.85}, ["NCKD", "85%"]),
    ("teacher", {"teacher_acc1": 30.0, "teacher_either": 41.0}, ["30 %", "41 %"]),
    ("skipped", {"log": {"skipped_steps": 2}}, ["2.0%"]), ("clipped", {"log": {"clip_frac": 0.95}}, ["95%", "50%"])])
def test_each_alarm_has_its_number(name, values, words):
    result = judged([10, 30, 50], **values)
    assert names(result) == [name] and result["health"] == "1 alarm" and result["verdict"] == "completed"
    assert all(word in result["alarms"][0]["text"] for word in words), result["alarms"][0]["text"]
    assert result["advice"] is None, "an alarm alone is no collapse"


def test_early_stopping_on_the_loss_while_accuracy_rises():
    result = judged([10, 30, 50], early=True, log={"best_epoch": 2}, lrs=[1, 1, 0.1])
    assert names(result) == ["early stop"]
    assert "30.0 %" in result["alarms"][0]["text"] and "val_loss" in result["alarms"][0]["text"]
    assert names(judged([10, 50, 46], early=True, log={"best_epoch": 2}, lrs=[1, 1, 0.1])) == []


def test_early_stopping_before_the_learning_rate_came_down():
    result = judged([10, 50, 49], "--method dkd --epochs 30", early=True, log={"best_epoch": 2}, lrs=[0.2, 0.4, 0.38])
    assert names(result) == ["stop"] and result["verdict"] == "early stop", "no collapse"
    assert result["alarms"][0]["value"] == pytest.approx(0.95) and result["alarms"][0]["epoch"] == 3
    assert all(words in result["alarms"][0]["text"] for words in ("10% of the schedule", "0.38, 95% of its peak"))
    assert names(judged([10, 50, 49], early=True, log={"best_epoch": 2}, lrs=[0.2, 0.4, 0.2])) == []
    assert names(judged([10, 50, 49], lrs=[0.2, 0.4, 0.38])) == [], "not stopped"


@pytest.mark.parametrize("flags", [
    "--opt sgd --lr 0.5 --weight-decay 0.01 --momentum 0.9", "--opt sgd --lr 0.2 --weight-decay 0.02 --momentum 0.5",
    "--opt adamw --lr 0.05 --weight-decay 0.2"])
def test_a_scale_invariant_weight_reaches_the_equilibrium(flags):
    """Random gradients, orthogonal to the weight and inversely proportional to its norm."""
    torch.manual_seed(0)
    net, recipe = torch.nn.Linear(512, 1, bias=False), Recipe.of(student(flags))
    update, ratios = Update(net, recipe, RunContext(torch.device("cpu"), "off")), []
    for _ in range(400):
        update.backward(F.normalize(net.weight) @ torch.randn(512))
        ratios.append(update(recipe.lr, diagnose=True).relative_update.item())
    _, expected = alarms.equilibrium(recipe, recipe.lr)
    assert sum(ratios[300:]) / 100 == pytest.approx(expected, rel=0.02)
    assert sum(ratios[:20]) / 20 > 1.5 * expected, "the initial norm is small"


def moves(flags, lrs, ratio=0.05):
    rows = [row(epoch, 50.0, lr=lr) for epoch, lr in enumerate(lrs, 1)]
    return alarms.moves(Recipe.of(student(flags)), rows, [looked(each.epoch, update_ratio=ratio) for each in rows])


def test_updates_are_relative_to_the_equilibrium_of_the_epoch():
    """At its mean learning rate; not before weight decay has taken the squared norm to 1 / e, and never without weight decay."""
    assert moves(SGD, [1, 0.5]) == [(pytest.approx(0.05 / math.sqrt(2 * lr * 5e-4 / 1.9)), 0.05, epoch)
                                    for epoch, lr in ((1, 1), (2, 0.75))]
    assert [epoch for *_, epoch in moves(SGD.replace("warmup-epochs 0", "warmup-epochs 2"), [0.5, 1, 1, 1])] == [2, 3, 4]
    assert [epoch for *_, epoch in moves("--opt adamw --lr 1e-3 --weight-decay 2 --warmup-epochs 0", [1e-3] * 4)] == [3, 4]
    assert moves(SGD.replace("5e-4", "0"), [1] * 9) == moves(SGD, [1, 1], None) == []


def test_a_run_that_went_wrong_gets_advice_for_each_alarm():
    result = judged([10, 60, 20], update_ratio=0.09, teacher_acc1=30.0)
    assert names(result) == ["collapse", "move", "teacher"] and "cause" not in result
    move, teacher = result["advice"].split("; ")
    assert move.startswith("move: ") and "--lr or --beta" in move and "--clip-grad 1" in move and teacher.startswith("teacher: ")
    assert judged([10, 60, 20], share_nckd=0.9)["advice"] == "share: lower --beta, or raise --ce-weight"
    assert judged([10, 60, 20], log={"clip_frac": 0.95})["advice"] == "clipped: raise --clip-grad or lower --beta"
    assert "--alpha" in judged([10, 60, 20], "--method kd", update_ratio=0.09, share_kl=0.5)["advice"]
    for flags in ("--method kd", "--method dkd"):
        assert judged([10, 60, 20], flags, pull_minor_whole=0.6)["advice"] == "inverted: mix less (--mix-prob)"
    dominant = judged([10, 60, 20], "--method dkd --mixed-target dominant", pull_minor_whole=0.6)
    assert dominant["advice"].startswith("inverted: use --mixed-target pair")
    assert judged([10, 60, 20])["advice"] is None
    assert judged([10, 20, 30], dead_classes=40, update_ratio=0.09)["advice"].startswith("move: ")


def test_alarms_of_a_teacher_speak_of_what_its_run_has():
    """All that can be raised without a teacher: no student, no other term or label rule, no flag of distill.py."""
    args = options.parse_teacher("", "", SGD.split())
    method, recipe = method_flags.chosen(args), Recipe.of(args)
    rows = [row(1, 60.0, clip_frac=1.0, skipped_steps=9), row(2, 50.0, clip_frac=1.0, skipped_steps=9),
            row(3, 50.5, clip_frac=1.0, skipped_steps=9, best_epoch=2)]
    values = {"update_ratio": 0.2, "dead_classes": 1, "share_ce": 1.0, "pull_whole": 0.1, "pull_minor_whole": 0.2}
    diagnostics = [{"epoch": 1, "images": 100, "clip_factor": 0.1, **values}]
    val = Confusion(["a", "b"], np.array([[80, 0], [80, 0]]))
    result = alarms.judge(method, recipe, "val_loss", rows, diagnostics, val, True)
    assert names(result) == ["collapse", "chance", "concentrated", "dead", "skipped", "move", "inverted", "clipped", "early stop",
                             "stop"]
    words = " ".join([result["advice"], *(alarm["text"] for alarm in result["alarms"])])
    flags = set(re.findall(r"--[a-z-]+", words))
    assert flags == {"--lr", "--clip-grad", "--amp", "--mix-prob", "--class-weights", "--monitor"}
    assert not any(word in words.lower() for word in ("student", "teacher", "distill", "term", "kl"))
    before_diagnostics = alarms.judge(method, recipe, "val_loss", rows, [], val, False)
    assert before_diagnostics["verdict"] == "collapsed"
