"""Distillation losses: each method is a function, and a record in methods.py.

Importing this imports no torch, so that flags are checked first.
"""
from importlib import import_module

__all__ = ["Targets", "dist_loss", "dkd_loss", "kd_loss", "mixed_ce"]
_HOMES = {"Targets": "kernels", "dist_loss": "losses.dist", "dkd_loss": "losses.dkd", "kd_loss": "losses.kd",
          "mixed_ce": "losses.cross_entropy"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
