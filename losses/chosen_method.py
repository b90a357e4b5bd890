"""The method of one run: its record in losses/methods.py with hyperparameters and warm-up.  Imports no torch by itself."""
from functools import cached_property, partial
from pkgutil import resolve_name

from losses.methods import Method, resolved


class ChosenMethod:
    """A record with its hyperparameters.

    hyperparameters: of the record by name, None where its default function decides.  warmup_epochs: epochs over which those in
    `record.warmed_up` rise from 0.
    """

    def __init__(self, record: Method, hyperparameters: dict, label_smoothing: float, warmup_epochs: int = 0):
        self.record = record
        self.hyperparameters, self.label_smoothing, self.warmup_epochs = hyperparameters, label_smoothing, warmup_epochs
        self.arguments = hyperparameters | {"label_smoothing": label_smoothing}

    @cached_property
    def function(self):
        return resolve_name(self.record.function)

    def criterion(self, device):
        """The loss, called with both logits (N, C) and a Targets.

        What a warm-up raises is a 0-dim fp32 tensor on `device`, which `set_epoch` fills: a CUDA graph reads it there.
        """
        if self.warmup_epochs:
            import torch
            self.arguments |= {name: torch.tensor(float(self.hyperparameters[name]), device=device)
                               for name in self.record.warmed_up}
        return partial(self.function, **self.arguments)

    def set_epoch(self, epoch: int) -> None:
        """Before an epoch (from 1): set what the warm-up raises."""
        if self.warmup_epochs:
            for name in self.record.warmed_up:
                self.arguments[name].fill_(min(epoch / self.warmup_epochs, 1) * self.hyperparameters[name])

    @property
    def resolved(self) -> dict:
        """The hyperparameters without None."""
        return resolved(self.record, self.hyperparameters)

    def named(self, template: str, separator: str) -> str:
        """A name with the hyperparameters, and which of the switches are on."""
        switches = (name for name, value in self.hyperparameters.items() if value is True)
        return separator.join([template.format(**self.hyperparameters), *switches])

    @property
    def run_name(self) -> str:
        """The method with the hyperparameters that tell its runs apart: kd-alpha0.7-T4, dkd-beta8-T4-standardize."""
        return self.named(self.record.run, "-")

    @property
    def labels(self) -> dict:
        """For config.json: the names of the method in tables and figures."""
        return {"method_in_tables": self.named(self.record.table, " "), "method_in_figures": self.named(self.record.figure, " ")}

    @property
    def objective(self) -> str:
        """The loss as a formula with its numbers."""
        ce = f"CE(label smoothing {self.label_smoothing:g})"
        ramp = f" * min(epoch / {self.warmup_epochs}, 1)" if self.warmup_epochs else ""
        return f"loss = {self.record.formula(self.hyperparameters, ce, ramp)}"
