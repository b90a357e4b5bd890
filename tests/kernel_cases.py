"""Logits with mixed targets, and the losses and gradients that they must have."""
import torch

from kernels.softmax_kl import softmax_kl_naive
from losses import Targets


def rows(n, classes, scale=3.0, seed=0, dtype=torch.float32):
    """Random logits, and targets of which some are unmixed, some end at lam 0 or 1 and some mix a label with itself."""
    g = torch.Generator().manual_seed(seed)
    z, v = (scale * torch.randn(n, classes, generator=g) for _ in range(2))
    label, other = (torch.randint(classes, (n,), generator=g) for _ in range(2))
    lam = torch.rand(n, generator=g)
    lam[::5], lam[1::7] = 1.0, 0.0
    return z.to(dtype), v.to(dtype), Targets(label, other, lam)


def truth(z, v, targets, weights, **how):
    """Terms and gradient of the specification in float64; how: its keyword arguments."""
    z = z.double().detach().requires_grad_()
    terms = softmax_kl_naive(z, v.double(), *targets, **how)
    (grad,) = torch.autograd.grad(sum(w * t for w, t in zip(weights, terms) if w), z)
    return terms.detach(), grad
