"""losses/: each is its formula, in the right direction, and only the student learns.  The op behind them: test_softmax_kl.py."""
import inspect
from pkgutil import resolve_name

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import rows

from kernels.softmax_kl import softmax_kl_naive
from losses import Targets, dkd_loss, kd_loss, mixed_ce
from losses.cross_entropy import class_weights_of
from losses.methods import METHODS
from losses.standardize import standardized


def function_of(method):
    return resolve_name(METHODS[method].function)


@pytest.mark.parametrize("method", METHODS)
def test_upstream_gradient_reaches_the_student_alone(method):
    z, v, targets = rows(8, 12)
    v.requires_grad_()
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    function_of(method)(one, v, targets)[0].backward()
    loss, terms = function_of(method)(two, v, targets)
    (0.3 * loss + 1.7 * loss.square()).backward()
    torch.testing.assert_close(two.grad, one.grad * (0.3 + 3.4 * loss.item()), rtol=1e-5,
                               atol=1e-7 * two.grad.abs().max().clamp(min=1).item())
    assert v.grad is None
    assert all(term.ndim == 0 and term.dtype == torch.float32 and not term.requires_grad for term in terms.values())


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("method, flags, names", [
    (kd_loss, {}, ("ce", "kl")), (kd_loss, {"kl": "reverse", "ce_weight": 2.0}, ("ce", "kl")),
    *((dkd_loss, {"beta": 2.0, "mixed_target": rule}, ("ce", "tckd", "nckd")) for rule in ("pair", "dominant", "first"))])
def test_kd_and_dkd_equal_the_specification(method, flags, names, standardize, classes):
    """Loss, terms and gradient against float64, with mixed labels and smoothing."""
    z, v, targets = rows(16, classes)
    student, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, found = method(student, v, targets, standardize=standardize, label_smoothing=0.1, **flags)
    loss.backward()
    terms = softmax_kl_naive(exact, v.double(), *targets, temperature=4.0, label_smoothing=0.1, standardize=standardize,
                             split=flags.get("mixed_target", "pair"), reverse="kl" in flags)
    expected = dict(zip(("ce", "kl", "tckd", "nckd"), terms))
    weights = (flags.get("ce_weight", 0.3), 0.7) if method is kd_loss else (1.0, 1.0, 2.0)
    total = sum(weight * expected[name] for weight, name in zip(weights, names, strict=True))
    total.backward()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: expected[name].item() for name in names}, rel=1e-5, abs=1e-6)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    # Two z-scores are always +-0.7: their gradient is 0, and what is left of it grows as the logits' deviation falls.
    tolerance = 1e-4 if standardize and classes == 2 else 2e-5
    assert (student.grad - exact.grad).abs().max() <= tolerance * exact.grad.abs().max().clamp(min=0.01)


def test_kd_and_dkd_are_the_published_formulas():
    """KL in its direction.  TCKD and NCKD as their authors write them, to which every rule for mixed rows reduces."""
    z, v, targets = rows(32, 10)
    kl = F.kl_div((z / 4).log_softmax(1), (v / 4).softmax(1), reduction="batchmean") * 16
    assert kd_loss(z, v, targets)[1]["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    label = torch.arange(32) % 10
    z64, v64, hot = z.double() / 4, v.double() / 4, F.one_hot(label, 10).bool()
    q, p = z64.softmax(1), v64.softmax(1)
    q2, p2 = (torch.stack([x[hot], x.masked_fill(hot, 0).sum(1)], 1) for x in (q, p))
    tckd = 16 * F.kl_div(q2.log(), p2, reduction="batchmean")
    nckd = 16 * F.kl_div((z64 - 1000 * hot).log_softmax(1), (v64 - 1000 * hot).softmax(1), reduction="batchmean")
    for rule in ("pair", "dominant", "first"):
        loss, terms = dkd_loss(z, v, Targets.unmixed(label), mixed_target=rule)
        assert terms["tckd"].item() == pytest.approx(tckd.item(), rel=1e-5)
        assert terms["nckd"].item() == pytest.approx(nckd.item(), rel=1e-5)
        assert loss.item() == pytest.approx((F.cross_entropy(z.double(), label) + tckd + 8 * nckd).item(), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("standardize", [False, True])
def test_class_weights_are_of_the_cross_entropy_alone(method, standardize):
    """In the objective, the terms and the gradient of every method."""
    z, v, targets = rows(16, 10)
    how = {"standardize": True} if standardize and "standardize" in METHODS[method].hyperparameters else {}
    plain, weighted = z.clone().requires_grad_(), z.clone().requires_grad_()
    class_weights = torch.arange(10) / 4.5
    (loss, terms), (other, others) = (function_of(method)(leaf, v, targets, label_smoothing=0.1, ce_weight=0.5, **how, **more)
                                      for leaf, more in ((plain, {}), (weighted, {"class_weights": class_weights})))
    assert all(torch.equal(terms[name], others[name]) == (name != "ce") for name in terms)
    losses, leaf = [], z.clone().requires_grad_()
    for weights in (None, class_weights):
        losses.append(mixed_ce(leaf, targets, label_smoothing=0.1, class_weights=weights))
    assert other.item() - loss.item() == pytest.approx(0.5 * (losses[1] - losses[0]).item(), rel=1e-4)
    change, = torch.autograd.grad(0.5 * (losses[1] - losses[0]), leaf)
    torch.testing.assert_close(*(torch.autograd.grad(each, its)[0] + extra for each, its, extra in (
        (other, weighted, 0), (loss, plain, change))), rtol=1e-4, atol=1e-6)


def test_balanced_class_weights():
    """N / (C * n_c), as scikit-learn's, which does not count a class without images; it has no weight here."""
    labels = torch.tensor([0] * 60 + [1] * 20 + [3] * 4)
    found = class_weights_of("balanced", labels, 4)
    assert found.tolist() == pytest.approx([84 / 3 / 60, 84 / 3 / 20, 0, 84 / 3 / 4])
    assert found[labels].mean().item() == pytest.approx(1) and class_weights_of("none", labels, 4) is None


def test_the_dominant_label_has_the_larger_share():
    ones = torch.ones(3, dtype=torch.int64)
    assert Targets(ones, 2 * ones, torch.tensor([0.4, 0.5, 0.6])).dominant.tolist() == [2, 1, 1]


def test_standardised_logits_ignore_the_range_of_the_teacher_and_stay_finite():
    z, v, targets = rows(16, 10)
    near, far = (kd_loss(z, factor * v, targets, standardize=True)[0].item() for factor in (1.0, 50.0))
    assert near == pytest.approx(far, rel=1e-5)
    assert standardized(torch.full((3, 10), 7.0)).abs().max() == 0 and standardized(torch.tensor([[5.0]])).item() == 0
    flat = torch.zeros(16, 10).requires_grad_()
    kd_loss(flat, v, targets, standardize=True)[0].backward()
    assert flat.grad.isfinite().all()


def test_flags_and_functions_have_the_same_defaults():
    for name, method in METHODS.items():
        numbers = {key: number.default for key, number in method.hyperparameters.items()}
        signature = inspect.signature(function_of(name)).parameters
        assert numbers == {key: parameter.default for key, parameter in signature.items() if key in numbers}
        assert list(signature)[:3] == ["student_logits", "teacher_logits", "targets"]
        assert set(numbers) | {"label_smoothing", "class_weights"} == set(list(signature)[3:])


@pytest.mark.parametrize("call", [
    lambda z, v, t: kd_loss(z, v[:, :-1], t), lambda z, v, t: kd_loss(z[0], v[0], t), lambda z, v, t: kd_loss(z[:0], v[:0], t),
    lambda z, v, t: kd_loss(z, v, Targets(*(x[:-1] for x in t))), lambda z, v, t: kd_loss(z, v, t, kl="sideways"),
    lambda z, v, t: dkd_loss(z, v, t, mixed_target="both")])
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError):
        call(*rows(4, 5))
