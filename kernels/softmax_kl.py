"""Cross-entropy, KL divergence and decoupled KL between two sets of logits, with their gradient, in one call.

Student logits z and teacher logits v, (N, C); temperature T; q = softmax(z/T), p = softmax(v/T).  A row's target set is
{a, b} (only {a} where a = b) and R is all its other classes.  The softmax splits exactly into three groups and a
conditional distribution inside the last one:

    q = (q_a, q_b, q_R),   q_R = sum of q over R,   q^ = q / q_R on R                          (p likewise)

    TCKD = KL((p_a, p_b, p_R) || (q_a, q_b, q_R))        target classes
    NCKD = KL(p^ || q^)                                  non-target classes
    KL   = KL(p || q) = TCKD + p_R * NCKD                an identity, so KL comes for free
    CE   = -sum_i y_i log softmax(z)_i,   y = (1 - eps) * (lam * onehot(label) + (1 - lam) * onehot(other)) + eps / C

    loss = ce * CE + T^2 * (kl * KL + tckd * TCKD + nckd * NCKD),   every term the mean over the N rows.

With class weights w, (C,),  CE = -sum_i w_i y_i log softmax(z)_i,  also the mean over the N rows.

With a = b this is DKD (Zhao et al. 2022, arXiv 2203.08679); the three-way split is its extension to images that carry two
labels.  Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) is the weights (1 - alpha, alpha, 0, 0).

Gradient, T^2 included (times 1/N):
    i in {a, b}:  T * (tckd + kl) * (q_i - p_i)                                                  + ce * (softmax_i - y_i)
    i in R:       T * [(tckd * (q_R - p_R) + nckd + kl * q_R) * q^_i - (nckd + kl * p_R) * p^_i]  + ce * (softmax_i - y_i)
With class weights, softmax_i - y_i becomes  W * softmax_i - w_i y_i,  W = sum_j w_j y_j.
Reversed, every KL has the student first, KL = TCKD + q_R * NCKD, and its gradient is  T * kl * q_i * [L_i - KL]  for every i,
L_i = ln q_i - ln p_i; it is offered for the KL alone.  L_i and KL can be large and nearly equal, so their difference is summed as
sum_j q_j (L_i - L_j) over the groups, and inside R every L_i is taken relative to that of the student's largest class.

Why it does not overflow: the targets are left out of the maximum and of the sum over R instead of being subtracted or
masked by a large number, 1 - p is never formed, and everything else stays in log space.
"""
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import interpreted, on_device_of, use_triton

SPLITS = ("pair", "dominant", "first")
W_CE, W_KL, W_TCKD, W_NCKD, TEMPERATURE, SMOOTHING = map(tl.constexpr, range(6))  # where `hyperparameters` has each number


class Terms(NamedTuple):
    """Means over the rows, 0-dim fp32, detached: unweighted, T^2 included, NaN where not asked for."""
    ce: torch.Tensor
    kl: torch.Tensor
    tckd: torch.Tensor
    nckd: torch.Tensor


class Weights(NamedTuple):
    """The weight of each term in the loss: a number, or a 0-dim fp32 tensor on the logits' device, which a schedule may fill.

    None: neither computed nor logged; 0.0: logged but not in the loss.
    """
    ce: float | torch.Tensor | None = None
    kl: float | torch.Tensor | None = None
    tckd: float | torch.Tensor | None = None
    nckd: float | torch.Tensor | None = None

    @property
    def terms(self) -> str:
        """The names of the wanted terms, as the operator takes them."""
        return " ".join(name for name, weight in self._asdict().items() if weight is not None)


_hyperparameters: dict = {}  # not functools.cache: torch.compile looks through that, with a warning


def hyperparameters(weights: Weights, temperature: float, label_smoothing: float, device: torch.device) -> torch.Tensor:
    """The four weights, temperature and smoothing as fp32 (6,) on the device, cached by their values.

    The kernel reads them there, so a schedule recompiles nothing, and a captured CUDA graph follows the weights that are tensors.
    """
    scheduled = {place: weight for place, weight in enumerate(weights) if isinstance(weight, torch.Tensor)}
    fixed = (0.0 if place in scheduled else float(weight or 0.0) for place, weight in enumerate(weights))
    key = (*fixed, float(temperature), float(label_smoothing), device)
    if key not in _hyperparameters:
        _hyperparameters[key] = torch.tensor(key[:6]).to(device)
    numbers = _hyperparameters[key]
    if scheduled:
        numbers = numbers.clone()
        for place, weight in scheduled.items():
            numbers[place].copy_(weight)
    return numbers


def softmax_kl(student_logits, teacher_logits, label, other, lam, weights: Weights, *, temperature: float,
               label_smoothing: float = 0.0, split: str = "pair", reverse: bool = False, class_weights=None):
    """The loss of the module docstring, ready for `backward`, and its terms.

    student_logits, teacher_logits: (N, C) fp32, fp16 or bf16, any strides; the teacher is not read where CE alone is wanted,
    and may be None there.  label, other: int64 (N,).  lam: float32 (N,).
    split: the target set of a mixed row: "pair" {label, other}; "dominant" the one with the larger share; "first" label.
    reverse: the student first in the KL, which is then the only divergence that may have a weight.
    class_weights: fp32 (C,), at least 0, of the classes in CE; None: all 1.  As in torch.nn.CrossEntropyLoss(weight=...) with
    probabilities as targets: the mean is over the N rows, not over their weights.
    The gradient is kept in fp32 until `backward`, where the upstream gradient multiplies it before it is rounded to 16 bits.
    Returns the loss (0-dim fp32, backpropagates to student_logits only) and its Terms.
    Raises ValueError for shapes or a split that do not fit, and without any term.
    """
    wanted = weights.terms
    if wanted in ("", "ce"):
        teacher_logits = None
    elif teacher_logits is None:
        raise ValueError(f"{wanted} needs the teacher's logits")
    shapes = [tuple(logits.shape) for logits in (student_logits, teacher_logits) if logits is not None]
    if student_logits.ndim != 2 or len(set(shapes)) != 1 or 0 in student_logits.shape:
        raise ValueError(f"logits must be (N, C), not empty, and alike: {' and '.join(map(str, shapes))}")
    if not label.shape == other.shape == lam.shape == student_logits.shape[:1]:
        raise ValueError(f"targets must be (N,): {tuple(label.shape)}, {tuple(other.shape)}, {tuple(lam.shape)}")
    if class_weights is not None and class_weights.shape != student_logits.shape[1:]:
        raise ValueError(f"class weights must be (C,): {tuple(class_weights.shape)} for {student_logits.shape[1]} classes")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    if not wanted:
        raise ValueError("no term is wanted: every weight is None")
    if reverse and (weights.tckd or weights.nckd):
        raise ValueError("TCKD and NCKD have no reverse direction")
    hyper = hyperparameters(weights, temperature, label_smoothing, student_logits.device)
    teacher_logits = None if teacher_logits is None else teacher_logits.detach()
    losses, grad = torch.ops.fusekd.softmax_kl(student_logits.detach(), teacher_logits, label, other, lam, hyper,
                                               wanted, split, reverse, class_weights)
    loss, *terms = losses.unbind()
    return _WithGradient.apply(student_logits, loss, grad), Terms(*terms)


class _WithGradient(torch.autograd.Function):
    """Gives an already computed loss its already computed gradient."""

    @staticmethod
    def forward(ctx, student_logits, loss, grad):
        ctx.save_for_backward(grad)
        ctx.dtype = student_logits.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the gradient would count as a constant
            raise RuntimeError("softmax_kl has no second derivative: call backward without create_graph")
        (grad,) = ctx.saved_tensors
        return (grad * upstream).to(ctx.dtype), None, None


# --- the operator -----------------------------------------------------------------------------------------------------
# Opaque to torch.compile, functional (nothing is mutated, so CUDA graphs may hold it), autograd outside.

_library = torch.library.Library("fusekd", "DEF")
_library.define("softmax_kl(Tensor student, Tensor? teacher, Tensor label, Tensor other, Tensor lam, Tensor hyper, str terms, "
                "str split, bool reverse, Tensor? class_weights=None) -> (Tensor, Tensor)")


def _softmax_kl(student, teacher, label, other, lam, hyper, terms, split, reverse, class_weights=None):
    """-> fp32 (5,): the weighted sum, CE, KL, TCKD, NCKD; and the gradient, fp32 (N, C), contiguous.  terms: names of Weights."""
    implementation = softmax_kl_triton if use_triton(student) else softmax_kl_cpu
    with torch._C._AutoDispatchBelowAutograd():  # every operation inside starts sooner, as in PyTorch's own operators
        return implementation(student, teacher, label, other, lam, hyper, terms=terms, split=split, reverse=reverse,
                              class_weights=class_weights)


_library.impl("softmax_kl", _softmax_kl, "CPU")
_library.impl("softmax_kl", _softmax_kl, "CUDA")


@torch.library.register_fake("fusekd::softmax_kl", lib=_library)
def _(student, teacher, label, other, lam, hyper, terms, split, reverse, class_weights=None):
    return student.new_empty(5, dtype=torch.float32), student.new_empty(student.shape, dtype=torch.float32)


# --- the specification ------------------------------------------------------------------------------------------------

def softmax_kl_naive(z, v, label, other, lam, *, temperature, label_smoothing=0.0, split="pair", reverse=False,
                     standardize=False, class_weights=None):
    """CE, KL, TCKD and NCKD of the module docstring as (4,), row by row, for reading and for tests: best in float64.

    z, v: logits (N, C) of student and teacher; autograd gives the gradient.  standardize: z-scored logits except in CE
    (losses/standardize.py).  The other arguments are those of `softmax_kl`.
    """
    classes, lam = z.shape[1], lam.to(z.dtype)
    soft_label = lam[:, None] * F.one_hot(label, classes) + (1 - lam)[:, None] * F.one_hot(other, classes)
    y = (1 - label_smoothing) * soft_label + label_smoothing / classes
    terms = [_expected(y if class_weights is None else y * class_weights, -z.log_softmax(1)).mean()]
    if standardize:
        z, v = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, correction=min(1, classes - 1)) + 1e-7) for x in (z, v))
    student, teacher = (z / temperature).log_softmax(1), (v / temperature).log_softmax(1)
    q, p = (teacher, student) if reverse else (student, teacher)
    rows = []
    for i, (a, b, share) in enumerate(zip(label.tolist(), other.tolist(), lam.tolist())):
        if share in (0, 1):
            targets = {a if share else b}
        else:
            targets = {"pair": {a, b}, "dominant": {a if share >= 0.5 else b}, "first": {a}}[split]
        rest = torch.ones(classes, dtype=torch.bool)
        rest[list(targets)] = False
        log_q, log_p = (torch.stack([*x[i, list(targets)], x[i, rest].logsumexp(0)]) for x in (q, p))
        inside_q, inside_p = (x[i, rest].log_softmax(0) for x in (q, p))
        rows.append(torch.stack([_divergence(p[i], q[i]), _divergence(log_p, log_q), _divergence(inside_p, inside_q)]))
    return torch.cat([torch.stack(terms), temperature**2 * torch.stack(rows).mean(0)])


def _expected(p, values):
    """The sum of p * values over the last dimension, where an impossible class counts as 0 even if its value is infinite."""
    return torch.where(p > 0, p * torch.where(p > 0, values, 0.0), 0.0).sum(-1)


def _divergence(log_p, log_q):
    """KL(p || q)."""
    return _expected(log_p.exp(), log_p - log_q)


# --- the CPU path -----------------------------------------------------------------------------------------------------

# It computes what has a weight, in few operations and in place: on a CPU it is what people train with, and there a small batch
# takes as long as PyTorch takes to start the operations.

class Scalars(NamedTuple):
    """The factors of the formulas, 0-dim fp32: a Python number would be converted in every operation that it enters."""
    one: torch.Tensor
    inverse_T: torch.Tensor
    mean: torch.Tensor  # 1 / n
    square_mean: torch.Tensor  # T^2 / n
    uniform: torch.Tensor  # eps / C
    minus_hard: torch.Tensor  # -(1 - eps)
    ce: torch.Tensor  # the weights as the gradient has them, over n
    kl: torch.Tensor  # these three times T
    tckd: torch.Tensor
    nckd: torch.Tensor

    @classmethod
    def of(cls, hyper, n, classes):
        if hyper.is_cuda:  # reading it would wait
            return cls(*_derived(hyper.unbind(), n, classes))
        return cls.known(tuple(hyper.tolist()), n, classes)

    @classmethod
    @functools.cache
    def known(cls, hyper, n, classes):
        return cls(*torch.tensor(_derived(hyper, n, classes), dtype=torch.float32).unbind())


def _derived(hyper, n, classes) -> tuple:
    """The values of Scalars, from those of `hyperparameters`."""
    w_ce, *weights, T, eps = hyper
    return 1.0, 1 / T, 1 / n, T * T / n, eps / classes, eps - 1, w_ce / n, *(weight * T / n for weight in weights)


def softmax_kl_cpu(z, v, label, other, lam, hyper, *, terms: str, split: str, reverse: bool, class_weights=None):
    """The formulas of the module docstring in fp32 PyTorch; arguments and results of the operator."""
    wanted, z, scalars = terms.split(), z.float(), Scalars.of(hyper, *z.shape)
    means: dict = dict.fromkeys(Weights._fields, hyper.new_full((), torch.nan))
    grad: Any = None
    log_softmax = z.log_softmax(1) if "ce" in wanted else None
    whole = wanted[-1] == "kl" and not reverse  # without a split
    if whole:
        means["kl"], grad = _forward_kl(_from_top(z) if log_softmax is None else log_softmax, v.float(), scalars)
    labels, shares = torch.stack([label, other]).t(), torch.stack([lam, scalars.one - lam]).t()
    if not whole and wanted != ["ce"]:
        targets = _targets(labels, shares, split)
        divergences, grad = _divergences(z, v.float(), targets, scalars, reverse, with_kl="kl" in wanted)
        means |= {name: mean for name, mean in divergences.items() if name in wanted}
    if log_softmax is not None:
        means["ce"], on_logits = (_cross_entropy(log_softmax, labels, shares, scalars) if class_weights is None else
                                  _weighted_cross_entropy(log_softmax, labels, shares, class_weights, scalars))
        grad = on_logits.mul_(scalars.ce) if grad is None else grad.addcmul_(on_logits, scalars.ce)
    stacked = torch.stack(list(means.values()))
    weighted = hyper[:4] * stacked  # a term of weight 0 does not count, even if it is infinite or NaN: nansum leaves it out
    losses = torch.cat([weighted.nansum(0, keepdim=True), stacked])
    return losses.add_(grad.sum(), alpha=0), grad  # NaN where the gradient is: the sums above leave out a row that diverged


def _cross_entropy(log_softmax, labels, shares, scalars):
    """Mean CE, and the gradient of the sum of CE over the rows, in the memory of the logarithms.

    The gradient is exact to 1e-7 absolute; the kernel's is so relatively, also where a softmax is near 1.
    """
    less = shares * scalars.minus_hard
    spread = (log_softmax.sum() * scalars.uniform).nan_to_num_(nan=0.0, neginf=-math.inf)
    ce = (less * log_softmax.gather(1, labels)).nansum() - spread
    return ce * scalars.mean, log_softmax.exp_().sub_(scalars.uniform).scatter_add_(1, labels, less)


def _weighted_cross_entropy(log_softmax, labels, shares, class_weights, scalars):
    """`_cross_entropy` with class weights."""
    less, uniform = shares * scalars.minus_hard * class_weights[labels], class_weights * scalars.uniform
    spread = _finite(log_softmax * uniform).sum()
    ce = (less * log_softmax.gather(1, labels)).nansum() - spread
    total = uniform.sum() - less.sum(1, keepdim=True)
    return ce * scalars.mean, log_softmax.exp_().mul_(total).sub_(uniform).scatter_add_(1, labels, less)


def _finite(products):
    """Products with a factor that may be infinite, in place: 0 where the other one is 0.  In a sum, nansum does the same."""
    return products.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


def _forward_kl(z, v, scalars):
    """Mean of the forward KL, T^2 included, and its weighted gradient; z must be near 0 at its maximum before T rounds it."""
    log_q, log_p = (z * scalars.inverse_T).log_softmax(1), _from_top(v).mul_(scalars.inverse_T).log_softmax(1)
    p = log_p.exp()
    kl = log_p.sub_(log_q).mul_(p).nansum() * scalars.square_mean
    return kl, _of_zero_sum(log_q.exp_().sub_(p), p.round_()).mul_(scalars.kl)


def _from_top(x):
    return x - x.amax(1, keepdim=True)


def _of_zero_sum(difference, half):
    """q - p, in place.  Where one class has nearly all of both, its difference is that of all others, which have more digits.

    half: p rounded, that is 1 for a class that has more than half.
    """
    return difference.addcmul_(half, difference.sum(1, keepdim=True), value=-1)


def _targets(labels, shares, split):
    """The target sets, int64: (N, 2) for "pair", else (N, 1).  A label whose share is 0 goes, and the row counts as unmixed."""
    if split == "dominant":
        return labels.gather(1, shares.argmax(1, keepdim=True))
    targets = labels.where(shares > 0, labels.flip(1))
    return targets if split == "pair" else targets[:, :1]


def _divergences(z, v, targets, scalars, reverse, with_kl):
    """Means of TCKD, NCKD and KL, T^2 included, and the gradient of their weighted sum, from the split into targets and R."""
    x, both = torch.stack([z, v]), targets.expand(2, -1, -1)  # (2, N, ...): student and teacher are split together
    groups = x.gather(2, both)  # the targets, and later R as the last one
    if targets.shape[1] == 2:
        a, b = targets.unbind(1)
        groups[..., 1].masked_fill_(a == b, -torch.inf)
    top = x.scatter_(2, both, -torch.inf).amax(2, keepdim=True).nan_to_num_(neginf=0.0)  # over R
    for part in (x, groups):  # small numbers in R, however large the logits are; of a target, anything
        part.sub_(top).mul_(scalars.inverse_T)
    inside = x.exp()
    total = inside.sum(2, keepdim=True)  # 0 where R is empty
    groups = torch.cat([groups, total.log()], 2)
    groups -= groups.amax(2, keepdim=True)
    groups -= functools.reduce(torch.logaddexp, groups.unbind(2)).unsqueeze(2)
    q, p = groups.unbind()  # (q_a, q_b, q_R), (p_a, p_b, p_R): their logarithms, until exp_
    log_ratio = q - p if reverse else p - q
    groups.exp_()
    (x, y), (q_inside, p_inside), (q_total, p_total) = x.unbind(), inside.unbind(), total.unbind()
    constant = (q_total / p_total).log_()  # ln p^ - ln q^ on R is y - x and this
    total.clamp_(min=1.0)  # as it is where R is not empty: q^ = q_inside / q_total is 0 where it is
    # The targets' gradients come from the three groups, the other classes' from the conditional distributions.
    if not reverse:
        tckd = (p * log_ratio).nansum()
        distance = y.sub_(x).mul_(p_inside).nansum(1, keepdim=True)
        nckd = constant.addcdiv_(distance, p_total)
        delta = _of_zero_sum(q - p, p.round())
        of_q, of_p, on_targets = torch.addcmul(scalars.nckd, delta[:, -1:], scalars.tckd), scalars.nckd, scalars.tckd
        if with_kl:
            of_q, of_p = of_q.addcmul_(q[:, -1:], scalars.kl), torch.addcmul(of_p, p[:, -1:], scalars.kl)
            on_targets = on_targets + scalars.kl
        on_targets = delta[:, :-1] * on_targets
        on_rest = q_inside.mul_(of_q / q_total).addcmul_(p_inside, of_p / p_total, value=-1)
    else:
        # x - y can be large and nearly equal everywhere: it is taken relative to that of the student's largest class.
        base = y.gather(1, x.argmax(1, keepdim=True))
        distance = _finite(x.sub_(y).add_(base).mul_(q_inside))
        mean_distance = distance.sum(1, keepdim=True) / q_total
        tckd = (q * log_ratio).nansum()
        nckd = (mean_distance - constant - base).nan_to_num_(nan=0.0, posinf=math.inf, neginf=0.0)
        level = torch.cat([log_ratio[:, :-1], log_ratio[:, -1:] + nckd], 1)  # the mean of L_i over each group
        above = torch.cat([(q * (one - level)).nansum(1, keepdim=True) for one in level.split(1, 1)], 1)
        on_targets = _finite(q * above)[:, :-1] * scalars.kl
        on_rest = distance.addcmul_(q_inside, above[:, -1:] - mean_distance).mul_(q[:, -1:] / q_total * scalars.kl)
        on_rest.add_(v.amax(1, keepdim=True), alpha=0)  # NaN for a non-finite teacher, which the sums above leave out
    sums = {"tckd": tckd, "nckd": nckd.nansum()}
    if with_kl:
        sums["kl"] = tckd + ((q if reverse else p)[:, -1:] * nckd).nansum()
    return {name: value * scalars.square_mean for name, value in sums.items()}, on_rest.scatter_add_(1, targets, on_targets)


# --- the kernel -------------------------------------------------------------------------------------------------------
# A program takes ROWS rows.  A tile is (CHUNKS, ROWS, LANES, VECTOR): a thread has the VECTOR adjacent classes of one 128-bit
# load from every chunk, LANES threads share a row, and sums over chunks and vectors stay inside a thread.  z and v are tiles
# of student and teacher logits in which both labels' own columns and what lies beyond the row are -inf; `_1` marks
# temperature 1, s the student's softmax there.  What a launch does not want is dead code to the compiler.

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-1e38)  # below every logit that counts, yet differences from it are finite


@triton.jit
def _log1p(x):
    """ln(1 + x) for x >= 0, to the last bits of a tiny x (Kahan); libdevice's is not there in the interpreter."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _inverse(x):
    return tl.where(x != 0, 1.0 / tl.where(x != 0, x, 1.0), 0.0)


@triton.jit
def _times(p, value):
    """p * value, 0 where p is 0: an impossible class contributes nothing.  NaN is not 0, so that a non-finite row shows."""
    return tl.where(p != 0, p * value, 0.0)


@triton.jit
def _groups(a, b, rest):
    """Log-weights of {a}, {b} and R -> ln (q_a, q_b, q_R), (q_a, q_b, q_R), and the log of the weights' sum."""
    top = tl.maximum(tl.maximum(a, b), rest)
    a, b, rest = a - top, b - top, rest - top
    in_a, in_b, in_rest = tl.exp(a), tl.exp(b), tl.exp(rest)
    others = tl.where(a == 0, in_b + in_rest, tl.where(b == 0, in_a + in_rest, in_a + in_b))
    log_total, share = _log1p(others), 1.0 / (1.0 + others)
    return a - log_total, b - log_total, rest - log_total, in_a * share, in_b * share, in_rest * share, top + log_total


@triton.jit
def _difference(q, q_others, p, p_others):
    """q - p; where both are near 1 their complements are subtracted, which keeps the digits."""
    return tl.where((q > 0.5) & (p > 0.5), p_others - q_others, q - p)


@triton.jit
def _spread(values):
    """Values of rows, or of the lanes of rows, over a tile."""
    if len(values.shape) == 1:
        values = values[:, None]
    return values[None, :, :, None]


@triton.jit
def _lane_sum(tile):
    return tl.sum(tl.sum(tile, 3), 0)


@triton.jit
def _lane_max(tile):
    return tl.max(tl.max(tile, 3), 0)


@triton.jit
def _load(at, column, live, left):
    """The tile that begins at the rows' pointers `at` in fp32, -inf beyond the `left` classes that are left of a row.

    The labels are not in the mask: that would cost the 128-bit loads.
    """
    return tl.load(_spread(at) + column, _spread(live) & (column < left), other=NONE).to(tl.float32)


@triton.jit
def _at(logits, row, column, live, STRIDE: tl.constexpr):
    return tl.load(logits + row * STRIDE + column, live, other=0.0).to(tl.float32)


@triton.jit
def _anchor(z, v, top_z):
    """The teacher's logit where the student has its maximum."""
    return _lane_max(tl.where(z == _spread(top_z), v, LOWEST))


@triton.jit
def _weights(z, v, top_z, top_v, log2_e_T):
    """e^(z/T), e^z and e^(v/T), over those at_z the maxima."""
    z, v = z - _spread(top_z), v - _spread(top_v)
    return tl.exp2(z * log2_e_T), tl.exp2(z * LOG2E), tl.exp2(v * log2_e_T)


@triton.jit
def _gap(first, z, v, top_z, base_v):
    """Sum of z - v under the first distribution, unnormalised."""
    return _lane_sum(_times(first, (z - _spread(top_z)) - (v - _spread(base_v))))


@triton.jit
def _moved_gap(gap, total, drop, shift):
    """The gap when the maxima move: the weights shrink by `drop`, z - v grows by `shift`."""
    return drop * (gap + total * shift)


@triton.jit
def _read_rest(at_z, at_v, column, a, b, start, live, C: tl.constexpr, DIVERGENCE: tl.constexpr):
    """The tiles from class `start` on with -inf in the labels' own columns, and which columns those are not."""
    rest = (column != _spread(a - start)) & (column != _spread(b - start))
    z = tl.where(rest, _load(at_z, column, live, C - start), NONE)
    v = z
    if DIVERGENCE:
        v = tl.where(rest, _load(at_v, column, live, C - start), NONE)
    return z, v, rest


@triton.jit
def _beyond(z, own, rest, class_weights, column, C: tl.constexpr):
    """By lane, over the columns of R: the sum of z - own, or of w * (z - own); and the sum of w."""
    beyond = z - _spread(own)
    w_R = beyond
    if class_weights is not None:
        w_R = tl.load(class_weights + column, column < C, other=0.0)
        beyond = _times(w_R, beyond)
    return _lane_sum(tl.where(rest, beyond, 0.0)), _lane_sum(tl.where(rest, w_R, 0.0))


@triton.jit
def _summary_of_tile(z, v, log2_e_T, REVERSE: tl.constexpr):
    """Of rows that fit into one tile: its weights; maxima over R; and sums over R: gap, e^(z/T), e^z, e^(v/T)."""
    top_z = tl.maximum(tl.max(_lane_max(z), 1), LOWEST)
    top_v = tl.maximum(tl.max(_lane_max(v), 1), LOWEST)
    weight_z, weight_1, weight_v = _weights(z, v, top_z, top_v, log2_e_T)
    if REVERSE:
        base_v = tl.max(_anchor(z, v, top_z), 1)
        gap = tl.sum(_gap(weight_z, z, v, top_z, base_v), 1)
    else:
        base_v = top_v
        gap = tl.sum(_gap(weight_v, z, v, top_z, base_v), 1)
    return (weight_z, weight_1, weight_v, top_z, top_v, base_v, gap,
            tl.sum(_lane_sum(weight_z), 1), tl.sum(_lane_sum(weight_1), 1), tl.sum(_lane_sum(weight_v), 1))


@triton.jit
def _summary_of_blocks(at_z, at_v, class_weights, column, a, b, own, live, log2_e_T, C: tl.constexpr, ROWS: tl.constexpr,
                       LANES: tl.constexpr, BLOCK: tl.constexpr, DIVERGENCE: tl.constexpr, REVERSE: tl.constexpr):
    """Of wider rows the same and what `_beyond` gives, online: each lane rescales its sums when its maxima rise."""
    top_z = tl.full([ROWS, LANES], LOWEST, tl.float32)
    gap = tl.zeros([ROWS, LANES], tl.float32)
    top_v, base_v, total_z, total_1, total_v, beyond, w_R = top_z, top_z, gap, gap, gap, gap, gap
    for start in range(0, C, BLOCK):
        z, v, rest = _read_rest(at_z, at_v, column, a, b, start, live, C, DIVERGENCE)
        old_z, old_v, old_base = top_z, top_v, base_v
        top_z, top_v = tl.maximum(top_z, _lane_max(z)), tl.maximum(top_v, _lane_max(v))
        drop_z, drop_v = tl.exp2((old_z - top_z) * log2_e_T), tl.exp2((old_v - top_v) * log2_e_T)
        weight_z, weight_1, weight_v = _weights(z, v, top_z, top_v, log2_e_T)
        if REVERSE:
            base_v = tl.where(top_z > old_z, _anchor(z, v, top_z), base_v)
            gap = _moved_gap(gap, total_z, drop_z, (old_z - top_z) - (old_base - base_v))
            gap += _gap(weight_z, z, v, top_z, base_v)
        else:
            base_v = top_v
            gap = _moved_gap(gap, total_v, drop_v, (old_z - top_z) - (old_base - base_v))
            gap += _gap(weight_v, z, v, top_z, base_v)
        total_z = total_z * drop_z + _lane_sum(weight_z)
        total_1 = total_1 * tl.exp2((old_z - top_z) * LOG2E) + _lane_sum(weight_1)
        total_v = total_v * drop_v + _lane_sum(weight_v)
        at_z, at_v = at_z + BLOCK, at_v + BLOCK
        more, w_more = _beyond(z, own, rest & (column < C - start), class_weights, column + start, C)
        beyond += more
        w_R += w_more
    # The lanes of a row together.
    old_z, old_v, old_base = top_z, top_v, base_v
    top_z, top_v = tl.max(top_z, 1), tl.max(top_v, 1)
    fall_z, fall_v = old_z - top_z[:, None], old_v - top_v[:, None]
    drop_z, drop_v = tl.exp2(fall_z * log2_e_T), tl.exp2(fall_v * log2_e_T)
    if REVERSE:
        base_v = tl.max(tl.where(fall_z == 0, old_base, LOWEST), 1)
        gap = _moved_gap(gap, total_z, drop_z, fall_z - (old_base - base_v[:, None]))
    else:
        base_v = top_v
        gap = _moved_gap(gap, total_v, drop_v, fall_z - fall_v)
    gap, beyond, w_R = tl.sum(gap, 1), tl.sum(beyond, 1), tl.sum(w_R, 1)
    total_z, total_v = tl.sum(total_z * drop_z, 1), tl.sum(total_v * drop_v, 1)
    total_1 = tl.sum(total_1 * tl.exp2(fall_z * LOG2E), 1)
    return at_z, at_v, top_z, top_v, base_v, gap, total_z, total_1, total_v, beyond, w_R


# From these sums follow a row's terms, the gradients of its labels, and the factors of the gradient in R, which is
#     factor_1 * e^z + factor_z * e^(z/T) - factor_v * e^(v/T)
# or reversed factor_1 * e^z + e^(z/T) * (factor_z + factor_gap * (z - v)); z and v are relative to the maxima.  `one` marks rows
# of one label.

@triton.jit
def _cross_entropy_of(z_a, z_b, total_1, beyond, share, one, eps, uniform, C: tl.constexpr):
    """CE and its gradients: of a, of b, and factor_1."""
    log_s_a, log_s_b, log_s_R, s_a, s_b, s_R, lse = _groups(z_a, z_b, tl.log2(total_1) * LN2)
    # Smoothing's share: the sum over all classes of ln softmax_i = (x_i - own) + ln softmax_own.
    log_s_own, labels = tl.where(share >= 0.5, log_s_a, log_s_b), tl.where(one, 1, 2)
    ce = -(1 - eps) * (_times(share, log_s_a) + _times(1 - share, log_s_b))
    ce -= tl.where(eps > 0, uniform * (beyond + (C - labels) * log_s_own + log_s_a + tl.where(one, 0.0, log_s_b)), 0.0)
    y_a, y_b = (1 - eps) * share + uniform, (1 - eps) * (1 - share) + tl.where(one, 0.0, uniform)
    y_R = uniform * (C - labels)
    return (ce, _difference(s_a, s_b + s_R, y_a, y_b + y_R), _difference(s_b, s_a + s_R, y_b, y_a + y_R),
            tl.exp(-lse))  # lse is relative to top_z and so not negative


@triton.jit
def _weighted_cross_entropy_of(z_a, z_b, total_1, beyond, w_a, w_b, w_R, share, one, eps, uniform):
    """The same with class weights.  beyond: the sum of w * (z - own) over R.  w_R: the sum of the weights in R."""
    log_s_a, log_s_b, log_s_R, s_a, s_b, s_R, lse = _groups(z_a, z_b, tl.log2(total_1) * LN2)
    # The weighted soft label over its sum, `total`, is a distribution t: the gradient is total * (softmax - t).
    y_a, y_R = w_a * ((1 - eps) * share + uniform), w_R * uniform
    y_b = tl.where(one, 0.0, w_b * ((1 - eps) * (1 - share) + uniform))
    log_s_own, total = tl.where(share >= 0.5, log_s_a, log_s_b), y_a + y_b + y_R
    inverse = _inverse(total)
    ce = -_times(y_a, log_s_a) - _times(y_b, log_s_b)
    ce -= tl.where(eps > 0, uniform * (beyond + _times(w_R, log_s_own)), 0.0)
    return (ce, total * _difference(s_a, s_b + s_R, y_a * inverse, (y_b + y_R) * inverse),
            total * _difference(s_b, s_a + s_R, y_b * inverse, (y_a + y_R) * inverse), total * tl.exp(-lse))


@triton.jit
def _join_rest(z_b, v_b, total_z, total_v, gap, one, inverse_T):
    """b joins R: how much the maxima rise, what is left of the weights in R, the weights of b, and the new sums."""
    up_z = tl.where(total_z != 0, tl.maximum(z_b, 0.0), tl.where(one, 0.0, z_b))
    up_v = tl.where(total_v != 0, tl.maximum(v_b, 0.0), tl.where(one, 0.0, v_b))
    in_R_z, in_R_v = tl.exp(-up_z * inverse_T), tl.exp(-up_v * inverse_T)
    in_b_z, in_b_v = tl.exp((z_b - up_z) * inverse_T), tl.exp((v_b - up_v) * inverse_T)
    gap = tl.where(total_v != 0, _moved_gap(gap, total_v, in_R_v, up_v - up_z), 0.0)
    gap += _times(in_b_v, (z_b - up_z) - (v_b - up_v))
    total_z = tl.where(total_z != 0, total_z * in_R_z, 0.0) + in_b_z
    total_v = tl.where(total_v != 0, total_v * in_R_v, 0.0) + in_b_v
    return up_z, up_v, in_R_z, in_R_v, in_b_z, in_b_v, total_z, total_v, gap


@triton.jit
def _forward(q, p, total_z, total_v, z_over_v, gap, T, inverse_T, w_kl, w_tckd, w_nckd, scale):
    """TCKD, NCKD, KL and their weighted gradients: of a, of b, factor_z, factor_v."""
    log_q_a, log_q_b, log_q_R, q_a, q_b, q_R, _ = q
    log_p_a, log_p_b, log_p_R, p_a, p_b, p_R, _ = p
    inverse_z, inverse_v = _inverse(total_z), _inverse(total_v)
    tckd = -_times(p_a, log_q_a - log_p_a) - _times(p_b, log_q_b - log_p_b) - _times(p_R, log_q_R - log_p_R)
    nckd = tl.where(total_v != 0, z_over_v - gap * inverse_v * inverse_T, 0.0)
    kl = tckd + _times(p_R, nckd)
    grad_a = T * (w_tckd + w_kl) * _difference(q_a, q_b + q_R, p_a, p_b + p_R)
    factor_z = T * scale * (w_tckd * _difference(q_R, q_a + q_b, p_R, p_a + p_b) + w_nckd + w_kl * q_R) * inverse_z
    factor_v = T * scale * (w_nckd + w_kl * p_R) * inverse_v
    grad_b = T * (w_tckd + w_kl) * _difference(q_b, q_a + q_R, p_b, p_a + p_R)
    return tckd, nckd, kl, grad_a, grad_b, factor_z, factor_v


@triton.jit
def _reverse(q, p, total_z, v_over_z, base_v, top_v, gap, T, inverse_T, w_kl, scale):
    """TCKD, NCKD, KL, student first, and the weighted gradients of KL: of a, of b, factor_z, factor_gap."""
    log_q_a, log_q_b, log_q_R, q_a, q_b, q_R, _ = q
    log_p_a, log_p_b, log_p_R, _, _, _, _ = p
    over_a, over_b, over_R = log_q_a - log_p_a, log_q_b - log_p_b, log_q_R - log_p_R
    inverse_z = _inverse(total_z)
    mean_gap = gap * inverse_z * inverse_T
    at_top = v_over_z - (base_v - top_v) * inverse_T
    nckd = tl.where(total_z != 0, mean_gap + at_top, 0.0)
    over_mean = over_R + nckd
    tckd = _times(q_a, over_a) + _times(q_b, over_b) + _times(q_R, over_R)
    kl = tckd + _times(q_R, nckd)
    grad_a = w_kl * T * _times(q_a, _times(q_b, over_a - over_b) + _times(q_R, over_a - over_mean))
    grad_b = w_kl * T * _times(q_b, _times(q_a, over_b - over_a) + _times(q_R, over_b - over_mean))
    factor_gap = w_kl * scale * q_R * inverse_z
    factor_z = factor_gap * T * (_times(q_a, over_mean - over_a) + _times(q_b, over_mean - over_b) - mean_gap)
    return tckd, nckd, kl, grad_a, grad_b, factor_z, factor_gap


@triton.jit
def _labels(label, other, lam, row, live, SPLIT: tl.constexpr):
    """a, b and the share of a; a label whose share is 0 goes, and the row counts as unmixed: a = b."""
    share = tl.load(lam + row, live, other=1.0)
    given, partner = tl.load(label + row, live, other=0).to(tl.int32), tl.load(other + row, live, other=0).to(tl.int32)
    a, b = tl.where(share <= 0, partner, given), tl.where(share >= 1, given, partner)
    share = tl.where(a == b, 1.0, share)
    if SPLIT == "dominant":
        a, b, share = tl.where(share >= 0.5, a, b), tl.where(share >= 0.5, b, a), tl.maximum(share, 1 - share)
    return a, b, share


@triton.jit
def _add_up(row_terms, losses, hyper, N, WANTED: tl.constexpr, REDUCE: tl.constexpr):
    """Run by the program that finishes last: the means over the rows, always added in the same order, and their weighted sum."""
    loss, index = 0.0, tl.arange(0, REDUCE)
    for term in tl.static_range(4):
        mean = float("nan")
        if WANTED[term]:
            total = tl.zeros([REDUCE], tl.float32)
            for start in range(0, N, REDUCE):  # other programs wrote them: read past the first-level cache
                total += tl.load(row_terms + term * N + start + index, start + index < N, other=0.0, cache_modifier=".cg")
            mean, weight = tl.sum(total, 0) / N, tl.load(hyper + term)
            loss += tl.where(weight != 0, weight * mean, 0.0)  # a term of weight 0 does not count, even where it is infinite
        tl.store(losses + 1 + term, mean)
    tl.store(losses, loss)


@triton.jit
def _softmax_kl_kernel(student, teacher, label, other, lam, hyper, class_weights, grad, row_terms, losses, finished, N,
                       C: tl.constexpr, STUDENT_STRIDE: tl.constexpr, TEACHER_STRIDE: tl.constexpr,
                       CE: tl.constexpr, KL: tl.constexpr, TCKD: tl.constexpr, NCKD: tl.constexpr,
                       SPLIT: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr,
                       CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, REDUCE: tl.constexpr):
    BLOCK: tl.constexpr = CHUNKS * LANES * VECTOR
    WHOLE: tl.constexpr = BLOCK >= C
    DIVERGENCE: tl.constexpr = KL or TCKD or NCKD
    w_ce, w_kl = tl.load(hyper + W_CE), tl.load(hyper + W_KL)
    w_tckd, w_nckd = tl.load(hyper + W_TCKD), tl.load(hyper + W_NCKD)
    T, eps, scale = tl.load(hyper + TEMPERATURE), tl.load(hyper + SMOOTHING), 1.0 / N
    inverse_T = 1.0 / T
    log2_e_T = LOG2E * inverse_T  # e^(z/T) = 2^(z * log2_e_T)
    uniform = eps / C

    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < N
    column = (tl.arange(0, CHUNKS)[:, None, None, None] * (LANES * VECTOR) + tl.arange(0, LANES)[None, None, :, None] * VECTOR
              + tl.arange(0, VECTOR)[None, None, None, :])
    a, b, share = _labels(label, other, lam, row, live, SPLIT)
    one = a == b
    z_a, z_b = _at(student, row, a, live, STUDENT_STRIDE), _at(student, row, b, live, STUDENT_STRIDE)
    own = tl.where(share >= 0.5, z_a, z_b)
    at_z, at_v, at_grad = student + row * STUDENT_STRIDE, teacher + row * TEACHER_STRIDE, grad + row * C

    # First read: maxima over the classes besides both labels, and sums.
    if WHOLE:
        z, v, rest = _read_rest(at_z, at_v, column, a, b, 0, live, C, DIVERGENCE)
        weight_z, weight_1, weight_v, top_z, top_v, base_v, gap, total_z, total_1, total_v = _summary_of_tile(
            z, v, log2_e_T, REVERSE)
        beyond, w_R = _beyond(z, own, rest & (column < C), class_weights, column, C)
        beyond, w_R = tl.sum(beyond, 1), tl.sum(w_R, 1)
    else:
        at_z, at_v, top_z, top_v, base_v, gap, total_z, total_1, total_v, beyond, w_R = _summary_of_blocks(
            at_z, at_v, class_weights, column, a, b, own, live, log2_e_T, C, ROWS, LANES, BLOCK, DIVERGENCE, REVERSE)

    # Nothing to subtract where there is no class besides the labels.
    top_z = tl.where(total_z != 0, top_z, 0.0)
    top_v, base_v = tl.where(total_v != 0, top_v, 0.0), tl.where(total_v != 0, base_v, 0.0)
    z_a, z_b = z_a - top_z, tl.where(one, NONE, z_b - top_z)
    grad_a = tl.zeros([ROWS], tl.float32)
    grad_b, factor_1, factor_z, factor_v, factor_gap = grad_a, grad_a, grad_a, grad_a, grad_a
    if CE:
        if class_weights is None:
            ce, grad_a, grad_b, factor_1 = _cross_entropy_of(z_a, z_b, total_1, beyond, share, one, eps, uniform, C)
        else:
            w_a, w_b = tl.load(class_weights + a), tl.load(class_weights + b)
            ce, grad_a, grad_b, factor_1 = _weighted_cross_entropy_of(
                z_a, z_b, total_1, beyond, w_a, w_b, w_R, share, one, eps, uniform)
        grad_a, grad_b, factor_1 = w_ce * grad_a, w_ce * grad_b, w_ce * scale * factor_1
        tl.store(row_terms + row, ce, live)
    if DIVERGENCE:
        v_a, v_b = _at(teacher, row, a, live, TEACHER_STRIDE) - top_v, _at(teacher, row, b, live, TEACHER_STRIDE) - top_v
        v_b = tl.where(one, NONE, v_b)
        if SPLIT != "pair":
            up_z, up_v, in_R_z, in_R_v, in_b_z, in_b_v, total_z, total_v, gap = _join_rest(
                z_b, v_b, total_z, total_v, gap, one, inverse_T)
            z_a, v_a, z_b = z_a - up_z, v_a - up_v, tl.full([ROWS], NONE, tl.float32)
            v_b = z_b
        log_total_z, log_total_v = tl.log2(total_z) * LN2, tl.log2(total_v) * LN2
        q = _groups(z_a * inverse_T, z_b * inverse_T, log_total_z)
        p = _groups(v_a * inverse_T, v_b * inverse_T, log_total_v)
        if REVERSE:
            tckd, nckd, kl, on_a, on_b, factor_z, factor_gap = _reverse(
                q, p, total_z, log_total_v - log_total_z, base_v, top_v, gap, T, inverse_T, w_kl, scale)
        else:
            tckd, nckd, kl, on_a, on_b, factor_z, factor_v = _forward(
                q, p, total_z, total_v, log_total_z - log_total_v, gap, T, inverse_T, w_kl, w_tckd, w_nckd, scale)
        if SPLIT != "pair":
            on_b = (factor_z * in_b_z - factor_v * in_b_v) / scale
            factor_z *= in_R_z
            factor_v *= in_R_v
        grad_a += on_a
        grad_b += on_b
        if KL:
            tl.store(row_terms + N + row, T * T * kl, live)
        if TCKD:
            tl.store(row_terms + 2 * N + row, T * T * tckd, live)
        if NCKD:
            tl.store(row_terms + 3 * N + row, T * T * nckd, live)
    grad_a *= scale
    grad_b *= scale
    smoothed = w_ce * uniform * scale

    # Second read, backwards while the end of the row is still in cache: the gradient.
    LAST: tl.constexpr = (C - 1) // BLOCK * BLOCK
    at_grad += LAST
    for back in range(0, C, BLOCK):
        start = LAST - back
        if not WHOLE:
            at_z, at_v = at_z - BLOCK, at_v - BLOCK
            z = _load(at_z, column, live, C - start)
            v = z
            if DIVERGENCE:
                v = _load(at_v, column, live, C - start)
            weight_z, weight_1, weight_v = _weights(z, v, top_z, top_v, log2_e_T)
        g = tl.zeros([CHUNKS, ROWS, LANES, VECTOR], tl.float32)
        if CE:
            w = 1.0
            if class_weights is not None:
                w = tl.load(class_weights + start + column, column < C - start, other=0.0)
            g = weight_1 * _spread(factor_1) - smoothed * w
        if DIVERGENCE:
            if REVERSE:
                g += _times(weight_z, _spread(factor_z)
                            + _spread(factor_gap) * ((z - _spread(top_z)) - (v - _spread(base_v))))
            else:
                g += weight_z * _spread(factor_z) - weight_v * _spread(factor_v)
        g = tl.where(column == _spread(b - start), _spread(grad_b), g)
        g = tl.where(column == _spread(a - start), _spread(grad_a), g)
        tl.store(_spread(at_grad) + column, g, _spread(live) & (column < C - start))
        at_grad -= BLOCK

    tl.debug_barrier()
    if tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        _add_up(row_terms, losses, hyper, N, [CE, KL, TCKD, NCKD], REDUCE)
        tl.store(finished, 0)


class Tile(NamedTuple):
    """Launch sizes.  `registers` is the assembler's limit: left alone, it spills a value or two for another step of occupancy."""
    rows: int
    lanes: int
    chunks: int
    warps: int
    registers: int


def vector_for(*logits) -> int:
    """How many adjacent classes a thread may load at once: 128 bits, less where rows begin in between."""
    steps = [128 // (8 * max(x.itemsize for x in logits)), logits[0].shape[1], *(x.stride(0) for x in logits)]
    return math.gcd(*steps)


def tile_for(classes: int, vector: int, reverse: bool, weighted: bool) -> Tile:
    if interpreted():  # which pays per program and per operation, hardly per lane
        rows, lanes, block, warps, registers = 64 if classes <= 4096 else 4, 1, min(classes, 4096), 1, 0
    elif classes <= 128:
        rows, lanes, block, warps, registers = 4, 8, classes, 1, 152 if reverse else 144
    elif classes <= 256:
        rows, lanes, block, warps, registers = 2, 16, classes, 1, 168
    elif classes <= 1024:
        rows, lanes, block, warps, registers = 1, 32, classes, 1, 232 if reverse else 224
    else:  # 2048 at a time: wider tiles would spill, or leave one program per multiprocessor
        narrow = classes <= 2048 and not weighted
        rows, lanes, block, warps, registers = (1, 64, classes, 2, 255) if narrow else (1, 128, 2048, 4, 128)
    if weighted and registers:  # class weights are a third tile
        registers = 208 if classes <= 128 else min(255, registers + 40)
    return Tile(rows, lanes, triton.next_power_of_2(triton.cdiv(block, lanes * vector)), warps, registers)


@functools.cache
def _counter(device: torch.device, stream: int) -> torch.Tensor:
    """How many programs have finished: 0 between launches.  One per stream, since launches on one stream never overlap."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def _counter_for(logits: torch.Tensor) -> torch.Tensor:
    if not logits.is_cuda:
        return _counter(logits.device, 0)
    if torch.cuda.is_current_stream_capturing():  # a counter of the graph's own, which every replay sets to 0
        return torch.zeros(1, dtype=torch.int32, device=logits.device)
    return _counter(logits.device, torch.cuda.current_stream(logits.device).cuda_stream)


def softmax_kl_triton(student, teacher, label, other, lam, hyper, *, terms: str, split: str, reverse: bool,
                      class_weights=None):
    """One launch; arguments and results of the operator.  Logits whose classes are not adjacent are copied first."""
    teacher = student if teacher is None else teacher
    student, teacher = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (student, teacher))
    rows, classes = student.shape
    vector = vector_for(student, teacher)
    tile = tile_for(classes, vector, reverse, class_weights is not None)
    wanted = {name.upper(): name in terms.split() for name in Weights._fields}
    if not wanted["TCKD"] and not wanted["NCKD"]:
        split = "pair"  # on which KL and CE do not depend
    grad = torch.empty(student.shape, dtype=torch.float32, device=student.device)
    row_terms = torch.empty(4, rows, dtype=torch.float32, device=student.device)
    losses = torch.empty(5, dtype=torch.float32, device=student.device)
    with on_device_of(student):
        _softmax_kl_kernel[(triton.cdiv(rows, tile.rows),)](
            student, teacher, label.contiguous(), other.contiguous(), lam.contiguous(), hyper, class_weights, grad, row_terms,
            losses, _counter_for(student), rows, classes, student.stride(0), teacher.stride(0), **wanted,
            SPLIT=split, REVERSE=reverse, ROWS=tile.rows, CHUNKS=tile.chunks, LANES=tile.lanes, VECTOR=vector,
            REDUCE=256 * tile.warps, num_warps=tile.warps, maxnreg=tile.registers or None,
            enable_fp_fusion=True)  # by default Triton 3.9 does so with a warning, and newer ones may not
    return losses, grad
