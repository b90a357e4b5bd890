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
and for KL(q || p) in place of KL:  T * kl * q_i * [(ln q_i - ln p_i) - KL(q || p)]  for every i.

Why it does not overflow: the targets are left out of the maximum and of the sum over R instead of being subtracted or
masked by a large number, 1 - p is never formed, and everything else stays in log space.
"""
from typing import NamedTuple

import torch

SPLITS = ("pair", "dominant", "first")


class Weights(NamedTuple):
    """What each term counts in the loss."""
    ce: float = 0.0
    kl: float = 0.0
    tckd: float = 0.0
    nckd: float = 0.0


def softmax_kl(student_logits, teacher_logits, label, other, lam, weights: Weights, *, temperature: float,
               label_smoothing: float = 0.0, split: str = "pair", reverse: bool = False, grad_scale=None):
    """The loss of the module docstring, ready for `backward`, and its terms.

    student_logits, teacher_logits: (N, C) fp32, fp16 or bf16, any strides.  label, other: int64 (N,).  lam: float32 (N,).
    split: the target set of a mixed row: "pair" {label, other}; "dominant" the one with the larger share; "first" label.
    reverse: KL(q || p) instead of KL(p || q).
    grad_scale: 0-dim fp32 tensor that multiplies the gradient before it is rounded to a 16-bit dtype.  Without it the
    gradient is kept in fp32 until `backward`, where the upstream gradient multiplies it before the rounding.
    Returns the loss (0-dim fp32, backpropagates to student_logits only) and detached fp32 (4,): CE, KL, TCKD, NCKD,
    unweighted, with T^2.  Raises ValueError for shapes or a split that do not fit.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape or len(student_logits) == 0:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"logits must be (N, C) with N > 0, and alike: {shapes}")
    if not label.shape == other.shape == lam.shape == student_logits.shape[:1]:
        raise ValueError(f"targets must be (N,): {tuple(label.shape)}, {tuple(other.shape)}, {tuple(lam.shape)}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    with torch.no_grad():
        terms, grad = softmax_kl_reference(student_logits, teacher_logits, label, other, lam, weights, temperature=temperature,
                                           label_smoothing=label_smoothing, split=split, reverse=reverse)
        loss = sum((weight * term for weight, term in zip(weights, terms) if weight != 0), start=terms.new_zeros(()))
        if grad_scale is not None:
            grad = (grad * grad_scale).to(student_logits.dtype)
    return _WithGradient.apply(student_logits, loss, grad), terms


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
        return (grad.float() * upstream).to(ctx.dtype), None, None


class _Split(NamedTuple):
    """softmax(x * scale) of every row, taken apart; (N, C), (N, 1) and (N, 3) fp32."""
    rest: torch.Tensor         # bool (N, C): the classes of R
    logits: torch.Tensor       # x * scale less its maximum over R: small numbers, however large x is
    log_sum: torch.Tensor      # ln sum of exp(logits) over R; -inf where R is empty
    conditional: torch.Tensor  # q^: the softmax inside R, 0 outside
    log_groups: torch.Tensor   # ln (q_a, q_b, q_R)

    @property
    def groups(self):
        return self.log_groups.exp()

    def log_rest(self):
        """(N, C): ln q_i for i in R; meaningless elsewhere."""
        return self.logits - self.log_sum + self.log_groups[:, 2:]


def _split(x, scale: float, a, b) -> _Split:
    a, b = a[:, None], b[:, None]
    classes = torch.arange(x.shape[1], device=x.device)
    rest = (classes != a) & (classes != b)
    top = x.masked_fill(~rest, -torch.inf).amax(1, keepdim=True)
    logits = (x - top.masked_fill(top == -torch.inf, 0.0)) * scale
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


def _difference(q, p):
    """q - p for (N, 3) distributions; where both are near 1 their complements are subtracted, which keeps the digits."""
    def complement(x):
        return x.roll(1, 1) + x.roll(2, 1)
    return torch.where((q > 0.5) & (p > 0.5), complement(p) - complement(q), q - p)


def softmax_kl_reference(student_logits, teacher_logits, label, other, lam, weights: Weights, *, temperature: float,
                         label_smoothing: float, split: str, reverse: bool):
    """The formulas of the module docstring in fp32 PyTorch -> terms (4,), gradient (N, C), both fp32."""
    z, v = student_logits.float(), teacher_logits.float()
    (rows, classes), T, eps = z.shape, temperature, label_smoothing
    other, label = torch.where(lam >= 1, label, other), torch.where(lam <= 0, other, label)  # one label left: unmixed
    mixed = label != other
    if split == "pair":
        a, b = label, other
    else:
        a = b = torch.where(lam >= 0.5, label, other) if split == "dominant" else label

    q, p, s = _split(z, 1 / T, a, b), _split(v, 1 / T, a, b), _split(z, 1.0, label, other)
    q_groups, p_groups, s_groups = q.groups, p.groups, s.groups

    tckd = _expectation(p_groups, p.log_groups - q.log_groups)
    log_ratio = (p.logits - p.log_sum) - (q.logits - q.log_sum)  # ln p^ - ln q^ on R
    nckd = _expectation(p.conditional, log_ratio)
    if reverse:
        group_ratio, rest_ratio = q.log_groups - p.log_groups, q.log_rest() - p.log_rest()
        q_rest = q.conditional * q_groups[:, 2:]
        kl = _expectation(q_groups[:, :2], group_ratio[:, :2]) + _expectation(q_rest, rest_ratio)
    else:
        kl = tckd + torch.where(p_groups[:, 2:] > 0, p_groups[:, 2:] * nckd, 0.0)

    share = torch.where(mixed, lam, 1.0)[:, None]
    hard = torch.cat([share, 1 - share, torch.zeros_like(share)], 1)
    ce = -(1 - eps) * _expectation(hard, s.log_groups)
    if eps:
        on_targets = s.log_groups[:, :1] + torch.where(mixed[:, None], s.log_groups[:, 1:2], 0.0)
        ce = ce - eps / classes * (on_targets + torch.where(s.rest, s.log_rest(), 0.0).sum(1, keepdim=True))
    terms = torch.cat([ce, T * T * torch.cat([kl, tckd, nckd], 1)], 1).mean(0)

    # The targets' gradients come from the three groups, the other classes' from the conditional distributions.
    delta = _difference(q_groups, p_groups)
    on_groups = T * weights.tckd * delta
    on_rest = T * ((weights.tckd * delta[:, 2:] + weights.nckd) * q.conditional - weights.nckd * p.conditional)
    if weights.kl and reverse:
        on_groups = on_groups + T * weights.kl * torch.where(q_groups > 0, q_groups * (group_ratio - kl), 0.0)
        on_rest = on_rest + T * weights.kl * torch.where(q_rest > 0, q_rest * (rest_ratio - kl), 0.0)
    elif weights.kl:
        on_groups = on_groups + T * weights.kl * delta
        on_rest = on_rest + T * weights.kl * (q_groups[:, 2:] * q.conditional - p_groups[:, 2:] * p.conditional)
    grad = torch.where(q.rest, on_rest, on_groups[:, :1])
    grad = grad.scatter(1, b[:, None], torch.where((a == b)[:, None], on_groups[:, :1], on_groups[:, 1:2]))
    if weights.ce:
        uniform = eps / classes
        smooth = (1 - eps) * hard + uniform * torch.stack([torch.ones_like(lam), mixed.float(), classes - 1.0 - mixed.float()], 1)
        on_labels = _difference(s_groups, smooth)
        on_labels = torch.where(s.rest, s.conditional * s_groups[:, 2:] - uniform, on_labels[:, :1]).scatter(
            1, other[:, None], torch.where(mixed[:, None], on_labels[:, 1:2], on_labels[:, :1]))
        grad = grad + weights.ce * on_labels
    return terms, grad / rows
