"""diagnostics.csv against plain loops over single images in float64, and the verdict against made-up runs."""
import argparse
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from augment import BatchAugmenter
from cli import method_flags, options
from diagnostics import alarms
from diagnostics.gradients import GROUPS, Diagnostics
from losses import Targets
from losses.methods import METHODS, resolved
from rundir.run_directory import EpochRow
from training.device import Machine
from training.distributed import Ranks
from training.evaluation import Evaluation
from training.optimization import Taken, Update, build_optimizer

ROOT = Path(__file__).parent.parent
CLASSES, BATCH = 7, 12
NO, YES = torch.tensor([0.0, 1.0])
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


def look(looking, position, skipped, targets, *both):
    """A step that is looked at, which moves the weights by none of their norm."""
    looking.look(position, targets, *both)
    looking.end_step(Taken(skipped, NO, NO))


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
                policy_words = [word for word in own.split(", ") if word not in ("erase", "as it is", "")]
                told = bool(policy_words), "erase" in own, "mixup" in mix, "cutmix" in mix
                assert told == tuple(bool(part[index, row]) for part in done), words
                seen.add(told)
    assert len(seen) >= (6 if policy == "none" else 9)


def by_hand(args, steps, numbers):
    """One image after the other: group -> the numbers of its images, from autograd in float64."""
    function = method_flags.function(args)
    record, numbers = METHODS[args.method], resolved(METHODS[args.method], numbers)
    images = {group: [] for group in GROUPS}
    for (z, v), targets, treated in steps:
        z, v = z.double(), v.double()
        gradients = {}
        for term, number in record.weight_of.items():
            leaf = z.float().requires_grad_()
            others = {other: 0.0 for other in record.weight_of.values() if other != number}
            function(leaf, v.float(), targets, **numbers | others)[0].backward()
            gradients[term] = leaf.grad.double() * BATCH
        leaf = z.float().requires_grad_()
        function(leaf, v.float(), targets, **numbers)[0].backward()
        gradients["whole"] = leaf.grad.double() * BATCH
        assert torch.allclose(gradients["whole"], sum(gradients[term] for term in record.terms), atol=1e-5), "terms add up"
        for i in range(BATCH):
            label, other, lam = (part[i].item() for part in targets)
            major, minor, share = (label, other, lam) if lam >= 0.5 else (other, label, 1 - lam)
            p, p_T, q = v[i].softmax(0), (v[i] / numbers["temperature"]).softmax(0), z[i].softmax(0)
            mixed = label != other
            image = {
                "student_acc1": 100.0 * (q.argmax() == major), "teacher_acc1": 100.0 * (p.argmax() == major),
                "teacher_either": 100.0 * (p.argmax() in (label, other)), "agree": float(p.argmax() == q.argmax()),
                "student_entropy": -(q * q.log()).sum(), "teacher_entropy": -(p * p.log()).sum(), "teacher_target": p[major],
                "teacher_target_T": p_T[major],
                "teacher_outside_T": sum(p_T[c] for c in range(CLASSES) if c not in (label, other)),
                "student_scale": z[i].std(correction=0), "teacher_scale": v[i].std(correction=0)}
            image = {name: float(value) for name, value in image.items()}
            image |= {"p": p, "mixed": mixed, "gradients": {term: grad[i] for term, grad in gradients.items()},
                      "ends": (major, minor)}
            policy, erased, mixup, cutmix = (bool(part[i]) for part in treated)
            within = {"all": True, "clean": not (policy or erased or mixup or cutmix), "policy": policy, "erased": erased,
                      "mixup": mixup, "cutmix": cutmix, "even": mixed and share < 0.75, "uneven": mixed and share >= 0.75}
            for group, inside in within.items():
                if inside:
                    images[group].append(image)
    return images


@pytest.mark.parametrize("flags", STUDENTS)
def test_columns_are_means_over_single_images(flags):
    args, augment = student(flags), augmenter()
    augment.set_epoch(1)
    looking = Diagnostics(args, augment, range(BATCH), Ranks(), range(0, augment.steps, 2))
    looking.begin(1)
    steps, treated = [], augment.treatments(1, looking.steps, range(BATCH))
    for step in range(augment.steps):
        both, targets = logits(step), augment(step).targets
        if step % 2 == 0:
            look(looking, step, NO, targets, *both, method_flags.numbers(args))
            steps.append((both, targets, [part[step // 2] for part in treated]))
    columns, images = looking.columns(), by_hand(args, steps, method_flags.numbers(args))
    assert columns["looked_at"] == len(steps) == 3 and columns["images"] == 3 * BATCH
    terms = (*METHODS[args.method].terms, "whole")
    for group, members in images.items():
        suffix = "" if group == "all" else f"_{group}"
        assert columns["images" + suffix] == len(members) > 0, group
        for name in ("student_acc1", "teacher_acc1", "teacher_either", "agree", "student_entropy", "teacher_entropy",
                     "teacher_target", "teacher_target_T", "teacher_outside_T", "student_scale", "teacher_scale"):
            assert columns[name + suffix] == pytest.approx(sum(image[name] for image in members) / len(members), rel=1e-4), name
        p = torch.stack([image["p"] for image in members])
        spread = (p - p.mean(0)).square().sum(1).mean().sqrt()
        assert columns["teacher_spread" + suffix] == pytest.approx(float(spread), rel=1e-4, abs=1e-3)
        gradients = {term: torch.stack([image["gradients"][term] for image in members]) for term in terms}
        norms = {term: float(gradient.square().sum(1).mean().sqrt()) for term, gradient in gradients.items()}
        for term, gradient in gradients.items():
            assert columns[f"grad_{term}{suffix}"] == pytest.approx(norms[term], rel=1e-3, abs=1e-6)
            if term != "whole":
                together = sum(norms[one] for one in terms if one != "whole")
                assert columns[f"share_{term}{suffix}"] == pytest.approx(norms[term] / together, rel=1e-3)
            if term != "ce":
                cosine = F.cosine_similarity(gradient.flatten(), gradients["ce"].flatten(), dim=0)
                assert columns[f"cos_{term}{suffix}"] == pytest.approx(float(cosine), abs=1e-4)
            pulls = [[-image["gradients"][term][end] for end in image["ends"]] for image in members if image["mixed"]]
            for place, name in enumerate(("pull", "pull_minor")):
                found = columns[f"{name}_{term}{suffix}"]
                wanted = sum(float(pull[place]) for pull in pulls) / len(pulls) if pulls else None
                assert found is None if wanted is None else found == pytest.approx(wanted, abs=1e-4)


def test_a_teacher_has_cross_entropy_alone_and_an_empty_group_is_empty():
    args = options.parse_teacher("", "", [])
    augment = augmenter(random_erasing=0.0, policy="none")
    looking = Diagnostics(args, augment, range(BATCH), Ranks())
    looking.begin(1)
    look(looking, 0, NO, augment(0).targets, logits(0)[0])
    columns = looking.columns()
    assert columns["images_policy"] == columns["images_erased"] == 0 and columns["grad_ce_policy"] is None
    assert columns["student_entropy_erased"] is None and columns["share_ce"] == 1.0
    assert columns["grad_ce"] == pytest.approx(columns["grad_whole"]) and not any(name.startswith("teacher") for name in columns)


def test_a_method_without_weights_has_the_gradient_of_the_whole(monkeypatch):
    """And where one term has no weight of its own, it is what is left when all others are off."""
    args, augment = student("--method kd"), augmenter()
    shares = {}
    for weight_of in ({}, {"kl": "alpha"}, {"ce": "ce_weight", "kl": "alpha"}):
        monkeypatch.setitem(METHODS, "kd", METHODS["kd"]._replace(weight_of=weight_of))
        looking = Diagnostics(args, augment, range(BATCH), Ranks())
        looking.begin(1)
        look(looking, 0, NO, augment(0).targets, *logits(0), method_flags.numbers(args))
        shares[len(weight_of)] = looking.columns()
    assert "grad_ce" not in shares[0]
    for name in ("grad_kl", "grad_ce", "share_kl", "cos_kl"):
        assert shares[1][name] == pytest.approx(shares[2][name], rel=1e-4), name
    assert shares[0]["grad_whole"] == pytest.approx(shares[2]["grad_whole"], rel=1e-4)


def test_a_skipped_step_adds_nothing():
    args, augment = student("--method dkd"), augmenter()
    found = []
    for sick in (False, True):
        looking = Diagnostics(args, augment, range(BATCH), Ranks(), range(2))
        looking.begin(0)
        look(looking, 0, NO, augment(0).targets, *logits(0), method_flags.numbers(args))
        if sick:
            z, v = logits(1)
            look(looking, 1, YES, augment(1).targets, z * torch.nan, v * torch.inf, method_flags.numbers(args))
        found.append(looking.columns())
    assert found[0] == found[1] and found[0]["images"] == BATCH
    looking.begin(0)
    look(looking, 0, YES, augment(0).targets, *logits(0), method_flags.numbers(args))
    columns = looking.columns()
    assert columns["images"] == 0 and columns["grad_nckd"] is columns["share_nckd"] is columns["teacher_spread"] is None


def test_ranks_add_up():
    """Two halves of a batch, summed, are the whole batch."""
    args, augment = student("--method dkd"), augmenter()
    sums, (z, v), targets = [], logits(0), augmenter()(0).targets
    augment.set_epoch(0)
    for rows in (range(BATCH), range(0, 6), range(6, BATCH)):
        looking = Diagnostics(args, augment, rows, Ranks())
        looking.begin(0)
        part = slice(rows.start, rows.stop)
        look(looking, 0, NO, Targets(*(column[part] for column in targets)), z[part], v[part], method_flags.numbers(args))
        sums.append(looking.sums[:2])
    for whole, one, other in zip(*sums):
        torch.testing.assert_close(whole, one + other, rtol=1e-4, atol=1e-4)


def test_how_far_a_step_goes():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3, bias=False)
    recipe = argparse.Namespace(opt="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    update = Update(net, build_optimizer(net, recipe), Machine(torch.device("cpu"), "off"), 0.5, 0.0)
    args, augment, ratios = student("--method kd"), augmenter(), []
    looking = Diagnostics(args, augment, range(BATCH), Ranks(), range(4))
    looking.begin(1)
    for step in range(4):
        before, images = net.weight.detach().clone(), torch.full((2, 4), 0.2 * (1 + step))
        update.backward(net(images).square().mean() * (math.inf if step == 2 else 1))
        taken = update(0.1, look=step != 1)
        assert (taken.move is None) == (step == 1)
        if taken.move is not None:
            looking.look(step, augment(step).targets, *logits(step), method_flags.numbers(args))
            looking.end_step(taken)
        if step in (0, 3):
            ratios.append(((net.weight - before).norm() / before.norm()).item())
    assert looking.columns()["update_ratio"] == pytest.approx(sum(ratios) / 2, rel=1e-5)


def test_dead_classes():
    predictions = torch.arange(50) % 4
    val = Evaluation(1.0, 50.0, 90.0, 0.1, predictions)
    assert val.dead_classes(6) == 2 and val.dead_classes(4) == 0 and val.dead_classes(11) is None


def test_every_column_is_documented():
    text = (ROOT / "docs" / "diagnostics.md").read_text()
    args, augment = student("--method dkd"), augmenter()
    looking = Diagnostics(args, augment, range(BATCH), Ranks())
    looking.begin(1)
    look(looking, 0, NO, augment(0).targets, *logits(0), method_flags.numbers(args))
    suffixes = "|".join(group for group in GROUPS if group != "all")
    for column in looking.columns():
        name = re.sub(f"_({suffixes})$", "", column)
        term = next((term for term in ("ce", "tckd", "nckd", "whole") if name.endswith(f"_{term}")), None)
        assert f"`{name.removesuffix(f'_{term}')}_<term>`" in text if term else f"`{name}`" in text, column
    assert all(f"_{group}`" in text for group in GROUPS if group != "all")


# --- the verdict

def row(epoch, val_acc1, **values):
    columns = {"lr": 0.1, "train_loss": 1.0, "train_acc1": 50.0, "val_loss": 1.0, "val_acc5": 90.0, "val_ece": 0.1,
               "best_val_loss": 1.0, "best_epoch": 1, "bad_epochs": 0, "grad_norm_mean": 1.0, "grad_norm_max": 2.0,
               "clip_frac": 0.5, "skipped_steps": 0, "steps": 100, "samples": 6400, "images_per_s": 1.0, "epoch_s": 1.0,
               "val_s": 1.0, "total_s": 1.0}
    return EpochRow(epoch=epoch, val_acc1=val_acc1, **columns | values)


def looked(epoch, **values):
    return {"epoch": epoch, "images": 100, "clip_factor": 0.5, "update_ratio": 0.01, "dead_classes": 0, "teacher_acc1": 80.0,
            "teacher_either": 90.0, "pull_whole": 0.5, "pull_minor_whole": 0.2, "share_ce": 0.4, "share_tckd": 0.1,
            "share_nckd": 0.5} | values


def judged(accuracies, flags="--method dkd", early=False, log=None, classes=100, **values):
    rows = [row(epoch, accuracy, **log or {}) for epoch, accuracy in enumerate(accuracies, 1)]
    return alarms.judge(student(flags), rows, [looked(each.epoch, **values) for each in rows], classes, early)


def names(result):
    return [alarm["name"] for alarm in result["alarms"]]


@pytest.mark.parametrize("accuracies, early, expected", [
    ([10, 30, 50], False, "completed"), ([10, 50, 46], True, "early stop"), ([1, 1.2, 1.5], False, "collapsed"),
    ([10, 60, 54.9], True, "collapsed"), ([10, 60, 55.1], False, "completed"), ([3.2, 1, 1.9], False, "collapsed")])
def test_verdict(accuracies, early, expected):
    result = judged(accuracies, early=early)
    assert result["verdict"] == expected and names(result).count("collapse") == (expected == "collapsed")


@pytest.mark.parametrize("classes, accuracy, expected", [
    (2, 90.0, "completed"), (2, 54.0, "collapsed"), (10, 16.0, "completed"), (10, 15.0, "collapsed"), (1000, 0.2, "collapsed")])
def test_chance_depends_on_the_number_of_classes(classes, accuracy, expected):
    result = judged([accuracy], classes=classes)
    assert result["verdict"] == expected
    assert all(f"{100 / classes:g} %" in alarm["text"] for alarm in result["alarms"])


def test_a_healthy_run_raises_no_alarm():
    result = judged([10, 30, 50])
    assert result == {"verdict": "completed", "health": "healthy", "alarms": [], "cause": None, "advice": None}


@pytest.mark.parametrize("name, values, words", [
    ("dead", {"dead_classes": 34}, ["34 of 100 classes"]), ("move", {"update_ratio": 0.07}, ["7.0%", "NCKD", "50%"]),
    ("inverted", {"pull_minor_whole": 0.6}, ["0.600 against 0.500"]), ("share", {"share_nckd": 0.85}, ["NCKD", "85%"]),
    ("teacher", {"teacher_acc1": 30.0, "teacher_either": 41.0}, ["30 %", "41 %"]),
    ("skipped", {"log": {"skipped_steps": 2}}, ["2.0%"]), ("clipped", {"log": {"clip_frac": 0.95}}, ["95%", "50%"])])
def test_each_alarm_has_its_number(name, values, words):
    result = judged([10, 30, 50], **values)
    assert names(result) == [name] and result["health"] == "1 alarm" and result["verdict"] == "completed"
    assert all(word in result["alarms"][0]["text"] for word in words), result["alarms"][0]["text"]
    assert result["cause"] is None, "an alarm alone is no collapse"


def test_early_stopping_on_the_loss_while_accuracy_rises():
    result = judged([10, 30, 50], early=True, log={"best_epoch": 2})
    assert names(result) == ["early stop"]
    assert "30.0 %" in result["alarms"][0]["text"] and "val_loss" in result["alarms"][0]["text"]
    assert names(judged([10, 50, 46], early=True, log={"best_epoch": 2})) == []


def test_the_cause_of_a_collapse_is_the_most_telling_alarm():
    result = judged([10, 60, 20], update_ratio=0.09, teacher_acc1=30.0)
    assert names(result) == ["collapse", "move", "teacher"] and result["cause"].startswith("steps are large")
    assert "--lr or --beta" in result["advice"] and "--clip-grad 1" in result["advice"]
    assert judged([10, 60, 20], share_nckd=0.9)["advice"] == "lower --beta, or raise --ce-weight"
    assert judged([10, 60, 20], log={"clip_frac": 0.95})["advice"] == "raise --clip-grad or lower --beta"
    assert "--alpha" in judged([10, 60, 20], "--method kd", update_ratio=0.09, share_kl=0.5)["advice"]
    assert judged([10, 60, 20])["cause"] is None, "no alarm, no cause"
    assert judged([10, 60, 20], pull_minor_whole=0.6)["advice"].startswith("use --mixed-target pair")


def test_a_teacher_is_judged_too():
    args = options.parse_teacher("", "", [])
    rows = [row(1, 50.0), row(2, 10.0)]
    without = {"epoch": 1, "images": 100, "clip_factor": 1.0, "update_ratio": 0.2, "dead_classes": None, "share_ce": 1.0}
    result = alarms.judge(args, rows, [without], 100, False)
    assert names(result) == ["collapse", "move"] and result["advice"].startswith("halve --lr, or clip")
    assert alarms.judge(args, rows, [], 100, False)["verdict"] == "collapsed", "a run from before diagnostics"
