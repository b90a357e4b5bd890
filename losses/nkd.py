"""NKD, normalised knowledge distillation (Yang et al. 2023, arXiv 2303.13005), also defined for mixed labels."""
import torch

from kernels import Targets
from kernels.softmax_kl import SPLITS
from losses.cross_entropy import in_fp32, mixed_ce


def nkd_loss(student_logits, teacher_logits, targets: Targets, *, alpha=1.0, gamma=3.5, temperature=3.0, ce_weight=1.0,
             label_smoothing=0.0, mixed_target="pair", class_weights=None):
    """loss = ce_weight * CE + alpha * target + gamma * nontarget, means over the batch.

    With p and q the softmaxes of teacher and student logits, and p^ and q^ those of logits / T over the non-target classes:
      target    = -sum of p_t log q_t over the target classes t, at T = 1
      nontarget = -T^2 * sum of p^_i log q^_i over the other classes i
    Both are cross-entropies, as in the paper.  `nontarget` has the gradient of DKD's NCKD, but is not 0 at its minimum.
    `mixed_target` defines the target classes of a Mixup or CutMix image, as in `dkd_loss`: "pair" both labels; "dominant" the
    label with the larger share, as in the authors' code; "first" `label`.  An unmixed row has one target under all three.
    Without non-target classes `nontarget` is 0.  Defaults of T and gamma are the authors' for CIFAR-100; for ImageNet they use
    1 and 1.5.  Their code fixes alpha and ce_weight at 1.

    Arguments and results are those of every method, see losses/methods.py; computed in fp32.
    """
    if mixed_target not in SPLITS:
        raise ValueError(f"mixed_target must be one of {SPLITS}, not {mixed_target!r}")
    z, v = in_fp32(student_logits, teacher_logits)
    ce = mixed_ce(student_logits, targets, label_smoothing=label_smoothing, class_weights=class_weights)
    hot = is_target(targets, z.shape[1], mixed_target)
    target = -(v.softmax(1) * z.log_softmax(1)).masked_fill(~hot, 0.0).sum(1).mean()
    smallest = torch.finfo(z.dtype).min  # finite, so that a row without non-target classes has no NaN
    log_q, log_p = ((logits / temperature).masked_fill(hot, smallest).log_softmax(1) for logits in (z, v))
    nontarget = -temperature ** 2 * (log_p.exp() * log_q).masked_fill(hot, 0.0).sum(1).mean()
    return ce_weight * ce + alpha * target + gamma * nontarget, {
        "ce": ce.detach(), "target": target.detach(), "nontarget": nontarget.detach()}


def is_target(targets: Targets, classes: int, mixed_target: str):
    """bool (N, C): the target classes of each row."""
    label = torch.where(targets.lam > 0, targets.label, targets.other)
    other = torch.where(targets.lam < 1, targets.other, label)
    first = targets.dominant if mixed_target == "dominant" else label
    second = other if mixed_target == "pair" else first
    index = torch.arange(classes, device=label.device)
    return (index == first[:, None]) | (index == second[:, None])
