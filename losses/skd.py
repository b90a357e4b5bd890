"""SKD, streamlined knowledge distillation (Jeong, Lee & Choi, CVPR 2026): KL and the directions of the logits in a batch."""
import torch
import torch.nn.functional as F

from kernels import Targets
from losses.cross_entropy import in_fp32, mixed_ce


def skd_loss(student_logits, teacher_logits, targets: Targets, *, alpha=0.9, beta=0.9, temperature=4.0, tikhonov=0.1,
             ce_weight=0.1, label_smoothing=0.0, class_weights=None):
    """loss = ce_weight * CE + alpha * kl + beta * direction.

    With q and p the softmaxes of student and teacher logits / T, (N, C), and s and t the logits with rows of norm 1:
      kl        = T^2 * KL(p || q), mean over the batch
      direction = mean over the rows of sqrt(D_i S^-1 D_i'),  D = (s s' - t t') / C, (N, N)
                  S = covariance of D's columns over its rows, plus tikhonov * identity
    `direction` is a Mahalanobis distance between the cosine similarities of student and teacher.  Neither term depends on the
    labels, so mixed images need no special rule.  The batch is a rank's slice, or a micro-batch; one image has direction 0.

    All is as in the authors' code (github.com/HyunJunSik/StreamLined) but its masks, which halve the terms.  The paper's
    equations, as torchdistill 1.1.5 gives them, have no T^2, and do not divide by C: that is the same as tikhonov / C^2 here.

    Arguments and results are those of every method, see losses/methods.py; computed in fp32.
    """
    z, v = in_fp32(student_logits, teacher_logits)
    ce = mixed_ce(student_logits, targets, label_smoothing=label_smoothing, class_weights=class_weights)
    log_q, log_p = ((logits / temperature).log_softmax(1) for logits in (z, v))
    kl = temperature ** 2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    s, t = F.normalize(z), F.normalize(v)
    difference = (s @ s.T - t @ t.T) / z.shape[1]
    centred = difference - difference.mean(0)
    covariance = centred.T @ centred / max(1, len(z) - 1) + tikhonov * torch.eye(len(z), dtype=z.dtype, device=z.device)
    factor = torch.linalg.cholesky_ex(covariance).L  # cholesky() would wait for the GPU
    # The norm of a whitened row is its distance; at 0 its gradient is 0, that of a square root infinite.
    direction = torch.linalg.solve_triangular(factor, difference.T, upper=False).norm(dim=0).mean()
    return ce_weight * ce + alpha * kl + beta * direction, {
        "ce": ce.detach(), "kl": kl.detach(), "direction": direction.detach()}
