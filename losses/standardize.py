"""Logit standardisation (Sun et al. 2024, arXiv 2403.01427): compare the shape of two rows of logits, not their range."""
from kernels.softmax_kl import Weights, softmax_kl

SMALLEST = 1e-7  # added to the deviation, as in the authors' code: a row of equal logits becomes a row of zeros


def standardized(logits):
    """Each row of (N, C) logits less its mean, over its sample standard deviation; fp32.  One class alone has logit 0."""
    logits = logits.float()
    deviation = logits.std(1, keepdim=True, correction=min(1, logits.shape[1] - 1))
    return (logits - logits.mean(1, keepdim=True)) / (SMALLEST + deviation)


def standardized_softmax_kl(student_logits, teacher_logits, label, other, lam, weights: Weights, *, label_smoothing=0.0, **how):
    """kernels.softmax_kl on standardised logits, except for the cross-entropy with the labels, which takes them as they are."""
    targets = label, other, lam
    loss, terms = softmax_kl(student_logits, None, *targets, Weights(ce=weights.ce), temperature=1.0,
                             label_smoothing=label_smoothing)
    more, others = softmax_kl(standardized(student_logits), standardized(teacher_logits.detach()), *targets,
                              weights._replace(ce=None), **how)
    return loss + more, others._replace(ce=terms.ce)
