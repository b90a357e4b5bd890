"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679), defined for mixed labels too."""
from kernels.softmax_kl import Weights, softmax_kl
from losses.standardize import standardized_softmax_kl
from losses.targets import Targets


def dkd_loss(student_logits, teacher_logits, targets: Targets, *, alpha=1.0, beta=8.0, temperature=4.0, ce_weight=1.0,
             label_smoothing=0.0, mixed_target="pair", standardize=False):
    """loss = ce_weight * CE + T^2 * (alpha * TCKD + beta * NCKD), means over the batch, teacher first in every KL.

    Logits (N, C) in fp32, fp16 or bf16.  DKD splits the classes into the target and the rest, which leaves open what the
    target of a Mixup or CutMix image is; `mixed_target` says it:
      "pair"      both labels are targets: TCKD compares (p_label, p_other, p_rest), NCKD the classes besides both.  It
                  ignores lam and so jumps as lam -> 1, where the row counts as unmixed.
      "dominant"  the label with the larger share, as public code does; the other label stays among the "non-targets",
                  where it takes nearly all the mass.
      "first"     `label`, whatever its share.
    An unmixed row is plain DKD under all three.  With two classes, or one besides the pair, NCKD is 0.
    standardize: z-score both rows of logits before the split, not for the cross-entropy (losses/standardize.py).
    Returns the loss (0-dim fp32, gradient to the student only) and {"ce", "tckd", "nckd"}, detached, unweighted, T^2 included.
    """
    weights = Weights(ce=ce_weight, tckd=alpha, nckd=beta)
    op = standardized_softmax_kl if standardize else softmax_kl
    loss, terms = op(student_logits, teacher_logits, *targets, weights, temperature=temperature,
                     label_smoothing=label_smoothing, split=mixed_target)
    return loss, {"ce": terms.ce, "tckd": terms.tckd, "nckd": terms.nckd}
