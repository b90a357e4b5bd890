"""losses/: each is its formula, in the right direction, and only the student learns.  The op behind them: test_softmax_kl.py."""
import inspect

import pytest
import torch
import torch.nn.functional as F
from oracle import rows, soft_label, true_terms

from losses import METHODS, Targets, dkd_loss, kd_loss, mixed_ce
from training import options


@pytest.mark.parametrize("method", METHODS)
def test_upstream_gradient_reaches_the_student_alone(method):
    z, v, targets = rows(8, 12)
    v.requires_grad_()
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    METHODS[method](one, v, targets)[0].backward()
    loss, terms = METHODS[method](two, v, targets)
    (0.3 * loss + 1.7 * loss.square()).backward()
    torch.testing.assert_close(two.grad, one.grad * (0.3 + 3.4 * loss.item()), rtol=1e-5, atol=1e-7)
    assert v.grad is None
    assert all(term.ndim == 0 and term.dtype == torch.float32 and not term.requires_grad for term in terms.values())


def test_kd_is_its_formula():
    z, v, targets = rows(16, 10)
    expected = true_terms(z.double(), v.double(), targets, 4.0, smoothing=0.1)
    loss, terms = kd_loss(z, v, targets, alpha=0.7, label_smoothing=0.1)
    assert set(terms) == {"ce", "kl"}
    assert loss.item() == pytest.approx((0.3 * expected[0] + 0.7 * expected[1]).item(), rel=1e-6)
    assert kd_loss(z, v, targets, alpha=0.7, ce_weight=2.0)[0].item() == pytest.approx(
        (2 * true_terms(z.double(), v.double(), targets, 4.0)[0] + 0.7 * expected[1]).item(), rel=1e-6)
    expected = F.kl_div((z / 4).log_softmax(1), (v / 4).softmax(1), reduction="batchmean") * 16
    assert terms["kl"].item() == pytest.approx(expected.item(), rel=1e-5), "the direction of F.kl_div(student, teacher): teacher first"


def test_dkd_on_unmixed_rows_is_the_published_formula():
    """TCKD and NCKD as their authors write them, in float64 on tame logits; every rule for mixed rows reduces to it."""
    z, v, _ = rows(32, 10)
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


def test_label_and_other_are_not_interchangeable_but_equivalent_when_swapped_with_lam():
    z, v, targets = rows(16, 10)
    swapped = Targets(targets.other, targets.label, 1 - targets.lam)
    torch.testing.assert_close(dkd_loss(z, v, targets)[0], dkd_loss(z, v, swapped)[0], rtol=1e-6, atol=1e-6)
    wrong = Targets(targets.other, targets.label, targets.lam)
    assert abs(dkd_loss(z, v, targets)[0] - dkd_loss(z, v, wrong)[0]) > 1e-3


def test_mixed_ce_is_cross_entropy_with_the_dense_soft_label():
    z, _, targets = rows(40, 10)
    for smoothing in (0.0, 0.1):
        one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
        loss = mixed_ce(one, targets, label_smoothing=smoothing)
        dense = F.cross_entropy(two, soft_label(targets, 10, smoothing).float())
        torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-6)
        loss.backward(torch.tensor(0.37))
        dense.backward(torch.tensor(0.37))
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-7)
        assert kd_loss(z, z, targets, alpha=0.0, label_smoothing=smoothing)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_dominant_label():
    targets = Targets(torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]), torch.tensor([0.4, 0.5, 0.6]))
    assert targets.dominant.tolist() == [2, 1, 1]


def test_flags_and_functions_have_the_same_defaults():
    for name, function in METHODS.items():
        numbers = {key: parameter.default for key, parameter in inspect.signature(function).parameters.items() if key in options.METHODS[name]}
        assert numbers == options.METHODS[name]
    assert set(METHODS) == set(options.METHODS)


@pytest.mark.parametrize("call", [
    lambda z, v, t: kd_loss(z, v[:, :-1], t), lambda z, v, t: kd_loss(z[0], v[0], t), lambda z, v, t: kd_loss(z, v, Targets(*(x[:-1] for x in t))),
    lambda z, v, t: dkd_loss(z, v, t, mixed_target="both"), lambda z, v, t: kd_loss(z, v, t, kl="sideways"), lambda z, v, t: kd_loss(z[:0], v[:0], t)])
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError):
        call(*rows(4, 5))
