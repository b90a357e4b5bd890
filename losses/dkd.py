"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679), also defined for mixed labels."""
from kernels import Targets
from kernels.softmax_kl import Weights, softmax_kl
from losses.standardize import standardized_softmax_kl


def dkd_loss(student_logits, teacher_logits, targets: Targets, *, alpha=1.0, beta=8.0, temperature=4.0, ce_weight=1.0,
             label_smoothing=0.0, mixed_target="pair", standardize=False, class_weights=None):
    """loss = ce_weight * CE + T^2 * (alpha * TCKD + beta * NCKD), means over the batch; every KL is KL(teacher || student).

    `mixed_target` defines the target class of a Mixup or CutMix image:
      "pair"      both labels: TCKD compares (p_label, p_other, p_rest), NCKD the classes besides both.  Independent of lam,
                  so discontinuous as lam -> 1, where the row is unmixed.
      "dominant"  the label with the larger share, as in public code; the other label is a non-target class, and dominates NCKD.
      "first"     `label`, regardless of its share.
    An unmixed row is plain DKD under all three.  With two classes, or one besides the pair, NCKD is 0.
    standardize: z-score both rows of logits before the split, not for the cross-entropy (losses/standardize.py).
    Arguments and results are those of every method, see losses/methods.py.
    """
    weights = Weights(ce=ce_weight, tckd=alpha, nckd=beta)
    op = standardized_softmax_kl if standardize else softmax_kl
    loss, terms = op(student_logits, teacher_logits, targets.label, targets.other, targets.lam, weights,
                     temperature=temperature, label_smoothing=label_smoothing, class_weights=class_weights, split=mixed_target)
    return loss, {"ce": terms.ce, "tckd": terms.tckd, "nckd": terms.nckd}
