"""The table of other projects in docs/teachers.md: with its flags, loss and gradient are those of their published formulas."""
import re

import pytest
import torch
import torch.nn.functional as F
from command import ROOT

from cli import method_flags
from cli.options import parse_distill
from losses import Targets

CLASSES, EPOCH = 10, 5
A, B, H, S, T, W = 0.3, 6.0, 0.4, 0.9, 3.0, 0.2
VALUES = {"kd": "kd", "dkd": "dkd", "C": CLASSES, "a": A, "B": B, "h": H, "s": S, "T": T, "w": W}  # of the letters in the table
TABLE = (ROOT / "docs" / "teachers.md").read_text().partition("## If you come from another project")[2]


def flags_of(cell: str) -> list[str]:
    """The flags in a cell, whose values are numbers or formulas of VALUES."""
    words = " ".join(re.findall("`(--[^`]*)`", cell)).split()
    return [word if word.startswith("--") else str(eval(word.replace("²", "**2"), VALUES)) for word in words]


CELLS = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")]
FLAGS = {project.partition("`")[0].strip(" ,"): flags_of(CELLS[0][2]) + flags_of(here) for project, _, here in CELLS[1:]}


def kl(z, v, temperature):
    return F.kl_div(F.log_softmax(z / temperature, 1), F.softmax(v / temperature, 1), reduction="batchmean")


def dkd(z, v, label):
    """CE + min(epoch / 20, 1) (TCKD + B NCKD), both with T² = 16: DKD.py and engine/cfg.py of mdistiller."""
    hot = F.one_hot(label, CLASSES)
    q, p = (((logits / 4).softmax(1) * hot).sum(1) for logits in (z, v))
    tckd = F.kl_div(torch.stack([q, 1 - q], 1).log(), torch.stack([p, 1 - p], 1), reduction="batchmean")
    nckd = kl(z - 1e4 * hot, v - 1e4 * hot, 4)
    return F.cross_entropy(z, label) + min(EPOCH / 20, 1) * 16 * (tckd + B * nckd)


FORMULAS = {  # in the file or class of the project that is named
    "mdistiller, KD": lambda z, v, label: 0.1 * F.cross_entropy(z, label) + 0.9 * 4 ** 2 * kl(z, v, 4),  # KD.py, engine/cfg.py
    "mdistiller, DKD": dkd,
    "torchdistill": lambda z, v, label: A * F.cross_entropy(z, label) + (1 - A) * T ** 2 * kl(z, v, T),  # KDLoss
    "timm": lambda z, v, label: F.cross_entropy(z, label) + kl(z, v, 1),  # LogitDistillationTask
    "Liger": lambda z, v, label: H * F.cross_entropy(z, label) + S * kl(z, v, T),  # LigerFusedLinearJSDLoss
    "Keras": lambda z, v, label: W * F.cross_entropy(z, label) + (1 - W) * T ** 2 * kl(z, v, T),  # Distiller
    "Model Optimizer": lambda z, v, label: (1 - W) * F.cross_entropy(z, label) + W * T ** 2 / CLASSES * kl(z, v, T),  # losses.py
}


@pytest.mark.parametrize("project, theirs", FORMULAS.items())
def test_the_flags_of_the_table_give_the_loss_of_the_project(project, theirs):
    generator = torch.Generator().manual_seed(0)
    z, v = (3 * torch.randn(16, CLASSES, generator=generator) for _ in range(2))
    label = torch.randint(CLASSES, (16,), generator=generator)
    results = []
    method = method_flags.chosen(parse_distill(argv=FLAGS[project]))
    criterion = method.criterion("cpu")
    method.set_epoch(EPOCH)
    for loss_of in (theirs, lambda z, v, label: criterion(z, v, Targets.unmixed(label))[0]):
        student = z.clone().requires_grad_()
        loss = loss_of(student, v, label)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_every_row_has_a_formula():
    assert FLAGS.keys() == FORMULAS.keys()
