"""Cross-entropy with mixed labels and label smoothing."""
from kernels import Targets
from kernels.softmax_kl import Weights, softmax_kl


def mixed_ce(logits, targets: Targets, *, label_smoothing: float = 0.0):
    """Mean cross-entropy against `(1 - eps) * soft label + eps / C`, as 0-dim fp32.

    logits: (N, C) in fp32, fp16 or bf16.  Cross-entropy is linear in the target, so no (N, C) target is needed (Mixup: Zhang et
    al. 2018, arXiv 1710.09412; smoothing: Szegedy et al. 2016, arXiv 1512.00567).
    """
    return softmax_kl(logits, None, *targets, Weights(ce=1.0), temperature=1.0, label_smoothing=label_smoothing)[0]


def labels_alone(logits, teacher_logits, targets: Targets, *, label_smoothing: float = 0.0):
    """`mixed_ce` with the signature of a method -> loss, terms.  teacher_logits: unused."""
    loss = mixed_ce(logits, targets, label_smoothing=label_smoothing)
    return loss, {"ce": loss.detach()}
