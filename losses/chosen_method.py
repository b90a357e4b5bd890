"""The distillation method of a run: its record with hyperparameters and warm-up.  Imports no torch by itself."""
from functools import cached_property, partial
from pkgutil import resolve_name

from losses.methods import METHODS, Method, resolved


class ChosenMethod:
    """A record of losses/methods.py with the run's values.

    hyperparameters: by name, None for the record's default_fn.  warmup_epochs: of `record.warmed_up`, which rise from 0.
    class_weights: "none" or "balanced".  loss_scale: factor of the whole loss.
    match_norm: key of METHODS or "none"; `matched` is that method with its default hyperparameters, to whose gradient norm each
    step's gradient is rescaled, or None.
    """

    def __init__(self, record: Method, hyperparameters: dict, label_smoothing: float, warmup_epochs: int = 0,
                 class_weights: str = "none", loss_scale: float = 1.0, match_norm: str = "none"):
        self.record, self.loss_scale, self.match_norm, self.matched = record, loss_scale, match_norm, None
        if match_norm != "none":
            defaults = {name: each.default for name, each in METHODS[match_norm].hyperparameters.items()}
            self.matched = ChosenMethod(METHODS[match_norm], defaults, label_smoothing, class_weights=class_weights)
        self.hyperparameters, self.label_smoothing, self.warmup_epochs = hyperparameters, label_smoothing, warmup_epochs
        self.class_weights = class_weights
        self.arguments = hyperparameters | {"label_smoothing": label_smoothing, "class_weights": None}

    @cached_property
    def function(self):
        """That of the record, with its loss times `loss_scale`."""
        function = resolve_name(self.record.function)
        return function if self.loss_scale == 1 else partial(scaled, self.loss_scale, function)

    def criterion(self, device, class_weights=None):
        """The loss, a function of both logits (N, C) and a Targets.  class_weights: fp32 (C,), on `device`.

        Hyperparameters under warm-up are 0-dim fp32 tensors on `device`, filled by `set_epoch`, so that a CUDA graph reads them.
        """
        if self.warmup_epochs:
            import torch
            self.arguments |= {name: torch.tensor(float(self.hyperparameters[name]), device=device)
                               for name in self.record.warmed_up}
        self.arguments["class_weights"] = class_weights
        return partial(self.function, **self.arguments)

    def criteria(self, device, class_weights=None):
        """`criterion`, and that of `matched` or None."""
        return self.criterion(device, class_weights), self.matched and self.matched.criterion(device, class_weights)

    def set_epoch(self, epoch: int) -> None:
        """Set the hyperparameters under warm-up for `epoch`, from 1."""
        if self.warmup_epochs:
            for name in self.record.warmed_up:
                self.arguments[name].fill_(min(epoch / self.warmup_epochs, 1) * self.hyperparameters[name])

    @property
    def resolved(self) -> dict:
        """The hyperparameters with None resolved."""
        return resolved(self.record, self.hyperparameters)

    def named(self, template: str, separator: str) -> str:
        """The template filled in, with the names of the switches that are on, and the controls."""
        switches = [name for name, value in self.hyperparameters.items() if value is True]
        controls = {"loss-scale": f"{self.loss_scale:g}", "match-norm": self.match_norm}
        return separator.join([template.format(**self.hyperparameters), *switches,
                               *(f"{name}{separator}{value}" for name, value in controls.items() if value not in ("1", "none"))])

    @property
    def run_name(self) -> str:
        """The name of the run directory: kd-alpha0.7-T4, dkd-beta8-T4-standardize."""
        return self.named(self.record.run, "-")

    @property
    def labels(self) -> dict:
        """Entries of config.json: the names in tables and figures."""
        return {"method_in_tables": self.named(self.record.table, " "), "method_in_figures": self.named(self.record.figure, " ")}

    @property
    def objective(self) -> str:
        """The loss as a formula with its values, and the one whose gradient norm it gets."""
        norm = f"; gradient rescaled to the norm of that of {self.matched.formula}" if self.matched else ""
        return f"loss = {self.formula}{norm}"

    @property
    def formula(self) -> str:
        ce = f"CE(label smoothing {self.label_smoothing:g}{', classes balanced' * (self.class_weights == 'balanced')})"
        ramp = f" * min(epoch / {self.warmup_epochs}, 1)" if self.warmup_epochs else ""
        direction = "student || teacher" if self.resolved.get("kl") == "reverse" else "teacher || student"
        scored = ", logits z-scored" if self.resolved.get("standardize") else ""
        formula = self.record.formula.format(**self.resolved, ce=ce, ramp=ramp, direction=direction, scored=scored)
        return formula if self.loss_scale == 1 else f"{self.loss_scale:g} * ({formula})"


def scaled(factor: float, function, *logits_and_targets, **arguments):
    """The loss of `function` times `factor`, and its terms."""
    loss, terms = function(*logits_and_targets, **arguments)
    return factor * loss, terms
