"""Knowledge distillation (Hinton, Vinyals & Dean 2015, arXiv 1503.02531)."""
from kernels import Targets
from kernels.softmax_kl import Weights, softmax_kl
from losses.standardize import standardized_softmax_kl

DIRECTIONS = ("forward", "reverse")


def kd_loss(student_logits, teacher_logits, targets: Targets, *, alpha=0.7, temperature=4.0, ce_weight=None,
            label_smoothing=0.0, kl="forward", standardize=False, class_weights=None):
    """loss = alpha * T^2 * KL(teacher || student) + ce_weight * CE, means over the batch.

    `ce_weight=None` means 1 - alpha.  kl="reverse": KL(student || teacher); public implementations use "forward", also where the
    paper writes the student first.
    standardize: z-score both rows of logits before the KL (losses/standardize.py).
    Arguments and results are those of every method, see losses/methods.py.
    """
    if kl not in DIRECTIONS:
        raise ValueError(f"kl must be one of {DIRECTIONS}, not {kl!r}")
    weights = Weights(ce=1 - alpha if ce_weight is None else ce_weight, kl=alpha)
    op = standardized_softmax_kl if standardize else softmax_kl
    loss, terms = op(student_logits, teacher_logits, targets.label, targets.other, targets.lam, weights, reverse=kl == "reverse",
                     temperature=temperature, label_smoothing=label_smoothing, class_weights=class_weights)
    return loss, {"ce": terms.ce, "kl": terms.kl}
