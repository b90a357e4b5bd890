"""What the losses must give: their definitions in float64, written out without any of the tricks of the code under test."""
import torch
import torch.nn.functional as F

from losses import Targets


def rows(n, classes, scale=3.0, seed=0, dtype=torch.float32):
    """Random logits, and targets of which some are unmixed, some end at lam 0 or 1 and some mix a label with itself."""
    g = torch.Generator().manual_seed(seed)
    z, v = (scale * torch.randn(n, classes, generator=g) for _ in range(2))
    label, other = (torch.randint(classes, (n,), generator=g) for _ in range(2))
    lam = torch.rand(n, generator=g)
    lam[::5], lam[1::7] = 1.0, 0.0
    return z.to(dtype), v.to(dtype), Targets(label, other, lam)


def soft_label(targets, classes, smoothing):
    """(N, C) float64, straight from the definition."""
    label, other, lam = targets
    lam = lam.double()[:, None]
    return (1 - smoothing) * (lam * F.one_hot(label, classes) + (1 - lam) * F.one_hot(other, classes)) + smoothing / classes


def plain_sum(weights, values):
    """Sum of weight * value over the last dimension, leaving out weights of 0 (where the value may be infinite)."""
    return torch.where(weights > 0, weights * torch.where(weights > 0, values, 0.0), 0.0).sum(-1)


def true_terms(z, v, targets, temperature, smoothing=0.0, split="pair", reverse=False):
    """CE, KL, TCKD, NCKD by their definitions, a Python loop over rows; T^2 included, means over rows; reversed: student
    first."""
    (n, classes), out = z.shape, []
    ce = -plain_sum(soft_label(targets, classes, smoothing), F.log_softmax(z, 1))
    log_q, log_p = F.log_softmax(z / temperature, 1), F.log_softmax(v / temperature, 1)
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    kl = plain_sum(first.exp(), first - second)
    for i in range(n):
        label, other, lam = (part[i].item() for part in targets)
        weights = {label: 0.0, other: 0.0}
        weights[label] += lam
        weights[other] += 1 - lam
        live = [name for name, weight in weights.items() if weight > 0]
        if len(live) == 1:
            chosen = live
        else:
            chosen = {"pair": [label, other], "first": [label], "dominant": [label if lam >= 0.5 else other]}[split]
        rest = [c for c in range(classes) if c not in chosen]
        groups = [[c] for c in chosen] + ([rest] if rest else [])
        log_qg, log_pg = (torch.stack([x[i, g].logsumexp(0) for g in groups]) for x in (log_q, log_p))
        log_qr, log_pr = (F.log_softmax(x[i, rest] / temperature, 0) for x in (z, v))
        if reverse:
            log_qg, log_pg, log_qr, log_pr = log_pg, log_qg, log_pr, log_qr
        tckd = plain_sum(log_pg.exp(), log_pg - log_qg)
        nckd = plain_sum(log_pr.exp(), log_pr - log_qr) if rest else z.sum() * 0
        out.append(torch.stack([ce[i], *(temperature**2 * term for term in (kl[i], tckd, nckd))]))
    return torch.stack(out).mean(0)


def truth(z, v, targets, weights, temperature, **flags):
    """Terms and gradient in float64, by autograd through the definitions."""
    z = z.double().detach().requires_grad_()
    terms = true_terms(z, v.double(), targets, temperature, **flags)
    (grad,) = torch.autograd.grad(sum(w * t for w, t in zip(weights, terms) if w), z)
    return terms.detach(), grad
