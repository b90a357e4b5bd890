"""Cross-entropy with mixed labels and label smoothing: what a network trained on labels alone minimises."""
import torch.nn.functional as F

from losses.targets import Targets


def mixed_ce(logits, targets: Targets, *, label_smoothing: float = 0.0):
    """Mean cross-entropy against `(1 - eps) * soft label + eps / C`, as 0-dim fp32.

    logits: (N, C).  Cross-entropy is linear in the target, so the mix of two smoothed labels is the mix of two losses and no
    (N, C) target is needed (Mixup: Zhang et al. 2018, arXiv 1710.09412; smoothing: Szegedy et al. 2016, arXiv 1512.00567).
    """
    def ce(labels):
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="none")

    return (targets.lam * ce(targets.label) + (1 - targets.lam) * ce(targets.other)).mean()
