"""losses/ and their op against sums in float64 that are written out here, mpmath where float64 itself fails."""
import inspect

import mpmath
import pytest
import torch
import torch.nn.functional as F

from kernels.softmax_kl import Weights, softmax_kl
from losses import METHODS, Targets, dkd_loss, kd_loss, mixed_ce
from training import options

LOSS_TOLERANCE, GRAD_TOLERANCE = 5e-6, 5e-6  # of fp32 on a CPU: relative with floor 1; relative to the largest entry with floor 0.01
INF = float("inf")


def rows(n, classes, scale=3.0, seed=0, dtype=torch.float32):
    """Random logits, and targets of which some are unmixed, some end at lam 0 or 1 and some mix a label with itself."""
    g = torch.Generator().manual_seed(seed)
    z, v = (scale * torch.randn(n, classes, generator=g) for _ in range(2))
    label, other = (torch.randint(classes, (n,), generator=g) for _ in range(2))
    lam = torch.rand(n, generator=g)
    lam[::5], lam[1::7] = 1.0, 0.0
    return z.to(dtype), v.to(dtype), Targets(label, other, lam)


def soft_label(targets, classes, smoothing):
    """(N, C) float64, straight from the definition."""
    label, other, lam = targets
    lam = lam.double()[:, None]
    return (1 - smoothing) * (lam * F.one_hot(label, classes) + (1 - lam) * F.one_hot(other, classes)) + smoothing / classes


def plain_sum(weights, values):
    """Sum of weight * value over the last dimension, leaving out weights of 0 (where the value may be infinite)."""
    return torch.where(weights > 0, weights * torch.where(weights > 0, values, 0.0), 0.0).sum(-1)


def true_terms(z, v, targets, temperature, smoothing=0.0, split="pair", reverse=False):
    """CE, KL, TCKD, NCKD by their definitions in float64, a Python loop over rows; T^2 included, means over rows."""
    (n, classes), out = z.shape, []
    ce = -plain_sum(soft_label(targets, classes, smoothing), F.log_softmax(z, 1))
    log_q, log_p = F.log_softmax(z / temperature, 1), F.log_softmax(v / temperature, 1)
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    kl = plain_sum(first.exp(), first - second)
    for i in range(n):
        label, other, lam = (part[i].item() for part in targets)
        weights = {label: 0.0, other: 0.0}
        weights[label] += lam
        weights[other] += 1 - lam
        live = [name for name, weight in weights.items() if weight > 0]
        if len(live) == 1:
            chosen = live
        else:
            chosen = {"pair": [label, other], "first": [label], "dominant": [label if lam >= 0.5 else other]}[split]
        rest = [c for c in range(classes) if c not in chosen]
        groups = [[c] for c in chosen] + ([rest] if rest else [])
        log_qg, log_pg = (torch.stack([x[i, g].logsumexp(0) for g in groups]) for x in (log_q, log_p))
        tckd = plain_sum(log_pg.exp(), log_pg - log_qg)
        log_qr, log_pr = (F.log_softmax(x[i, rest] / temperature, 0) for x in (z, v))
        nckd = plain_sum(log_pr.exp(), log_pr - log_qr) if rest else z.sum() * 0
        out.append(torch.stack([ce[i], *(temperature**2 * term for term in (kl[i], tckd, nckd))]))
    return torch.stack(out).mean(0)


def truth(z, v, targets, weights, temperature, **flags):
    """Terms and gradient in float64, by autograd through the definitions."""
    z = z.double().detach().requires_grad_()
    terms = true_terms(z, v.double(), targets, temperature, **flags)
    (grad,) = torch.autograd.grad(sum(w * t for w, t in zip(weights, terms) if w), z)
    return terms.detach(), grad


def assert_terms(terms, expected, label=""):
    error = ((terms.double() - expected).abs() / expected.abs().clamp(min=1)).max().item()
    assert error < LOSS_TOLERANCE, f"{label} relative error {error:.2g}: {terms.tolist()} for {expected.tolist()}"


def assert_grad(grad, expected, label=""):
    error = ((grad.double() - expected).abs().max() / expected.abs().max().clamp(min=0.01)).item()
    assert error < GRAD_TOLERANCE, f"{label} gradient error {error:.2g} of its largest entry"


def run_op(z, v, targets, weights, temperature, smoothing=0.0, split="pair", reverse=False):
    z = z.clone().requires_grad_()
    loss, terms = softmax_kl(z, v, *targets, weights, temperature=temperature, label_smoothing=smoothing, split=split, reverse=reverse)
    (grad,) = torch.autograd.grad(loss, z)
    return loss.detach(), terms, grad


MIX = Weights(0.7, 0.3, 1.0, 8.0)


# 1 and 2 classes have an empty or single rest, 3 the smallest pair with a rest; 100 is CIFAR-100; 37 rows are no power of two.
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("split", ["pair", "dominant", "first"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_terms_and_gradient_match_float64_sums(classes, split, smoothing):
    for temperature, scale in ((4.0, 3.0), (1.0, 10.0)):
        z, v, targets = rows(37, classes, scale, seed=classes)
        expected, expected_grad = truth(z, v, targets, MIX, temperature, smoothing=smoothing, split=split)
        loss, terms, grad = run_op(z, v, targets, MIX, temperature, smoothing, split)
        assert_terms(terms, expected, f"C={classes} T={temperature}")
        assert_terms(loss, (torch.tensor(MIX).double() * expected).sum())
        assert_grad(grad, expected_grad, f"C={classes} T={temperature}")


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_reverse_kl_matches_float64_sums(classes):
    z, v, targets = rows(19, classes, 5.0)
    weights = Weights(ce=0.2, kl=1.5)
    expected, expected_grad = truth(z, v, targets, weights, 3.0, reverse=True)
    _, terms, grad = run_op(z, v, targets, weights, 3.0, reverse=True)
    assert_terms(terms, expected)
    assert_grad(grad, expected_grad)
    forward = run_op(z, v, targets, weights, 3.0)[1]
    assert abs(forward[1] - terms[1]) > 1e-3, "both directions gave the same value"


def hard_cases():
    """Logits on which naive code gives inf, NaN or the wrong digits."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(6, 10, generator=g)
    hot = torch.full((6, 10), -1e4).scatter(1, torch.arange(6)[:, None], 1e4)
    masked = noise.clone()
    masked[:, 9] = -INF
    return {
        "one-hot teacher": (noise, hot), "one-hot student": (hot, noise), "both one-hot": (hot, hot.roll(1, 0)), "both the same": (hot, hot),
        "random 1e4": (1e4 * noise, 1e4 * noise.roll(1, 0)), "shifted": (noise + 3e4, noise.roll(1, 0) - 3e4),
        "equal": (torch.zeros(6, 10), torch.zeros(6, 10)), "identical": (noise, noise), "class masked in both": (masked, masked.roll(1, 0)),
    }


@pytest.mark.parametrize("name", hard_cases())
@pytest.mark.parametrize("split", ["pair", "dominant"])
def test_extreme_logits_stay_finite_and_exact(name, split):
    z, v = hard_cases()[name]
    targets = Targets(torch.arange(6), torch.tensor([0, 2, 2, 4, 5, 5]), torch.tensor([1.0, 0.7, 0.3, 1.0, 0.5, 0.9]))
    smoothing = 0.0 if "masked" in name else 0.1  # smoothing towards an impossible class is infinite by definition
    expected, expected_grad = truth(z, v, targets, MIX, 4.0, smoothing=smoothing, split=split)
    _, terms, grad = run_op(z, v, targets, MIX, 4.0, smoothing, split)
    assert_terms(terms, expected, name)
    assert_grad(grad, expected_grad, name)
    if name in ("identical", "both the same"):
        assert terms[1:].abs().max() <= 1e-5, terms


@pytest.mark.parametrize("odds", [(20.0, 30.0), (60.0, 40.0), (300.0, 200.0)])
def test_confident_rows_match_mpmath(odds):
    """Where 1 - p is below float64's resolution the terms are still right, relative to their own tiny size."""
    mpmath.mp.dps = 200
    z, v = (torch.tensor([[float(odd), 1.0, -0.5, 0.25]]) for odd in odds)

    def softmax(x):
        weights = [mpmath.e ** mpmath.mpf(value) for value in x[0].tolist()]
        return [weight / sum(weights) for weight in weights]

    q, p = softmax(z), softmax(v)
    q_rest, p_rest = sum(q[1:]), sum(p[1:])
    tckd = p[0] * mpmath.log(p[0] / q[0]) + p_rest * mpmath.log(p_rest / q_rest)
    targets = Targets.unmixed(torch.tensor([0]))
    _, terms, grad = run_op(z, v, targets, Weights(tckd=1.0), 1.0)
    assert terms[2].item() == pytest.approx(float(tckd), rel=1e-4, abs=1e-37)
    assert grad[0, 0].item() == pytest.approx(float(p_rest - q_rest), rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradient_is_the_float64_gradient_rounded_once(dtype):
    z, v, targets = rows(64, 100, dtype=dtype)
    scale = torch.tensor(65536.0)
    _, expected = truth(z, v, targets, Weights(1.0, 0, 1.0, 8.0), 4.0)
    exact = expected * 65536
    half_ulp = torch.finfo(dtype).eps / 2
    for use_scaler in (True, False):
        leaf = z.clone().requires_grad_()
        loss, _ = dkd_loss(leaf, v, targets, grad_scale=None if use_scaler else scale)
        (loss * scale if use_scaler else loss).backward()
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.double() - exact).abs() - half_ulp * 1.01 * exact.abs()
        assert error.max() <= exact.abs().max() * GRAD_TOLERANCE, f"{error.max()} beyond one rounding, scaler {use_scaler}"
        assert (leaf.grad == 0).float().mean() < 0.01, "small gradients vanished"


def test_identities():
    z, v, targets = rows(50, 20)
    _, (ce, kl, tckd, nckd), grad = run_op(z, v, targets, MIX, 4.0)
    assert grad.sum(1).abs().max() < 1e-6, "a softmax's gradient sums to zero over the classes"
    _, shifted, shifted_grad = run_op(z + 7, v - 3, targets, MIX, 4.0)
    torch.testing.assert_close(torch.stack([ce, kl, tckd, nckd]), shifted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, shifted_grad, rtol=1e-4, atol=1e-6)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    back = order.argsort()
    _, permuted, permuted_grad = run_op(z[:, order], v[:, order], Targets(back[targets.label], back[targets.other], targets.lam), MIX, 4.0)
    torch.testing.assert_close(permuted, torch.stack([ce, kl, tckd, nckd]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(permuted_grad, grad[:, order], rtol=1e-4, atol=1e-6)
    parts = sum(weight * run_op(z, v, targets, Weights(**{name: 1.0}), 4.0)[2] for name, weight in MIX._asdict().items())
    torch.testing.assert_close(parts, grad, rtol=1e-4, atol=1e-6)
    for i in range(4):  # KL = TCKD + p_rest * NCKD, row by row
        one = Targets(*(part[i:i + 1] for part in targets))
        _, (_, kl, tckd, nckd), _ = run_op(z[i:i + 1], v[i:i + 1], one, MIX, 4.0)
        p = (v[i].double() / 4).softmax(0)
        gone = {one.label.item(), one.other.item()} if 0 < one.lam.item() < 1 else {(one.label if one.lam.item() == 1 else one.other).item()}
        rest = 1 - sum(p[c] for c in gone)
        assert kl.item() == pytest.approx((tckd + rest * nckd).item(), rel=1e-5)


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


def test_strided_rows_and_one_row():
    z, v, targets = rows(9, 11)
    wide = torch.randn(9, 40)
    wide[:, 3:36:3] = z
    strided, transposed = wide[:, 3:36:3], v.T.contiguous().T
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    torch.testing.assert_close(dkd_loss(strided, transposed, targets)[0], dkd_loss(z, v, targets)[0], rtol=0, atol=0)
    means = torch.stack([dkd_loss(z[i:i + 1], v[i:i + 1], Targets(*(part[i:i + 1] for part in targets)))[0] for i in range(9)]).mean()
    torch.testing.assert_close(means, dkd_loss(z, v, targets)[0], rtol=1e-5, atol=1e-6)


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
