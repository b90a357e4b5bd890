"""Distillation losses.  A method is a function of both logits, the targets and its own keyword numbers, and one line here."""
from losses.dkd import dkd_loss
from losses.kd import kd_loss
from losses.mixed_ce import mixed_ce
from losses.targets import Targets

__all__ = ["METHODS", "Targets", "dkd_loss", "kd_loss", "mixed_ce"]
METHODS = {"kd": kd_loss, "dkd": dkd_loss}
