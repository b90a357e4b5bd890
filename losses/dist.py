"""DIST (Huang et al. 2022, arXiv 2205.10536): match the teacher's preferences, not its probabilities."""
from kernels import Targets
from kernels.softmax_kl import Weights, softmax_kl
from losses.cross_entropy import in_fp32

SMALLEST = 1e-8  # added to the product of the norms, as in the authors' code: correlations of tiny vectors become 0


def dist_loss(student_logits, teacher_logits, targets: Targets, *, beta=1.0, gamma=1.0, temperature=1.0, ce_weight=1.0,
              label_smoothing=0.0, class_weights=None):
    """loss = ce_weight * CE + T^2 * (beta * inter + gamma * intra).

    With q and p the softmaxes of student and teacher logits / T, (N, C), and rho Pearson's correlation:
      inter = 1 - mean over the rows of rho(q_i, p_i)       between the classes of an image
      intra = 1 - mean over the columns of rho(q_c, p_c)    between the images of the batch, in a class
    Neither depends on the labels, so mixed images need no special rule.  The batch is a rank's slice, or a micro-batch.

    With one row, or one class, every correlation is 0.

    Arguments and results are those of every method, see losses/methods.py; computed in fp32.
    """
    both = in_fp32(student_logits, teacher_logits)
    loss, terms = softmax_kl(student_logits, None, *targets, Weights(ce=ce_weight), temperature=1.0,
                             label_smoothing=label_smoothing, class_weights=class_weights)
    q, p = ((logits / temperature).softmax(1) for logits in both)
    inter, intra = (temperature ** 2 * (1 - correlation(q, p, dim).mean()) for dim in (1, 0))
    return loss + beta * inter + gamma * intra, {"ce": terms.ce, "inter": inter.detach(), "intra": intra.detach()}


def correlation(x, y, dim: int):
    """Pearson's correlation of x and y, both (N, C), along `dim`."""
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    return (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim) + SMALLEST)
