"""MLKD, multi-level logit distillation (Jin et al., CVPR 2023): by image, over the batch and over the classes."""
import torch.nn.functional as F

from kernels import Targets
from losses.cross_entropy import mixed_ce
from losses.logits import in_fp32

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)  # of the authors' code


def mlkd_loss(student_logits, teacher_logits, targets: Targets, *, alpha=0.9, beta=0.9, gamma=0.9, ce_weight=0.1,
              label_smoothing=0.0, class_weights=None):
    """loss = ce_weight * CE + alpha * kl + beta * batch + gamma * class, each distillation term a sum over five temperatures.

    With q and p the softmaxes of student and teacher logits / T, (N, C), and |.|^2 a sum of squares, at each of TEMPERATURES:
      kl    = T^2 * KL(p || q), mean over the batch         instance level
      batch = |q q' - p p'|^2 / N, of (N, N) matrices       similarities between the images of the batch
      class = |q' q - p' p|^2 / C, of (C, C) matrices       correlations between the classes over the batch
    None depends on the labels, so mixed images need no special rule.  The batch is a rank's slice, or a micro-batch.

    Weights are the defaults of the authors' code (github.com/Jin-Ying/Multi-Level-Logit-Distillation).  It differs in two ways.
    It trains on a weak and a strong view of each image, with twice the forward passes; here there is one view, that of the run's
    augmentation.  It multiplies the three terms of the weak view, already means, by a mask of the least confident half; that
    selects no images but halves the terms, and is left out.

    Logits (N, C) in fp32, fp16 or bf16; computed in fp32.  class_weights: fp32 (C,), of the cross-entropy.
    Returns the loss (0-dim fp32, gradient to the student only) and {"ce", "kl", "batch", "class"}, detached, unweighted, T^2
    included.  Raises ValueError for shapes that do not fit.
    """
    z, v = in_fp32(student_logits, teacher_logits)
    ce = mixed_ce(student_logits, targets, label_smoothing=label_smoothing, class_weights=class_weights)
    kl, batch, classes = (sum(terms) for terms in zip(*(levels(z / T, v / T, T) for T in TEMPERATURES)))
    return ce_weight * ce + alpha * kl + beta * batch + gamma * classes, {
        "ce": ce.detach(), "kl": kl.detach(), "batch": batch.detach(), "class": classes.detach()}


def levels(z, v, temperature):
    """The three terms at one temperature, 0-dim, of logits / temperature, (N, C)."""
    log_q, log_p = z.log_softmax(1), v.log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    kl = temperature ** 2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    batch, classes = (q @ q.T - p @ p.T).square().sum(1).mean(), (q.T @ q - p.T @ p).square().sum(1).mean()
    return kl, batch, classes
