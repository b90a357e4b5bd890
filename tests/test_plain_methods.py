"""Methods in plain PyTorch: formulas, values of the authors' code, hard logits.  test_losses.py has what all share."""
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import rows

from kernels.softmax_kl import softmax_kl_naive
from losses import Targets
from losses.cist import cist_loss, temperatures
from losses.dist import dist_loss
from losses.mlkd import mlkd_loss
from losses.nkd import nkd_loss
from losses.skd import skd_loss

METHODS = {"dist": dist_loss, "nkd": nkd_loss, "mlkd": mlkd_loss, "skd": skd_loss, "cist": cist_loss}


def published():
    """Logits and labels of which the authors' code gave the values below, in float64."""
    k = torch.arange(60.0, dtype=torch.float64).view(6, 10)
    return (3 * torch.sin(1.7 * k)).float(), (4 * torch.cos(0.9 * k)).float(), torch.tensor([0, 3, 6, 9, 2, 5])


def equal_in_loss_terms_and_gradient(method, expected, z, v, targets, weights, **how):
    """expected: z, v in float64 -> the terms without CE, in the order of `weights`, after that of CE."""
    student, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, terms = method(student, v, targets, label_smoothing=0.1, **how)
    loss.backward()
    ce = softmax_kl_naive(exact, v.double(), *targets, temperature=1.0, label_smoothing=0.1)[0]
    wanted = [ce, *expected(exact, v.double())]
    total = sum(weight * term for weight, term in zip(weights, wanted, strict=True))
    total.backward()
    assert [term.item() for term in terms.values()] == pytest.approx([term.item() for term in wanted], rel=1e-5, abs=1e-6)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert (student.grad - exact.grad).abs().max() <= 2e-5 * exact.grad.abs().max().clamp(min=0.01)


# --- DIST

def dist_by_hand(z, v, temperature):
    """Row by row and column by column."""
    def pearson(x, y):
        x, y = x - x.mean(), y - y.mean()
        return (x * y).sum() / ((x * x).sum().sqrt() * (y * y).sum().sqrt() + 1e-8)

    q, p = (z / temperature).softmax(1), (v / temperature).softmax(1)
    return [temperature ** 2 * (1 - torch.stack([pearson(x, y) for x, y in zip(one, two)]).mean())
            for one, two in ((q, p), (q.T, p.T))]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("size", [(16, 10), (5, 100), (40, 2)])
def test_dist_is_its_formula(size, temperature):
    z, v, targets = rows(*size)
    equal_in_loss_terms_and_gradient(dist_loss, lambda z, v: dist_by_hand(z, v, temperature), z, v, targets, (0.5, 2.0, 3.0),
                                     ce_weight=0.5, beta=2.0, gamma=3.0, temperature=temperature)


def test_dist_ignores_scale_and_shift():
    z, _, targets = rows(16, 10)
    q = z.softmax(1)
    for student, teacher in ((z, z), (q.log(), (0.5 * q + 0.05).log())):  # 0.5 q + 0.05 still sums to 1
        _, terms = dist_loss(student, teacher, targets)
        assert abs(terms["inter"]) < 1e-5 and abs(terms["intra"]) < 1e-5
    _, terms = dist_loss(torch.zeros(16, 10), z, targets)
    assert terms["inter"] == terms["intra"] == 1


# --- NKD

def nkd_by_hand(z, v, targets, rule, temperature):
    """Row by row, with probabilities instead of their logarithms."""
    found = []
    for q, p, sharp_q, sharp_p, label, other, lam in zip(
            z.softmax(1), v.softmax(1), (z / temperature).softmax(1), (v / temperature).softmax(1), *targets):
        pair = {int(label), int(other)} if 0 < lam < 1 else {int(label) if lam else int(other)}
        hot = {"pair": pair, "first": pair & {int(label)} or pair,
               "dominant": {int(label) if lam >= 0.5 else int(other)}}[rule]
        rest = [i for i in range(len(q)) if i not in hot]
        target = -sum(p[i] * q[i].log() for i in hot)
        nontarget = -sum((sharp_p[i] / sharp_p[rest].sum() * (sharp_q[i] / sharp_q[rest].sum()).log() for i in rest),
                         torch.zeros((), dtype=z.dtype))
        found.append(torch.stack([target, temperature ** 2 * nontarget]))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("rule", ["pair", "dominant", "first"])
def test_nkd_is_its_formula(rule, classes):
    z, v, targets = rows(16, classes)
    equal_in_loss_terms_and_gradient(nkd_loss, lambda z, v: nkd_by_hand(z, v, targets, rule, 2.0), z, v, targets, (0.5, 2.0, 1.5),
                                     ce_weight=0.5, alpha=2.0, gamma=1.5, temperature=2.0, mixed_target=rule)


def test_nkd_has_the_value_of_the_authors_code():
    """NKDLoss of github.com/yzd-v/cls_KD, for unmixed rows, and for mixed ones with the dominant label."""
    z, v, label = published()
    mixed = Targets(label, (label + 1) % 10, torch.full((6,), 0.3))
    for temperature, gamma, unmixed, dominant in ((3.0, 3.5, 76.79875249957269, 76.03953180859239),
                                                  (1.0, 1.5, 6.346829133432112, 6.418003731789324)):
        how = {"temperature": temperature, "gamma": gamma, "ce_weight": 0.0}
        for rule in ("pair", "dominant", "first"):
            loss = nkd_loss(z, v, Targets.unmixed(label), mixed_target=rule, **how)[0]
            assert loss.item() == pytest.approx(unmixed, rel=1e-6)
        assert nkd_loss(z, v, mixed, mixed_target="dominant", **how)[0].item() == pytest.approx(dominant, rel=1e-6)
    with pytest.raises(ValueError, match="mixed_target"):
        nkd_loss(z, v, mixed, mixed_target="both")


# --- MLKD

def mlkd_by_hand(z, v):
    """Entry by entry of the matrices, as sums over pairs of images and of classes."""
    found = torch.zeros(3, dtype=z.dtype)
    for T in (2, 3, 4, 5, 6):
        q, p = (z / T).softmax(1), (v / T).softmax(1)
        batch = torch.stack([((a * b).sum() - (c * d).sum()) ** 2 for a, c in zip(q, p) for b, d in zip(q, p)])
        classes = torch.stack([((a * b).sum() - (c * d).sum()) ** 2 for a, c in zip(q.T, p.T) for b, d in zip(q.T, p.T)])
        found = found + torch.stack([T ** 2 * (p * (p / q).log()).sum(), batch.sum(), classes.sum() * len(z) / z.shape[1]])
    return found / len(z)


@pytest.mark.parametrize("size", [(16, 10), (5, 20), (12, 2)])
def test_mlkd_is_its_formula(size):
    z, v, targets = rows(*size)
    equal_in_loss_terms_and_gradient(mlkd_loss, mlkd_by_hand, z, v, targets, (0.5, 2.0, 3.0, 4.0),
                                     ce_weight=0.5, alpha=2.0, beta=3.0, gamma=4.0)


# --- SKD

def skd_by_hand(z, v, tikhonov):
    """By the inverse of the covariance, row by row."""
    q, p = (z / 4).softmax(1), (v / 4).softmax(1)
    s, t = F.cosine_similarity(z[:, None], z[None], dim=2), F.cosine_similarity(v[:, None], v[None], dim=2)
    difference = (s - t) / z.shape[1]
    inverse = torch.linalg.inv(torch.cov(difference.T) + tikhonov * torch.eye(len(z), dtype=z.dtype))
    distances = torch.stack([(row @ inverse @ row).sqrt() for row in difference])
    return 16 * (p * (p / q).log()).sum(1).mean(), distances.mean()


@pytest.mark.parametrize("tikhonov", [0.1, 1e-3])
@pytest.mark.parametrize("size", [(16, 10), (6, 100), (40, 3)])
def test_skd_is_its_formula(size, tikhonov):
    z, v, targets = rows(*size)
    equal_in_loss_terms_and_gradient(skd_loss, lambda z, v: skd_by_hand(z, v, tikhonov), z, v, targets, (0.5, 2.0, 3.0),
                                     ce_weight=0.5, alpha=2.0, beta=3.0, tikhonov=tikhonov)


@pytest.mark.parametrize("method, options, values", [
    (mlkd_loss, {}, {"kl": 24.960436424296073, "batch": 0.06813414645266377, "class": 0.05722582566679682}),
    (skd_loss, {}, {"kl": 5.177426847803781, "direction": 0.6903702787091488}),
    (skd_loss, {"tikhonov": 0.1 / 10**2}, {"kl": 5.177426847803781, "direction": 1.7999385745137382})])
def test_mlkd_and_skd_have_the_values_of_the_authors_code(method, options, values):
    """MLKD: kd_loss, bc_loss and cc_loss of github.com/Jin-Ying/Multi-Level-Logit-Distillation, summed over its temperatures.
    SKD: kd_loss and SKD_loss of github.com/HyunJunSik/StreamLined.

    torchdistill 1.1.5 has the first direction times a mask of one half, and the second by the paper's equations, which do not
    divide by the 10 classes.
    """
    z, v, label = published()
    terms = method(z, v, Targets.unmixed(label), **options)[1]
    assert {name: terms[name].item() for name in values} == pytest.approx(values, rel=1e-5)


# --- CIST

def cist_by_hand(z, v, rho):
    """Row by row; the factor is a constant."""
    found = []
    for student, teacher in zip(z, v):
        own, other = ((logits.max() - logits.mean()) / rho for logits in (student, teacher))
        q, p = (student / own).softmax(0), (teacher / other).softmax(0)
        found.append((own * other).detach() * (p * (p / q).log()).sum())
    return (torch.stack(found).mean(),)


@pytest.mark.parametrize("rho", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("size", [(16, 10), (6, 100), (40, 3)])
def test_cist_is_its_formula(size, rho):
    z, v, targets = rows(*size)
    equal_in_loss_terms_and_gradient(cist_loss, lambda z, v: cist_by_hand(z, v, rho), z, v, targets, (0.5, 2.0),
                                     ce_weight=0.5, alpha=2.0, rho=rho)
    assert cist_loss(z, v, targets, alpha=0.6)[0] == cist_loss(z, v, targets, alpha=0.6, ce_weight=0.4)[0]


def test_cist_does_not_change_the_scale_of_the_student():
    z, v, targets = rows(16, 10)
    leaf = z.requires_grad_()
    cist_loss(leaf, v, targets, ce_weight=0.0)[0].backward()
    assert (leaf.grad * leaf).sum(1).abs().max() < 1e-5 < leaf.grad.abs().max()


def test_cist_evens_out_the_entropy_of_the_teacher():
    """Against one temperature of the same mean entropy, for rows whose logits differ in scale."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(500, 100, generator=generator) * torch.linspace(1, 4, 500)[:, None]

    def entropies(temperature):
        return torch.distributions.Categorical(logits=v / temperature).entropy()

    own = entropies(temperatures(v, 2.0))
    same = [one for one in map(entropies, torch.linspace(0.5, 8, 151)) if abs(one.mean() - own.mean()) < 0.02]
    assert same and all(own.std() < one.std() / 3 for one in same)


# --- all

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(8, 100), (8, 3), (8, 2), (8, 1), (1, 10)])
def test_huge_flat_and_equal_logits_stay_finite(method, size):
    z, v, targets = rows(*size)
    huge, hot = 1e4 * z.sign(), 1e4 * F.one_hot(targets.other, size[1]).float()
    for one, two in ((huge, -huge), (huge, hot), (-hot, hot), (z, z), (torch.zeros_like(z), v), (z, torch.zeros_like(z))):
        leaf = one.clone().requires_grad_()
        loss, terms = METHODS[method](leaf, two, targets, label_smoothing=0.1)
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all() and all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_computed_in_fp32(method, dtype):
    z, v, targets = rows(16, 10, dtype=dtype)
    half, full = z.requires_grad_(), z.detach().float().requires_grad_()
    loss, wanted = METHODS[method](half, v, targets)[0], METHODS[method](full, v.float(), targets)[0]
    assert torch.equal(loss, wanted) and loss.dtype == torch.float32
    loss.backward(), wanted.backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_other_shapes_are_refused(method):
    z, v, targets = rows(8, 10)
    with pytest.raises(ValueError, match="equal shapes"):
        METHODS[method](z, v[:, 1:], targets)
