"""--loss-scale and --match-norm: the size of the loss apart from its direction."""
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torture
from command import one_line, run, student_of, succeeds
from helpers import make_images, table_of
from kernel_cases import rows

from cli import method_flags, options, sweep_grid
from losses import Targets, dkd_loss, kd_loss
from training.device import RunContext, micro_batches
from training.optimization import Update

CPU = torch.device("cpu")
RECIPE = {"opt": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "model_ema": 0.0, "clip_grad": 0.0}


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.GELU(),
                               torch.nn.Linear(16, 10))


def batch(seed=0):
    """Images, teacher logits and mixed targets."""
    generator = torch.Generator().manual_seed(seed)
    label, other = torch.randint(10, (2, 16), generator=generator)
    return (torch.randn(16, 3, 4, 4, generator=generator), 3 * torch.randn(16, 10, generator=generator),
            Targets(label, other, torch.where(label == other, 1.0, torch.rand(16, generator=generator))))


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def updater(model, precision="off", parts=1, **recipe):
    """In FP16 with a loss scale that needs no search."""
    update = Update(model, SimpleNamespace(**RECIPE | recipe), RunContext(CPU, precision), parts)
    update.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")
    return update


def take(update, images, teacher_logits, targets, parts=1, loss_factor=1.0, matched_factor=1.0):
    """A step of DKD with the gradient norm of KD, and a learning rate of 1."""
    for part in micro_batches(range(len(images)), parts):
        these = slice(part.start, part.stop)
        with update.context.autocast:
            logits = update.net(images[these])
        both = logits, teacher_logits[these], Targets(*(each[these] for each in targets))
        update.backward(loss_factor * dkd_loss(*both)[0], matched_factor * kd_loss(*both)[0])
    return update(1.0)


def specification(model, images, teacher_logits, targets, parts=1):
    """The gradients of DKD and of KD, flat, in FP32."""
    found = []
    for loss in (dkd_loss, kd_loss):
        net, total = copy.deepcopy(model), 0.0
        for part in micro_batches(range(len(images)), parts):
            these = slice(part.start, part.stop)
            total += loss(net(images[these]), teacher_logits[these], Targets(*(each[these] for each in targets)))[0] / parts
        found.append(flat(torch.autograd.grad(total, list(net.parameters()))))
    return found


@pytest.mark.parametrize("precision, tolerance", [("off", 1e-5), ("fp16", 1e-2), ("bf16", 5e-2)])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_matched_step_has_the_direction_of_the_one_and_the_norm_of_the_other(precision, tolerance, parts, clip):
    """A step with a learning rate of 1 and nothing else: the change of the weights is the gradient."""
    model = net()
    update = updater(model, precision, parts, clip_grad=clip)
    for seed in range(2):
        own, other = specification(model, *batch(seed), parts)
        before, result = flat(model.parameters()), take(update, *batch(seed), parts)
        change, norm = before - flat(model.parameters()), other.norm()
        assert result.norm.item() == pytest.approx(norm.item(), rel=tolerance) and not result.skipped
        assert result.match_factor.item() == pytest.approx((norm / own.norm()).item(), rel=tolerance)
        assert result.match_factor < 0.5, "KD's gradient is much smaller"
        assert torch.cosine_similarity(change, own, dim=0) > 1 - tolerance
        assert torch.cosine_similarity(own, other, dim=0) < 0.95
        assert change.norm().item() == pytest.approx(min(norm.item(), clip or math.inf), rel=tolerance)


def test_frozen_and_unused_parameters_have_no_part():
    plain, model = net(), net()
    model.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    model.unused = torch.nn.Parameter(torch.ones(3))
    one, two = (take(updater(each), *batch()) for each in (plain, model))
    assert one == two and torch.equal(flat(model.parameters()), flat([torch.ones(6), *plain.parameters()]))


@pytest.mark.parametrize("precision", ["off", "fp16"])
@pytest.mark.parametrize("factors", [{"matched_factor": math.inf}, {"matched_factor": math.nan}, {"loss_factor": 0.0},
                                     {"loss_factor": 1e25}, {"loss_factor": 0.0, "matched_factor": 0.0}])
def test_a_step_without_a_factor_leaves_no_trace(precision, factors):
    """Neither norm may be infinite or NaN, and the own one not 0; 1e25 has finite gradients, whose norm overflows."""
    kinds = {"momentum": 0.9, "clip_grad": 1.0}
    update, plain = (updater(net(), precision, **kinds) for _ in range(2))
    for step in range(3):
        result = take(update, *batch(step), **factors if step == 1 else {})
        assert result.skipped == (step == 1)
        if step != 1:
            take(plain, *batch(step))
    one, two = (torture.tensors_of(each.state_dict() | {"scaler": None}) for each in (update, plain))
    assert one.keys() == two.keys() and [key for key, value in one.items() if not torture.equal(value, two[key])] == []
    assert update.amp_scale() == (128 if precision == "fp16" else None), "the scaler sees it, too"


@pytest.mark.parametrize("flags", ["", "--method dkd --standardize --class-weights balanced", "--method dist", "--method nkd",
                                   "--method mlkd", "--method skd", "--method cist"])
def test_a_scaled_loss_is_the_multiplied_loss(flags):
    """Bit for bit for a power of two; terms are unweighted, and stay."""
    z, v, targets = rows(16, 10)
    found, weights = [], torch.rand(10) if "balanced" in flags else None
    for scale, by_hand in (("1", 0.25), ("0.25", 1.0)):
        args = options.parse_distill("", "", [*flags.split(), "--loss-scale", scale])
        leaf = z.clone().requires_grad_()
        loss, terms = method_flags.chosen(args).criterion(CPU, weights)(leaf, v, targets)
        (by_hand * loss).backward()
        found.append([by_hand * loss, leaf.grad, *terms.values()])
    assert all(map(torch.equal, *found)) and found[0][1].any()


# --- runs

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("controls")
    make_images(place / "images", ["a", "b", "c", "d"], 30, seed=0)
    return place


@pytest.fixture
def distil(capsys, place):
    """Distil into a new run directory -> it, or the line of an expected error, or the lines of a dry run."""
    def distil(name, flags, expected=0):
        line = f"{student_of(capsys, place)} --output {place}/{name} {flags}"
        if expected:
            code, _, err = run(capsys, "distill.py", line)
            return one_line(code, expected, err)
        out = succeeds(capsys, "distill.py", line)
        return out.splitlines() if "--dry-run" in flags else place / name
    return distil


def test_a_matched_run_goes_on_bit_for_bit_and_not_with_other_flags(distil):
    flags = "--method dkd --sched multistep --grad-accum 2 --model-ema 0.9 --match-norm kd"
    whole = distil("whole", flags)
    assert all(0 < float(row["match_factor"]) < 1 for row in table_of(whole / "diagnostics.csv"))
    config = json.loads((whole / "config.json").read_text())
    assert (config["loss_scale"], config["match_norm"]) == (1.0, "kd") and config["method_in_figures"].endswith(" match-norm kd")
    distil("parted", f"{flags} --epochs 1")
    assert "--match-norm kd -> none" in distil("parted", flags.replace("-norm kd", "-norm none") + " --resume", expected=2)
    assert "--loss-scale 1.0 -> 2.0" in distil("parted", flags.replace("--match-norm kd", "--loss-scale 2 --resume"), expected=2)
    assert torture.difference(distil("parted", f"{flags} --resume"), whole) == ""


def test_advice_on_clipping_is_for_the_norm_of_the_step(distil):
    kd, dkd, matched, scaled = (distil("dry", f"{flags} --dry-run")[-1] for flags in (
        "--method kd", "--method dkd", "--method dkd --match-norm kd", "--method kd --loss-scale 1000"))
    assert matched == kd != dkd and kd.lstrip().startswith("--clip-grad ")
    assert float(scaled.split()[1].rstrip(":")) == pytest.approx(1000 * float(kd.split()[1].rstrip(":")), rel=0.1)


# --- names

def test_objective_run_and_cells_are_named_by_the_controls():
    scaled = options.parse_distill("", "", ["--loss-scale", "0.5"])
    assert method_flags.chosen(scaled).objective == (
        "loss = 0.5 * (0.3 CE(label smoothing 0.1) + 0.7 * 4^2 KL(teacher || student; T = 4))")
    assert scaled.output == "runs/kd-alpha0.7-T4-loss-scale-0.5-s42"
    assert method_flags.chosen(scaled).labels == {"method_in_tables": "KD alpha 0.7 T 4 loss-scale 0.5",
                                                  "method_in_figures": "KD loss-scale 0.5"}
    matched = options.parse_distill("", "", "--method dist --match-norm kd --label-smoothing 0 --class-weights balanced".split())
    objective, ce = method_flags.chosen(matched).objective, "CE(label smoothing 0, classes balanced)"
    assert objective.startswith(f"loss = 1 {ce} + ")
    assert objective.endswith(f"; gradient rescaled to the norm of that of 0.3 {ce} + 0.7 * 4^2 KL(teacher || student; T = 4)")
    assert matched.output == "runs/dist-beta1-gamma1-T1-match-norm-kd-s42"
    cells = sweep_grid.expand("distill.py", "-- --method kd -- --method dkd --match-norm none kd".split())
    assert [cell.label for cell in cells] == ["--method kd", "--method dkd --match-norm none", "--method dkd --match-norm kd"]
