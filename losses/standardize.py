"""Logit standardisation (Sun et al. 2024, arXiv 2403.01427): distillation on z-scored logits."""
from kernels.softmax_kl import Weights, softmax_kl

SMALLEST = 1e-7  # added to the deviation, as in the authors' code: equal logits become zeros


def standardized(logits):
    """(N, C) logits -> fp32, each row minus its mean, over its sample standard deviation; 0 for a single class."""
    logits = logits.float()
    deviation = logits.std(1, keepdim=True, correction=min(1, logits.shape[1] - 1))
    return (logits - logits.mean(1, keepdim=True)) / (SMALLEST + deviation)


def standardized_softmax_kl(student_logits, teacher_logits, label, other, lam, weights: Weights, *, label_smoothing=0.0,
                            class_weights=None, **options):
    """kernels.softmax_kl on standardised logits; the cross-entropy is on the raw ones."""
    targets = label, other, lam
    ce, ce_terms = softmax_kl(student_logits, None, *targets, Weights(ce=weights.ce), temperature=1.0,
                              label_smoothing=label_smoothing, class_weights=class_weights)
    loss, terms = softmax_kl(standardized(student_logits), standardized(teacher_logits.detach()), *targets,
                             weights._replace(ce=None), **options)
    return ce + loss, terms._replace(ce=ce_terms.ce)
