"""MLKD, multi-level logit distillation (Jin et al., CVPR 2023): by image, over the batch and over the classes."""
import torch

from kernels import Targets
from losses.cross_entropy import in_fp32, mixed_ce


def mlkd_loss(student_logits, teacher_logits, targets: Targets, *, alpha=0.9, beta=0.9, gamma=0.9, ce_weight=0.1,
              label_smoothing=0.0, class_weights=None):
    """loss = ce_weight * CE + alpha * kl + beta * batch + gamma * class, each distillation term a sum over five temperatures.

    With q and p the softmaxes of student and teacher logits / T, (N, C), and |.|^2 a sum of squares, at T = 2, 3, 4, 5 and 6:
      kl    = T^2 * KL(p || q), mean over the batch         instance level
      batch = |q q' - p p'|^2 / N, of (N, N) matrices       similarities between the images of the batch
      class = |q' q - p' p|^2 / C, of (C, C) matrices       correlations between the classes over the batch
    None depends on the labels, so mixed images need no special rule.  The batch is a rank's slice, or a micro-batch.

    Weights and temperatures are those of the authors' code (github.com/Jin-Ying/Multi-Level-Logit-Distillation).  Its two views
    of each image, weak and strong, are one here, and its mask of the weak view, which only halves a term, is left out.

    Arguments and results are those of every method, see losses/methods.py; computed in fp32.
    """
    z, v = in_fp32(student_logits, teacher_logits)
    ce = mixed_ce(student_logits, targets, label_smoothing=label_smoothing, class_weights=class_weights)
    T = torch.arange(2, 7, dtype=z.dtype, device=z.device).view(5, 1, 1)  # a tensor of a list would be copied from the host
    log_q, log_p = (z / T).log_softmax(2), (v / T).log_softmax(2)
    q, p = log_q.exp(), log_p.exp()
    kl = (T.square() * p * (log_p - log_q)).sum() / z.shape[0]
    batch = (q @ q.mT - p @ p.mT).square().sum() / z.shape[0]
    classes = (q.mT @ q - p.mT @ p).square().sum() / z.shape[1]
    return ce_weight * ce + alpha * kl + beta * batch + gamma * classes, {
        "ce": ce.detach(), "kl": kl.detach(), "batch": batch.detach(), "class": classes.detach()}
