"""What a distillation method is called and what it is set by: one record each, without torch.

The flags and their help, --dry-run, the name of a run, its warm-up, the columns of log.csv, the lines on the terminal, and the
labels of figures and tables are all made from these records.  To add one: its function in a file of this folder, a record below,
and a line in METHODS.
"""
from collections.abc import Callable
from typing import NamedTuple


class Number(NamedTuple):
    """A keyword argument of a method's function, and the flag of that name.

    default: that of the function, too.  False makes it a switch; a name, one of `choices`.
    otherwise: what None stands for, from all numbers; shown: the same in words.  at_least, above: the range of a number.
    """
    default: float | str | bool | None
    help: str
    at_least: float | None = 0.0
    above: float | None = None
    choices: tuple[str, ...] | None = None
    shown: str | None = None
    otherwise: Callable[[dict], float] | None = None


class Method(NamedTuple):
    """function: where it is, "module:name".  It is called with both logits (N, C), a Targets, and by name its numbers and
        label_smoothing, and returns the loss and a dict of its terms, 0-dim tensors, the latter detached and unweighted.
    terms: the names of its terms, columns train_loss_<term> of log.csv; "ce" is the cross-entropy with the labels.
    weighed_by: the number that a term is multiplied by in the loss, for diagnostics.csv, which has each term's gradient.  One
        term may lack such a number; where more do, only the gradient of the whole is there.
    ramped: the numbers that --<method>-warmup raises from 0; with a warm-up they come as 0-dim fp32 tensors on the device.
    run, table, figure: the name of a run's directory, of its row in a table, of its curve; {number} stands for its value.
    formula: the objective as text, from the numbers, the text of the cross-entropy and, behind what is ramped, its factor.
    refused: says what is wrong with the numbers together, None where they fit.
    """
    function: str
    numbers: dict[str, Number]
    terms: tuple[str, ...]
    run: str
    table: str
    figure: str
    formula: Callable[[dict, str, str], str]
    weighed_by: dict[str, str] = {}
    ramped: tuple[str, ...] = ()
    refused: Callable[[dict], str | None] = lambda numbers: None


def resolved(method: Method, numbers: dict) -> dict:
    """The numbers of a method, with what each None stands for."""
    return {name: method.numbers[name].otherwise(numbers) if value is None else value for name, value in numbers.items()}


TEMPERATURE = Number(4.0, "divides the logits before the softmax", at_least=None, above=0.0)
CE_WEIGHT = Number(1.0, "weight of the labels' cross-entropy")
STANDARDIZE = Number(False, "both networks' logits are z-scored per row for all but the cross-entropy (arXiv 2403.01427)")


def standardized(numbers: dict) -> str:
    return ", logits z-scored" if numbers["standardize"] else ""


# --- KD, Hinton et al. 2015, arXiv 1503.02531

def kd_formula(numbers: dict, ce: str, ramp: str) -> str:
    divergence = "teacher || student" if numbers["kl"] == "forward" else "student || teacher"
    return "{ce_weight:.4g} {ce} + {alpha:g} * {temperature:g}^2 KL({direction}; T = {temperature:g}{scored}){ramp}".format(
        **resolved(KD, numbers), ce=ce, direction=divergence, scored=standardized(numbers), ramp=ramp)


def kd_refused(numbers: dict) -> str | None:
    if numbers["ce_weight"] is None and numbers["alpha"] > 1:
        return f"argument --alpha: must be <= 1 unless --ce-weight is given ({numbers['alpha']:g})"


KD = Method(
    function="losses.kd:kd_loss",
    numbers={
        "alpha": Number(0.7, "weight of KL"),
        "temperature": TEMPERATURE,
        "ce_weight": CE_WEIGHT._replace(default=None, shown="1 - alpha", otherwise=lambda numbers: 1 - numbers["alpha"]),
        "kl": Number("forward", "KL(teacher || student), or the reverse", choices=("forward", "reverse")),
        "standardize": STANDARDIZE,
    },
    terms=("ce", "kl"), weighed_by={"ce": "ce_weight", "kl": "alpha"},
    run="kd-alpha{alpha:g}-T{temperature:g}", table="KD alpha {alpha:g} T {temperature:g}", figure="KD",
    formula=kd_formula, refused=kd_refused)


# --- DKD, Zhao et al. 2022, arXiv 2203.08679

def dkd_formula(numbers: dict, ce: str, ramp: str) -> str:
    return ("{ce_weight:g} {ce} + {temperature:g}^2 ({alpha:g} TCKD + {beta:g} NCKD){ramp}; T = {temperature:g}{scored}, "
            "targets of mixed images: {mixed_target}").format(**numbers, ce=ce, ramp=ramp, scored=standardized(numbers))


DKD = Method(
    function="losses.dkd:dkd_loss",
    numbers={
        "alpha": Number(1.0, "weight of TCKD"),
        "beta": Number(8.0, "weight of NCKD"),
        "temperature": TEMPERATURE,
        "ce_weight": CE_WEIGHT,
        "mixed_target": Number("pair", "the target of a mixed image", choices=("pair", "dominant", "first")),
        "standardize": STANDARDIZE,
    },
    terms=("ce", "tckd", "nckd"), weighed_by={"ce": "ce_weight", "tckd": "alpha", "nckd": "beta"},
    run="dkd-beta{beta:g}-T{temperature:g}",
    table="DKD alpha {alpha:g} beta {beta:g} T {temperature:g}", figure="DKD β\u00a0=\u00a0{beta:g}",
    formula=dkd_formula, ramped=("alpha", "beta"))


# --- DIST, Huang et al. 2022, arXiv 2205.10536

def dist_formula(numbers: dict, ce: str, ramp: str) -> str:
    return ("{ce_weight:g} {ce} + {temperature:g}^2 ({beta:g} (1 - rho in rows) + {gamma:g} (1 - rho in columns)){ramp}; "
            "T = {temperature:g}, rho: Pearson's correlation of the softmaxes").format(**numbers, ce=ce, ramp=ramp)


DIST = Method(
    function="losses.dist:dist_loss",
    numbers={
        "beta": Number(1.0, "weight of the correlation in rows, over the classes of an image"),
        "gamma": Number(1.0, "weight of the correlation in columns, over a class's images in the batch"),
        "temperature": TEMPERATURE._replace(default=1.0),
        "ce_weight": CE_WEIGHT,
    },
    terms=("ce", "inter", "intra"), weighed_by={"ce": "ce_weight", "inter": "beta", "intra": "gamma"},
    run="dist-beta{beta:g}-gamma{gamma:g}-T{temperature:g}",
    table="DIST beta {beta:g} gamma {gamma:g} T {temperature:g}", figure="DIST",
    formula=dist_formula, ramped=("beta", "gamma"))


METHODS = {"kd": KD, "dkd": DKD, "dist": DIST}
TERMS = tuple(dict.fromkeys(term for method in METHODS.values() for term in method.terms))  # in the order of log.csv
