"""Cross-entropy with mixed labels, label smoothing and class weights; the logits for methods in plain PyTorch."""
import torch

from kernels import Targets
from kernels.softmax_kl import Weights, softmax_kl


def mixed_ce(logits, targets: Targets, *, label_smoothing: float = 0.0, class_weights=None):
    """Mean over the N rows of -sum_i w_i y_i log softmax_i, y = (1 - eps) * soft label + eps / C, as 0-dim fp32.

    logits: (N, C) in fp32, fp16 or bf16.  Cross-entropy is linear in the target, so no (N, C) target is needed (Mixup: Zhang et
    al. 2018, arXiv 1710.09412; smoothing: Szegedy et al. 2016, arXiv 1512.00567).
    class_weights: w, fp32 (C,); None: all 1.  kernels.softmax_kl compares it with torch.nn.CrossEntropyLoss(weight=...).
    """
    return softmax_kl(logits, None, *targets, Weights(ce=1.0), temperature=1.0, label_smoothing=label_smoothing,
                      class_weights=class_weights)[0]


def labels_alone(logits, teacher_logits, targets: Targets, *, label_smoothing: float = 0.0, class_weights=None):
    """`mixed_ce` with the signature of a method -> loss, terms.  teacher_logits: unused."""
    loss = mixed_ce(logits, targets, label_smoothing=label_smoothing, class_weights=class_weights)
    return loss, {"ce": loss.detach()}


def class_weights_of(flag: str, labels, classes: int):
    """The weights of --class-weights, fp32 (classes,); None for "none".  labels: of the training images, int64 (N,).

    "balanced": N / (C * n_c), as scikit-learn's compute_class_weight; their mean over the images is 1.  A class without images
    has weight 0, and C does not count it.
    """
    if flag == "none":
        return None
    images = torch.zeros(classes, device=labels.device).scatter_add_(0, labels, torch.ones(labels.shape, device=labels.device))
    return torch.where(images > 0, len(labels) / ((images > 0).sum() * images), 0.0)


def in_fp32(student_logits, teacher_logits):
    """Both logits, (N, C), in fp32, the teacher's detached.  Raises ValueError for unequal shapes."""
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(f"logits must have equal shapes: {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    return student_logits.float(), teacher_logits.detach().float()
