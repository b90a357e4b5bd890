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

With a = b this is DKD (Zhao et al. 2022, arXiv 2203.08679); the three-way split is its extension to images that carry two
labels.  Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) is the weights (1 - alpha, alpha, 0, 0).

Gradient, T^2 included (times 1/N):
    i in {a, b}:  T * (tckd + kl) * (q_i - p_i)                                                  + ce * (softmax_i - y_i)
    i in R:       T * [(tckd * (q_R - p_R) + nckd + kl * q_R) * q^_i - (nckd + kl * p_R) * p^_i]  + ce * (softmax_i - y_i)
Reversed, every KL has the student first, KL = TCKD + q_R * NCKD, and its gradient is  T * kl * q_i * [(ln q_i - ln p_i) - KL]
for every i; it is offered for the KL alone.

Why it does not overflow: the targets are left out of the maximum and of the sum over R instead of being subtracted or
masked by a large number, 1 - p is never formed, and everything else stays in log space.
"""
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import interpreted, use_triton

SPLITS = ("pair", "dominant", "first")


class Weights(NamedTuple):
    """What each term counts in the loss."""
    ce: float = 0.0
    kl: float = 0.0
    tckd: float = 0.0
    nckd: float = 0.0


_hyperparameters: dict = {}


def hyperparameters(weights: Weights, temperature: float, label_smoothing: float, device: torch.device) -> torch.Tensor:
    """The numbers of the loss as fp32 (7,) on the device, the last a factor 1 for the gradient; one tensor per set of numbers.

    The kernel reads them there, so a schedule recompiles nothing, and a captured CUDA graph follows what is later written into
    the tensor that it was captured with.
    """
    key = (*weights, temperature, label_smoothing, device)
    if key not in _hyperparameters:
        _hyperparameters[key] = torch.tensor([*key[:6], 1.0], dtype=torch.float32, device=device)
    return _hyperparameters[key]


def softmax_kl(student_logits, teacher_logits, label, other, lam, weights: Weights, *, temperature: float,
               label_smoothing: float = 0.0, split: str = "pair", reverse: bool = False, grad_scale=None):
    """The loss of the module docstring, ready for `backward`, and its terms.

    student_logits, teacher_logits: (N, C) fp32, fp16 or bf16, any strides.  label, other: int64 (N,).  lam: float32 (N,).
    split: the target set of a mixed row: "pair" {label, other}; "dominant" the one with the larger share; "first" label.
    reverse: the student first in the KL, which is then the only divergence that may have a weight.
    grad_scale: 0-dim fp32 tensor that multiplies the gradient before it is rounded to a 16-bit dtype.  Without it the
    gradient is kept in fp32 until `backward`, where the upstream gradient multiplies it before the rounding.
    Returns the loss (0-dim fp32, backpropagates to student_logits only) and detached fp32 (4,): CE, KL, TCKD, NCKD,
    unweighted, with T^2.  Raises ValueError for shapes or a split that do not fit.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape or 0 in student_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"logits must be (N, C), not empty, and alike: {shapes}")
    if not label.shape == other.shape == lam.shape == student_logits.shape[:1]:
        raise ValueError(f"targets must be (N,): {tuple(label.shape)}, {tuple(other.shape)}, {tuple(lam.shape)}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    if reverse and (weights.tckd or weights.nckd):
        raise ValueError("TCKD and NCKD have no reverse direction")
    hyper = hyperparameters(Weights(*map(float, weights)), float(temperature), float(label_smoothing), student_logits.device)
    dtype = torch.float32
    if grad_scale is not None:
        hyper, dtype = torch.cat([hyper[:6], grad_scale.reshape(1).float()]), student_logits.dtype
    losses, grad = torch.ops.fusekd.softmax_kl(student_logits.detach(), teacher_logits.detach(), label, other, lam, hyper,
                                               split, reverse, dtype)
    return _WithGradient.apply(student_logits, losses[0], grad), losses[1:]


class _WithGradient(torch.autograd.Function):
    """Gives an already computed loss its already computed gradient."""

    @staticmethod
    def forward(ctx, student_logits, loss, grad):
        ctx.save_for_backward(grad)
        ctx.dtype = student_logits.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return (grad * upstream).to(ctx.dtype), None, None


# --- the operator -----------------------------------------------------------------------------------------------------
# Opaque to torch.compile, functional (nothing is mutated, so CUDA graphs may hold it), autograd outside.

_library = torch.library.Library("fusekd", "DEF")
_library.define("softmax_kl(Tensor student, Tensor teacher, Tensor label, Tensor other, Tensor lam, Tensor hyper, str split, "
                "bool reverse, ScalarType grad_dtype) -> (Tensor, Tensor)")


def _softmax_kl(student, teacher, label, other, lam, hyper, split, reverse, grad_dtype):
    """-> losses fp32 (5,): the weighted sum, CE, KL, TCKD, NCKD; and the gradient (N, C), contiguous."""
    if use_triton(student):
        return softmax_kl_triton(student, teacher, label, other, lam, hyper, split=split, reverse=reverse, grad_dtype=grad_dtype)
    return softmax_kl_reference(student, teacher, label, other, lam, hyper, split=split, reverse=reverse, grad_dtype=grad_dtype)


_library.impl("softmax_kl", _softmax_kl, "CPU")
_library.impl("softmax_kl", _softmax_kl, "CUDA")


@torch.library.register_fake("fusekd::softmax_kl", lib=_library)
def _(student, teacher, label, other, lam, hyper, split, reverse, grad_dtype):
    return student.new_empty(5, dtype=torch.float32), student.new_empty(student.shape, dtype=grad_dtype)


# --- the reference ----------------------------------------------------------------------------------------------------

class _Split(NamedTuple):
    """softmax(x / T) of every row, taken apart; (N, C), (N, 1) and (N, 3) fp32."""
    rest: torch.Tensor         # bool (N, C): the classes of R
    logits: torch.Tensor       # x / T less its maximum over R: small numbers, however large x is
    log_sum: torch.Tensor      # ln sum of exp(logits) over R; -inf where R is empty
    conditional: torch.Tensor  # q^: the softmax inside R, 0 outside
    log_groups: torch.Tensor   # ln (q_a, q_b, q_R)

    @property
    def groups(self):
        return self.log_groups.exp()


def _split(x, temperature, a, b) -> _Split:
    a, b = a[:, None], b[:, None]
    classes = torch.arange(x.shape[1], device=x.device)
    rest = (classes != a) & (classes != b)
    top = x.masked_fill(~rest, -torch.inf).amax(1, keepdim=True)
    logits = (x - top.masked_fill(top == -torch.inf, 0.0)) / temperature
    weights = logits.exp().masked_fill(~rest, 0.0)
    total = weights.sum(1, keepdim=True)
    groups = torch.cat([logits.gather(1, a), logits.gather(1, b).masked_fill(a == b, -torch.inf), total.log()], 1)
    largest, where = groups.max(1, keepdim=True)
    relative = groups - largest
    log_groups = relative - relative.exp().scatter(1, where, 0.0).sum(1, keepdim=True).log1p()
    return _Split(rest, logits, total.log(), weights / total.masked_fill(total == 0, 1.0), log_groups)


def _expectation(probability, value):
    """Sum over the classes of probability * value, where 0 * inf is 0: an impossible class contributes nothing."""
    return torch.where(probability > 0, probability * value, 0.0).sum(1, keepdim=True)


def _differences(q, p):
    """q - p for (N, 3) distributions; where both are near 1 their complements are subtracted, which keeps the digits."""
    def complement(x):
        return x.roll(1, 1) + x.roll(2, 1)
    return torch.where((q > 0.5) & (p > 0.5), complement(p) - complement(q), q - p)


def softmax_kl_reference(student, teacher, label, other, lam, hyper, *, split: str, reverse: bool, grad_dtype):
    """The formulas of the module docstring in fp32 PyTorch; arguments and results of the operator."""
    w_ce, w_kl, w_tckd, w_nckd, T, eps, scale = hyper.unbind()
    z, v = student.float(), teacher.float()
    rows, classes = z.shape
    label, other = torch.where(lam <= 0, other, label), torch.where(lam >= 1, label, other)  # one label left: unmixed
    mixed = (label != other)[:, None]
    share = torch.where(mixed, lam[:, None], 1.0)
    a, b = label, other
    if split == "dominant":
        a = b = torch.where(share[:, 0] >= 0.5, label, other)
    if split == "first":
        a = b = label

    q, p, s = _split(z, T, a, b), _split(v, T, a, b), _split(z, 1.0, label, other)
    q_groups, p_groups, s_groups = q.groups, p.groups, s.groups
    log_ratio = (q.logits - q.log_sum) - (p.logits - p.log_sum)  # ln q^ - ln p^ on R
    group_ratio = q.log_groups - p.log_groups
    first, groups, sign = (q, q_groups, 1) if reverse else (p, p_groups, -1)
    tckd = _expectation(groups, sign * group_ratio)
    nckd = _expectation(first.conditional, sign * log_ratio)
    kl = tckd + torch.where(groups[:, 2:] > 0, groups[:, 2:] * nckd, 0.0)

    hard = torch.cat([share, 1 - share, torch.zeros_like(share)], 1)
    log_softmax = torch.where(s.rest, s.logits - s.log_sum + s.log_groups[:, 2:], 0.0).sum(1, keepdim=True)
    log_softmax = log_softmax + s.log_groups[:, :1] + torch.where(mixed, s.log_groups[:, 1:2], 0.0)
    ce = -(1 - eps) * _expectation(hard, s.log_groups) - torch.where(eps > 0, eps / classes * log_softmax, 0.0)
    terms = torch.cat([ce, T * T * torch.cat([kl, tckd, nckd], 1)], 1).mean(0)
    weights = hyper[:4]
    total = torch.where(weights != 0, weights * terms, 0.0).sum(0, keepdim=True)

    # The targets' gradients come from the three groups, the other classes' from the conditional distributions.
    if reverse:
        on_groups = T * w_kl * torch.where(q_groups > 0, q_groups * (group_ratio - kl), 0.0)
        q_rest = q_groups[:, 2:] * q.conditional
        on_rest = T * w_kl * torch.where(q_rest > 0, q_rest * (log_ratio + group_ratio[:, 2:] - kl), 0.0)
    else:
        delta = _differences(q_groups, p_groups)
        on_groups = T * (w_tckd + w_kl) * delta
        on_rest = T * ((w_tckd * delta[:, 2:] + w_nckd + w_kl * q_groups[:, 2:]) * q.conditional
                       - (w_nckd + w_kl * p_groups[:, 2:]) * p.conditional)
    uniform = eps / classes
    smooth = (1 - eps) * hard + uniform * torch.cat([torch.ones_like(share), mixed.float(), classes - 1 - mixed.float()], 1)
    grad = (_place(on_rest, on_groups, a, b)
            + w_ce * _place(s.conditional * s_groups[:, 2:] - uniform, _differences(s_groups, smooth), label, other))
    return torch.cat([total, terms]), (grad * (scale / rows)).to(grad_dtype)


def _place(on_rest, on_groups, a, b):
    """(N, C) values of R with those of the groups written over columns a and b; b first, so that a wins where they meet."""
    return on_rest.scatter(1, b[:, None], on_groups[:, 1:2]).scatter(1, a[:, None], on_groups[:, :1])


# --- the kernel -------------------------------------------------------------------------------------------------------
# A program takes ROWS rows.  x and y are tiles of student and teacher logits; `_t` marks the teacher, `1` temperature 1.

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(float("-inf"))


@triton.jit
def _log1p(x):
    """ln(1 + x) for x >= 0, to the last bits of a tiny x (Kahan); libdevice's is not there in the interpreter."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _log(x):
    return tl.where(x > 0, tl.log(tl.where(x > 0, x, 1.0)), NONE)


@triton.jit
def _inverse(x):
    return tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def _log_groups(a, b, rest):
    """Log-weights of {a}, {b} and R -> ln (q_a, q_b, q_R), and the log of their sum."""
    top = tl.maximum(tl.maximum(a, b), rest)
    in_a, in_b, in_rest = tl.exp(a - top), tl.exp(b - top), tl.exp(rest - top)
    others = tl.where(a == top, in_b + in_rest, tl.where(b == top, in_a + in_rest, in_a + in_b))
    log_total = _log1p(others)
    return a - top - log_total, b - top - log_total, rest - top - log_total, top + log_total


@triton.jit
def _difference(q, q_others, p, p_others):
    """q - p; where both are near 1 their complements are subtracted, which keeps the digits."""
    return tl.where((q > 0.5) & (p > 0.5), p_others - q_others, q - p)


@triton.jit
def _term(p, log_p, log_q):
    """p * (ln p - ln q), 0 where p is 0."""
    return tl.where(p > 0, p * (log_p - log_q), 0.0)


@triton.jit
def _finite(top):
    """The maximum to subtract: 0 where R is empty."""
    return tl.where(top == NONE, 0.0, top)


@triton.jit
def _load(logits, row, stride, column, live, C):
    """A tile in fp32, -inf outside.  The targets are not in the mask: that would cost the 128-bit loads."""
    inside = live[:, None] & (column < C)[None, :]
    return tl.load(logits + (row * stride)[:, None] + column[None, :], inside, other=NONE).to(tl.float32)


@triton.jit
def _store(grad, row, column, values, live, C):
    """A tile of the contiguous gradient, rounded to its dtype."""
    inside = live[:, None] & (column < C)[None, :]
    tl.store(grad + (row * C)[:, None] + column[None, :], values.to(grad.dtype.element_ty), inside)


@triton.jit
def _at(logits, row, stride, column, live):
    return tl.load(logits + row * stride + column, live, other=0.0).to(tl.float32)


@triton.jit
def _without(column, a, b, C):
    """Which columns of a tile are neither a nor b."""
    return (column[None, :] != a[:, None]) & (column[None, :] != b[:, None]) & (column < C)[None, :]


@triton.jit
def _tile_sums(x, y, top, top_t, own, column, rest, rest1, cold, C, REVERSE: tl.constexpr):
    """Of one tile: sums of e^(x/T), e^x and e^(y/T), of x - y under the first distribution, unnormalised, and of x - own."""
    spread = tl.sum(tl.where((column < C)[None, :], x - own[:, None], 0.0), 1)
    x = x - top[:, None]
    y = y - top_t[:, None]
    weight = tl.where(rest, tl.exp2(x * cold), 0.0)
    weight_t = tl.where(rest, tl.exp2(y * cold), 0.0)
    first = weight_t
    if REVERSE:
        first = weight
    gap = tl.where(first > 0, first * (x - y), 0.0)
    return tl.sum(weight, 1), tl.sum(tl.where(rest1, tl.exp2(x * LOG2E), 0.0), 1), tl.sum(weight_t, 1), tl.sum(gap, 1), spread


@triton.jit
def _tile_gradient(x, y, column, rest, rest1, a, b, label_a, label_b, grad_a, grad_b, ce_a, ce_b, of_q, of_gap, of_p, of_s,
                   uniform, cold, REVERSE: tl.constexpr):
    """The gradient of one tile of logits that have their maxima subtracted."""
    weight = tl.where(rest, tl.exp2(x * cold), 0.0)
    if REVERSE:
        kd = tl.where(weight > 0, weight * (of_q[:, None] + of_gap[:, None] * (x - y)), 0.0)
    else:
        kd = weight * of_q[:, None] - tl.where(rest, tl.exp2(y * cold), 0.0) * of_p[:, None]
    kd = tl.where(column[None, :] == b[:, None], grad_b[:, None], kd)
    kd = tl.where(column[None, :] == a[:, None], grad_a[:, None], kd)
    ce = tl.where(rest1, tl.exp2(x * LOG2E), 0.0) * of_s[:, None] - uniform
    ce = tl.where(column[None, :] == label_b[:, None], ce_b[:, None], ce)
    ce = tl.where(column[None, :] == label_a[:, None], ce_a[:, None], ce)
    return kd + ce


@triton.jit
def _mean(values, N, REDUCE: tl.constexpr):
    """Mean of N values that other programs wrote, past the first-level cache."""
    index = tl.arange(0, REDUCE)
    total = tl.zeros([REDUCE], tl.float32)
    for start in range(0, N, REDUCE):
        total += tl.load(values + start + index, start + index < N, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0) / N


@triton.jit
def _weighted(weight, term):
    """A term of weight 0 does not count, even where it is infinite."""
    return tl.where(weight != 0, weight * term, 0.0)


@triton.jit
def _softmax_kl_kernel(student, teacher, label, other, lam, hyper, grad, row_terms, losses, finished, N, C,
                       student_stride, teacher_stride, SPLIT: tl.constexpr, REVERSE: tl.constexpr,
                       WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REDUCE: tl.constexpr):
    w_ce, w_kl, w_tckd, w_nckd = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    T, eps, scale = tl.load(hyper + 4), tl.load(hyper + 5), tl.load(hyper + 6) / N
    cold = LOG2E / T  # e^(x/T) = 2^(x * cold)
    uniform = eps / C

    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < N
    column = tl.arange(0, BLOCK)

    # Labels; one whose share is 0 goes, and the row counts as unmixed.  Then the target set {a, b}.
    share = tl.load(lam + row, live, other=1.0)
    given, partner = tl.load(label + row, live, other=0).to(tl.int32), tl.load(other + row, live, other=0).to(tl.int32)
    label_a, label_b = tl.where(share <= 0, partner, given), tl.where(share >= 1, given, partner)
    share = tl.where(label_a == label_b, 1.0, share)
    a, b = label_a, label_b
    if SPLIT == "dominant":
        a = tl.where(share >= 0.5, label_a, label_b)
        b = a
    if SPLIT == "first":
        b = label_a

    on_a, on_b = _at(student, row, student_stride, label_a, live), _at(student, row, student_stride, label_b, live)
    own = tl.where(share >= 0.5, on_a, on_b)

    # First read: maxima over R and the sums under them, in one tile or online over blocks.
    if WHOLE:
        x, y = _load(student, row, student_stride, column, live, C), _load(teacher, row, teacher_stride, column, live, C)
        rest, rest1 = _without(column, a, b, C), _without(column, label_a, label_b, C)
        top, top_t = _finite(tl.max(tl.where(rest, x, NONE), 1)), _finite(tl.max(tl.where(rest, y, NONE), 1))
        total, total1, total_t, gap, spread = _tile_sums(x, y, top, top_t, own, column, rest, rest1, cold, C, REVERSE)
    else:
        highest = tl.full([ROWS], NONE, tl.float32)
        highest_t = tl.full([ROWS], NONE, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        total1 = tl.zeros([ROWS], tl.float32)
        total_t = tl.zeros([ROWS], tl.float32)
        gap = tl.zeros([ROWS], tl.float32)
        spread = tl.zeros([ROWS], tl.float32)
        for start in range(0, C, BLOCK):
            here = start + column
            x, y = _load(student, row, student_stride, here, live, C), _load(teacher, row, teacher_stride, here, live, C)
            rest, rest1 = _without(here, a, b, C), _without(here, label_a, label_b, C)
            old, old_t = highest, highest_t
            highest = tl.maximum(highest, tl.max(tl.where(rest, x, NONE), 1))
            highest_t = tl.maximum(highest_t, tl.max(tl.where(rest, y, NONE), 1))
            top, top_t = _finite(highest), _finite(highest_t)
            more, more1, more_t, more_gap, more_spread = _tile_sums(x, y, top, top_t, own, here, rest, rest1, cold, C, REVERSE)
            spread += more_spread
            drop, drop_t = tl.exp2((old - top) * cold), tl.exp2((old_t - top_t) * cold)
            if REVERSE:
                gap = tl.where(total > 0, drop * (gap + total * ((old - top) - (old_t - top_t))), 0.0) + more_gap
            else:
                gap = tl.where(total_t > 0, drop_t * (gap + total_t * ((old - top) - (old_t - top_t))), 0.0) + more_gap
            total = total * drop + more
            total1 = total1 * tl.exp2((old - top) * LOG2E) + more1
            total_t = total_t * drop_t + more_t
        top, top_t = _finite(highest), _finite(highest_t)

    # The three groups of student and teacher at T and of the student at 1, in log space and as probabilities.
    log_total, log_total_t = _log(total), _log(total_t)
    one = a == b
    la, lb, lr, _ = _log_groups((_at(student, row, student_stride, a, live) - top) / T,
                             tl.where(one, NONE, (_at(student, row, student_stride, b, live) - top) / T), log_total)
    la_t, lb_t, lr_t, _ = _log_groups((_at(teacher, row, teacher_stride, a, live) - top_t) / T,
                                   tl.where(one, NONE, (_at(teacher, row, teacher_stride, b, live) - top_t) / T), log_total_t)
    one1 = label_a == label_b
    la1, lb1, lr1, lse = _log_groups(on_a - top, tl.where(one1, NONE, on_b - top), _log(total1))
    qa, qb, qr = tl.exp(la), tl.exp(lb), tl.exp(lr)
    pa, pb, pr = tl.exp(la_t), tl.exp(lb_t), tl.exp(lr_t)
    sa, sb, sr = tl.exp(la1), tl.exp(lb1), tl.exp(lr1)

    # KL, TCKD and NCKD.
    if REVERSE:
        tckd = _term(qa, la, la_t) + _term(qb, lb, lb_t) + _term(qr, lr, lr_t)
        nckd = tl.where(total > 0, gap * _inverse(total) / T + log_total_t - log_total, 0.0)
        kl = tckd + tl.where(qr > 0, qr * nckd, 0.0)
    else:
        tckd = _term(pa, la_t, la) + _term(pb, lb_t, lb) + _term(pr, lr_t, lr)
        nckd = tl.where(total_t > 0, log_total - log_total_t - gap * _inverse(total_t) / T, 0.0)
        kl = tckd + tl.where(pr > 0, pr * nckd, 0.0)

    # Smoothing's share: the sum over all classes of ln softmax_i = (x_i - own) + ln softmax_own.
    ce = -(1 - eps) * (tl.where(share > 0, share * la1, 0.0) + tl.where(share < 1, (1 - share) * lb1, 0.0))
    ce -= tl.where(eps > 0, uniform * spread + eps * tl.where(share >= 0.5, la1, lb1), 0.0)
    tl.store(row_terms + row, ce, live)
    tl.store(row_terms + N + row, T * T * kl, live)
    tl.store(row_terms + 2 * N + row, T * T * tckd, live)
    tl.store(row_terms + 3 * N + row, T * T * nckd, live)

    # The gradient: on a, on b, and on R as  weight * (of_q + of_gap * (x - y)) - of_p * weight_t;  CE's beside it.
    if REVERSE:
        grad_a = w_kl * T * tl.where(qa > 0, qa * (la - la_t - kl), 0.0)
        grad_b = w_kl * T * tl.where(qb > 0, qb * (lb - lb_t - kl), 0.0)
        of_gap = w_kl * qr * _inverse(total)
        of_q = tl.where(qr > 0, of_gap * T * (log_total_t - log_total + lr - lr_t - kl), 0.0)
        of_p = of_q
    else:
        delta_rest = _difference(qr, qa + qb, pr, pa + pb)
        grad_a = T * (w_tckd + w_kl) * _difference(qa, qb + qr, pa, pb + pr)
        grad_b = T * (w_tckd + w_kl) * _difference(qb, qa + qr, pb, pa + pr)
        of_q = T * (w_tckd * delta_rest + w_nckd + w_kl * qr) * _inverse(total)
        of_p = T * (w_nckd + w_kl * pr) * _inverse(total_t)
        of_gap = of_p
    ya, yb = (1 - eps) * share + uniform, (1 - eps) * (1 - share) + tl.where(one1, 0.0, uniform)
    yr = uniform * tl.where(one1, C - 1, C - 2)
    ce_a, ce_b = w_ce * _difference(sa, sb + sr, ya, yb + yr), w_ce * _difference(sb, sa + sr, yb, ya + yr)
    of_s = w_ce * tl.exp(-lse)  # lse is relative to top and so not negative

    # Second read, backwards while the end of the row is still in cache: the gradient.
    if WHOLE:
        g = _tile_gradient(x - top[:, None], y - top_t[:, None], column, rest, rest1, a, b, label_a, label_b,
                           grad_a, grad_b, ce_a, ce_b, of_q, of_gap, of_p, of_s, w_ce * uniform, cold, REVERSE)
        _store(grad, row, column, g * scale, live, C)
    else:
        blocks = (C + BLOCK - 1) // BLOCK
        for block in range(0, blocks):
            here = (blocks - 1 - block) * BLOCK + column
            x, y = _load(student, row, student_stride, here, live, C), _load(teacher, row, teacher_stride, here, live, C)
            rest, rest1 = _without(here, a, b, C), _without(here, label_a, label_b, C)
            g = _tile_gradient(x - top[:, None], y - top_t[:, None], here, rest, rest1, a, b, label_a, label_b,
                               grad_a, grad_b, ce_a, ce_b, of_q, of_gap, of_p, of_s, w_ce * uniform, cold, REVERSE)
            _store(grad, row, here, g * scale, live, C)

    # The program that finishes last adds up the rows, always in the same order, and leaves the counter as it found it.
    tl.debug_barrier()
    if tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        mean_ce, mean_kl = _mean(row_terms, N, REDUCE), _mean(row_terms + N, N, REDUCE)
        mean_tckd, mean_nckd = _mean(row_terms + 2 * N, N, REDUCE), _mean(row_terms + 3 * N, N, REDUCE)
        tl.store(losses, _weighted(w_ce, mean_ce) + _weighted(w_kl, mean_kl)
                 + _weighted(w_tckd, mean_tckd) + _weighted(w_nckd, mean_nckd))
        tl.store(losses + 1, mean_ce)
        tl.store(losses + 2, mean_kl)
        tl.store(losses + 3, mean_tckd)
        tl.store(losses + 4, mean_nckd)
        tl.store(finished, 0)


class Tile(NamedTuple):
    """Launch sizes.  `registers` is the assembler's limit: left alone, it spills a value or two for another step of occupancy."""
    rows: int
    block: int
    warps: int
    registers: int
    whole: bool


def tile_for(classes: int) -> Tile:
    block = max(16, triton.next_power_of_2(classes))
    if interpreted():  # which pays per program and per operation, hardly per lane
        return Tile(64, block, 1, 0, True) if block <= 4096 else Tile(4, 4096, 1, 0, False)
    if block <= 256:
        return Tile(1, block, 1, 96, True)  # one warp per row: row scalars are computed once, not once per warp
    if block <= 1024:
        return Tile(1, block, 4, 96, True)
    return Tile(1, 2048, 8, 80, block <= 2048)  # wider tiles would spill, or leave one program per multiprocessor


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


def softmax_kl_triton(student, teacher, label, other, lam, hyper, *, split: str, reverse: bool, grad_dtype,
                      tile: Tile | None = None):
    """One launch; arguments and results of the operator.  Logits whose classes are not adjacent are copied first."""
    student, teacher = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (student, teacher))
    rows, classes = student.shape
    tile = tile or tile_for(classes)
    grad = torch.empty(student.shape, dtype=grad_dtype, device=student.device)
    row_terms = torch.empty(4, rows, dtype=torch.float32, device=student.device)
    losses = torch.empty(5, dtype=torch.float32, device=student.device)
    _softmax_kl_kernel[(triton.cdiv(rows, tile.rows),)](
        student, teacher, label.contiguous(), other.contiguous(), lam.contiguous(), hyper, grad, row_terms, losses,
        _counter_for(student), rows, classes, student.stride(0), teacher.stride(0),
        SPLIT=split, REVERSE=reverse, WHOLE=tile.whole, ROWS=tile.rows, BLOCK=tile.block, REDUCE=256 * tile.warps,
        num_warps=tile.warps, maxnreg=tile.registers or None)
    return losses, grad
