"""Several teachers as one: the mean of their probabilities."""
import math
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import nn

from models.foreign import complete
from models.networks import centre_crop
from models.weights import load, read_teacher
from rundir.identity import BETWEEN, listed, unlisted


class Ensemble(nn.Module):
    """Logits T log(mean_k softmax(v_k / T)), float32 (N, C): at temperature T their softmax is the mean of the teachers' softmax.

    Probabilities are averaged, not logits (Hinton et al. 2015, arXiv 1503.02531, section 1, allow either mean).  The mean of
    logits is the geometric mean of the probabilities, in which one teacher that is confident and wrong vetoes a class.  With
    the arithmetic mean, the gradient of KL(teacher || student) is the mean of those for each teacher.
    teachers: from `load`, of the same classes.  temperature: T, of the method.  `info`: their names and classes.  `size`: the
    number of parameters of all.
    """

    def __init__(self, teachers, temperature: float):
        super().__init__()
        self.teachers, self.temperature = nn.ModuleList(teachers), temperature
        self.info = {"model": BETWEEN.join(each.info["model"] for each in teachers), "classes": teachers[0].info["classes"]}
        self.size = sum(each.size for each in teachers)

    def forward(self, images):
        return self.mean([teacher(images) for teacher in self.teachers])

    def mean(self, logits: list[torch.Tensor]) -> torch.Tensor:
        logs = [F.log_softmax(each.float() / self.temperature, dim=1) for each in logits]
        return self.temperature * (torch.logsumexp(torch.stack(logs), dim=0) - math.log(len(logs)))


def infer(net, images):
    """Logits of float images (N, 3, H, W) outside of training, where a network, or each of an Ensemble, sees its centre_crop."""
    if isinstance(net, Ensemble):
        return net.mean([infer(teacher, images) for teacher in net.teachers])
    return net(centre_crop(net, images))


def read_teachers(paths, networks: str | None = None) -> tuple[list[dict], str | list[str]]:
    """`read_teacher` of one path or each of several, and the SHA-256, as many.  networks: their names with BETWEEN, or None."""
    pairs = zip_longest(listed(paths), networks.split(BETWEEN) if networks else [])
    checkpoints = [read_teacher(*pair) for pair in pairs]
    return checkpoints, unlisted([each["sha256"] for each in checkpoints])


def load_teachers(checkpoints, data, sizes: dict, stated: dict, *, temperature: float, device, dtype, folded: bool = False):
    """The network of one checkpoint of `read_teachers`, or the Ensemble of several, for images normalised as `data`.

    sizes, stated: as in `complete`.  temperature: of Ensemble.  device, dtype, folded: as in `load`.
    Failure: as in `complete` and `load`.
    """
    teachers = [load(complete(each, data, sizes, stated), device, dtype, folded=folded, inputs=(data.mean, data.std))
                for each in checkpoints]
    return Ensemble(teachers, temperature).eval() if len(teachers) > 1 else teachers[0]
