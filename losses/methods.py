"""The distillation methods, one record each: name, hyperparameters, terms, labels.  Without torch.

The flags and their help, --dry-run, the name of a run, its warm-up, the columns of log.csv, the lines on the terminal, and the
labels of figures and tables are all made from these records.  To add one: its function in a file of this folder, a record below,
and a line in METHODS.
"""
from collections.abc import Callable
from typing import NamedTuple


class Hyperparameter(NamedTuple):
    """A keyword argument of a method's function, and the flag of that name.

    default: that of the function, too.  False makes it a switch; a name, one of `choices`.
    at_least, above: its range.  default_fn: what None stands for, from the dict of all values; default_text: the same in words.
    """
    default: float | str | bool | None
    help: str
    at_least: float | None = 0.0
    above: float | None = None
    choices: tuple[str, ...] | None = None
    default_text: str | None = None
    default_fn: Callable[[dict], float] | None = None


class Method(NamedTuple):
    """The record of a method.

    function: "module:name".  It is called with both logits (N, C), a Targets, and by name its hyperparameters and
        label_smoothing, and returns the loss and a dict of its terms, 0-dim tensors, the latter detached and unweighted.
    terms: the names of its terms, columns train_loss_<term> of log.csv; "ce" is the cross-entropy with the labels.
    weight_of: the hyperparameter that weighs each term in the loss, for diagnostics.csv, which has each term's gradient.  One
        term may lack one; where more do, only the gradient of the whole is there.
    warmed_up: those that --<method>-warmup raises from 0; with a warm-up they come as 0-dim fp32 tensors on the device.
    run, table, figure: the name of a run's directory, of its row in a table, of its curve; {beta} stands for the value of beta.
    formula: the objective as text, from the values, the text of the cross-entropy, and the factor of the warm-up.
    validate: the error of values that do not fit together, or None.
    """
    function: str
    hyperparameters: dict[str, Hyperparameter]
    terms: tuple[str, ...]
    run: str
    table: str
    figure: str
    formula: Callable[[dict, str, str], str]
    weight_of: dict[str, str] = {}
    warmed_up: tuple[str, ...] = ()
    validate: Callable[[dict], str | None] = lambda numbers: None


def resolved(method: Method, numbers: dict) -> dict:
    """The values of a method's hyperparameters, each None replaced by its default_fn."""
    defaults = {name: each.default_fn for name, each in method.hyperparameters.items() if each.default_fn}
    return {name: defaults[name](numbers) if value is None else value for name, value in numbers.items()}


TEMPERATURE = Hyperparameter(4.0, "divides the logits before the softmax", at_least=None, above=0.0)
CE_WEIGHT = Hyperparameter(1.0, "weight of the labels' cross-entropy")
STANDARDIZE = Hyperparameter(False, "both networks' logits are z-scored per row for all but the cross-entropy (arXiv 2403.01427)")


def standardized(numbers: dict) -> str:
    return ", logits z-scored" if numbers["standardize"] else ""


# --- KD, Hinton et al. 2015, arXiv 1503.02531

def kd_formula(numbers: dict, ce: str, ramp: str) -> str:
    divergence = "teacher || student" if numbers["kl"] == "forward" else "student || teacher"
    return "{ce_weight:.4g} {ce} + {alpha:g} * {temperature:g}^2 KL({direction}; T = {temperature:g}{scored}){ramp}".format(
        **resolved(KD, numbers), ce=ce, direction=divergence, scored=standardized(numbers), ramp=ramp)


def validate_kd(numbers: dict) -> str | None:
    if numbers["ce_weight"] is None and numbers["alpha"] > 1:
        return f"argument --alpha: must be <= 1 unless --ce-weight is given ({numbers['alpha']:g})"
    return None


KD = Method(
    function="losses.kd:kd_loss",
    hyperparameters={
        "alpha": Hyperparameter(0.7, "weight of KL"),
        "temperature": TEMPERATURE,
        "ce_weight": CE_WEIGHT._replace(default=None, default_text="1 - alpha", default_fn=lambda numbers: 1 - numbers["alpha"]),
        "kl": Hyperparameter("forward", "KL(teacher || student), or the reverse", choices=("forward", "reverse")),
        "standardize": STANDARDIZE,
    },
    terms=("ce", "kl"), weight_of={"ce": "ce_weight", "kl": "alpha"},
    run="kd-alpha{alpha:g}-T{temperature:g}", table="KD alpha {alpha:g} T {temperature:g}", figure="KD",
    formula=kd_formula, validate=validate_kd)


# --- DKD, Zhao et al. 2022, arXiv 2203.08679

def dkd_formula(numbers: dict, ce: str, ramp: str) -> str:
    return ("{ce_weight:g} {ce} + {temperature:g}^2 ({alpha:g} TCKD + {beta:g} NCKD){ramp}; T = {temperature:g}{scored}, "
            "targets of mixed images: {mixed_target}").format(**numbers, ce=ce, ramp=ramp, scored=standardized(numbers))


DKD = Method(
    function="losses.dkd:dkd_loss",
    hyperparameters={
        "alpha": Hyperparameter(1.0, "weight of TCKD"),
        "beta": Hyperparameter(8.0, "weight of NCKD"),
        "temperature": TEMPERATURE,
        "ce_weight": CE_WEIGHT,
        "mixed_target": Hyperparameter("pair", "the target of a mixed image", choices=("pair", "dominant", "first")),
        "standardize": STANDARDIZE,
    },
    terms=("ce", "tckd", "nckd"), weight_of={"ce": "ce_weight", "tckd": "alpha", "nckd": "beta"},
    run="dkd-beta{beta:g}-T{temperature:g}",
    table="DKD alpha {alpha:g} beta {beta:g} T {temperature:g}", figure="DKD β\u00a0=\u00a0{beta:g}",
    formula=dkd_formula, warmed_up=("alpha", "beta"))


# --- DIST, Huang et al. 2022, arXiv 2205.10536

def dist_formula(numbers: dict, ce: str, ramp: str) -> str:
    return ("{ce_weight:g} {ce} + {temperature:g}^2 ({beta:g} (1 - rho in rows) + {gamma:g} (1 - rho in columns)){ramp}; "
            "T = {temperature:g}, rho: Pearson's correlation of the softmaxes").format(**numbers, ce=ce, ramp=ramp)


DIST = Method(
    function="losses.dist:dist_loss",
    hyperparameters={
        "beta": Hyperparameter(1.0, "weight of the correlation in rows, over the classes of an image"),
        "gamma": Hyperparameter(1.0, "weight of the correlation in columns, over a class's images in the batch"),
        "temperature": TEMPERATURE._replace(default=1.0),
        "ce_weight": CE_WEIGHT,
    },
    terms=("ce", "inter", "intra"), weight_of={"ce": "ce_weight", "inter": "beta", "intra": "gamma"},
    run="dist-beta{beta:g}-gamma{gamma:g}-T{temperature:g}",
    table="DIST beta {beta:g} gamma {gamma:g} T {temperature:g}", figure="DIST",
    formula=dist_formula, warmed_up=("beta", "gamma"))


# --- Labels alone: train_teacher.py

LABELS = Method(
    function="losses.cross_entropy:labels_alone", hyperparameters={}, terms=("ce",), run="labels", table="labels alone",
    figure="labels alone", formula=lambda numbers, ce, ramp: ce)


METHODS = {"kd": KD, "dkd": DKD, "dist": DIST}
TERMS = tuple(dict.fromkeys(term for method in METHODS.values() for term in method.terms))  # in the order of log.csv
