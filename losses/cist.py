"""CIST, a temperature for each row of logits (after Luong et al. 2026, arXiv 2605.20357)."""
import torch.nn.functional as F

from kernels import Targets
from losses.cross_entropy import in_fp32, mixed_ce

SMALLEST = 1e-7  # of a temperature: equal logits stay equal


def cist_loss(student_logits, teacher_logits, targets: Targets, *, alpha=0.7, rho=2.0, ce_weight=None, label_smoothing=0.0,
              class_weights=None):
    """loss = ce_weight * CE + alpha * mean over the rows of T_s * T_t * KL(p || q).

    With z and v a row of student and teacher logits, each minus its mean:
      T_s = max(z) / rho,  T_t = max(v) / rho,  q = softmax(z / T_s),  p = softmax(v / T_t)
    So the largest logit over its temperature is rho in every row, and the entropies of the soft labels p are alike, as the paper
    has it.  q does not depend on the scale of z, which is left to the cross-entropy; the factor T_s T_t is a constant to the
    gradient.  Were T_s in q a constant, too, the student would shrink its logits without end.
    Of two classes only the order is left: use another method there.
    `ce_weight=None` means 1 - alpha.  The KL does not depend on the labels, so mixed images need no special rule.

    This follows the paper's abstract.  Its formulas may differ, and its weight for the student's difficulty is left out.  On the
    embedded images rho = 2 gives a teacher about the entropy that T = 4 gives it in KD.

    Arguments and results are those of every method, see losses/methods.py; computed in fp32.
    """
    z, v = in_fp32(student_logits, teacher_logits)
    ce = mixed_ce(student_logits, targets, label_smoothing=label_smoothing, class_weights=class_weights)
    own, other = temperatures(z, rho), temperatures(v, rho)
    log_q, log_p = (z / own).log_softmax(1), (v / other).log_softmax(1)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1, keepdim=True)
    kl = (own.detach() * other * rows).mean()
    return (1 - alpha if ce_weight is None else ce_weight) * ce + alpha * kl, {"ce": ce.detach(), "kl": kl.detach()}


def temperatures(logits, rho):
    """(N, C) -> (N, 1): the largest logit above the mean of its row, over rho."""
    return ((logits.amax(1, keepdim=True) - logits.mean(1, keepdim=True)) / rho).clamp(min=SMALLEST)
