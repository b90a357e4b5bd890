"""The registry of distillation methods, a record each.  Imports no torch.

Flags and help, --dry-run, run names, warm-up, columns of log.csv, terminal lines, and labels of figures and tables derive from
these records.
"""
from collections.abc import Callable
from typing import NamedTuple


class Hyperparameter(NamedTuple):
    """A keyword argument of a method's function, and the flag of that name.

    default: the function's.  False makes it a switch.  at_least, above: its range.
    default_fn: the value for None, from the dict of all values; default_text: the same in the help.
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

    function: "module:name", called as f(student_logits, teacher_logits, targets, **hyperparameters, label_smoothing=...,
        class_weights=...), logits (N, C) in fp32, fp16 or bf16, class weights of the cross-entropy fp32 (C,) or None -> the
        loss, 0-dim fp32, with a gradient to the student only, and a dict of its terms, detached, unweighted, with their T^2.
        ValueError: shapes or an option that do not fit.
    terms: the names of its terms, columns train_loss_<term> of log.csv; "ce" is the cross-entropy with the labels.
    weight_of: term -> the hyperparameter that is its weight, for each term's gradient in diagnostics.csv.  If more than one term
        lacks one, only the gradient of the whole loss is logged.
    warmed_up: hyperparameters that --<method>-warmup raises from 0; under warm-up they are 0-dim fp32 tensors on the device.
    run, table, figure: format strings of run directory, table row and curve label, as in "beta{beta:g}".
    formula: the objective as a format string of the hyperparameters, {ce}, the cross-entropy, {ramp}, the warm-up factor,
        {direction} of the KL and {scored}, whether logits are z-scored.
    """
    function: str
    hyperparameters: dict[str, Hyperparameter]
    terms: tuple[str, ...]
    run: str
    table: str
    figure: str
    formula: str
    weight_of: dict[str, str] = {}
    warmed_up: tuple[str, ...] = ()


def resolved(method: Method, values: dict) -> dict:
    """The hyperparameters, with None replaced by the default_fn where there is one."""
    defaults = {name: each.default_fn for name, each in method.hyperparameters.items() if each.default_fn}
    return {name: defaults[name](values) if value is None and name in defaults else value for name, value in values.items()}


TEMPERATURE = Hyperparameter(4.0, "softmax temperature", at_least=None, above=0.0)
CE_WEIGHT = Hyperparameter(1.0, "weight of the cross-entropy with the labels")
MIXED_TARGET = Hyperparameter("pair", "target class of a mixed image", choices=("pair", "dominant", "first"))
STANDARDIZE = Hyperparameter(False, "z-score the logits of both networks, except for the cross-entropy (arXiv 2403.01427)")


KD = Method(  # Hinton et al. 2015, arXiv 1503.02531
    function="losses.kd:kd_loss",
    hyperparameters={
        "alpha": Hyperparameter(0.7, "weight of KL"),
        "temperature": TEMPERATURE,
        "ce_weight": CE_WEIGHT._replace(default=None, default_text="1 - alpha", default_fn=lambda values: 1 - values["alpha"]),
        "kl": Hyperparameter("forward", "KL(teacher || student), or the reverse", choices=("forward", "reverse")),
        "standardize": STANDARDIZE,
    },
    terms=("ce", "kl"), weight_of={"ce": "ce_weight", "kl": "alpha"},
    run="kd-alpha{alpha:g}-T{temperature:g}", table="KD alpha {alpha:g} T {temperature:g}", figure="KD",
    formula="{ce_weight:.4g} {ce} + {alpha:g} * {temperature:g}^2 KL({direction}; T = {temperature:g}{scored}){ramp}")

DKD = Method(  # Zhao et al. 2022, arXiv 2203.08679
    function="losses.dkd:dkd_loss",
    hyperparameters={
        "alpha": Hyperparameter(1.0, "weight of TCKD"),
        "beta": Hyperparameter(8.0, "weight of NCKD"),
        "temperature": TEMPERATURE,
        "ce_weight": CE_WEIGHT,
        "mixed_target": MIXED_TARGET,
        "standardize": STANDARDIZE,
    },
    terms=("ce", "tckd", "nckd"), weight_of={"ce": "ce_weight", "tckd": "alpha", "nckd": "beta"},
    run="dkd-beta{beta:g}-T{temperature:g}",
    table="DKD alpha {alpha:g} beta {beta:g} T {temperature:g}", figure="DKD β\u00a0=\u00a0{beta:g}",
    formula="{ce_weight:g} {ce} + {temperature:g}^2 ({alpha:g} TCKD + {beta:g} NCKD){ramp}; T = {temperature:g}{scored}, "
            "targets of mixed images: {mixed_target}",
    warmed_up=("alpha", "beta"))

DIST = Method(  # Huang et al. 2022, arXiv 2205.10536
    function="losses.dist:dist_loss",
    hyperparameters={
        "beta": Hyperparameter(1.0, "weight of the inter-class correlation, within an image"),
        "gamma": Hyperparameter(1.0, "weight of the intra-class correlation, over the batch"),
        "temperature": TEMPERATURE._replace(default=1.0),
        "ce_weight": CE_WEIGHT,
    },
    terms=("ce", "inter", "intra"), weight_of={"ce": "ce_weight", "inter": "beta", "intra": "gamma"},
    run="dist-beta{beta:g}-gamma{gamma:g}-T{temperature:g}",
    table="DIST beta {beta:g} gamma {gamma:g} T {temperature:g}", figure="DIST",
    formula="{ce_weight:g} {ce} + {temperature:g}^2 ({beta:g} (1 - rho in rows) + {gamma:g} (1 - rho in columns)){ramp}; "
            "T = {temperature:g}, rho: Pearson's correlation of the softmaxes",
    warmed_up=("beta", "gamma"))

NKD = Method(  # Yang et al. 2023, arXiv 2303.13005
    function="losses.nkd:nkd_loss",
    hyperparameters={
        "alpha": Hyperparameter(1.0, "weight of the target classes' cross-entropy with the teacher"),
        "gamma": Hyperparameter(3.5, "weight of the non-target classes' cross-entropy with the teacher"),
        "temperature": TEMPERATURE._replace(default=3.0),
        "ce_weight": CE_WEIGHT,
        "mixed_target": MIXED_TARGET,
    },
    terms=("ce", "target", "nontarget"), weight_of={"ce": "ce_weight", "target": "alpha", "nontarget": "gamma"},
    run="nkd-gamma{gamma:g}-T{temperature:g}", table="NKD alpha {alpha:g} gamma {gamma:g} T {temperature:g}", figure="NKD",
    formula="{ce_weight:g} {ce} + ({alpha:g} target + {gamma:g} * {temperature:g}^2 nontarget){ramp}; cross-entropies with "
            "the teacher, nontarget at T = {temperature:g}, mixed images: {mixed_target}",
    warmed_up=("alpha", "gamma"))

MLKD = Method(  # Jin et al., CVPR 2023
    function="losses.mlkd:mlkd_loss",
    hyperparameters={
        "alpha": Hyperparameter(0.9, "weight of KL"),
        "beta": Hyperparameter(0.9, "weight of the similarities between the images of the batch"),
        "gamma": Hyperparameter(0.9, "weight of the correlations between the classes"),
        "ce_weight": CE_WEIGHT._replace(default=0.1),
    },
    terms=("ce", "kl", "batch", "class"), weight_of={"ce": "ce_weight", "kl": "alpha", "batch": "beta", "class": "gamma"},
    run="mlkd-alpha{alpha:g}-beta{beta:g}-gamma{gamma:g}", table="MLKD alpha {alpha:g} beta {beta:g} gamma {gamma:g}",
    figure="MLKD", warmed_up=("alpha", "beta", "gamma"),
    formula="{ce_weight:g} {ce} + ({alpha:g} T^2 KL(teacher || student) + {beta:g} batch + {gamma:g} class){ramp}, "
            "summed over T = 2, 3, 4, 5, 6")

SKD = Method(  # Jeong, Lee & Choi, CVPR 2026
    function="losses.skd:skd_loss",
    hyperparameters={
        "alpha": Hyperparameter(0.9, "weight of KL"),
        "beta": Hyperparameter(0.9, "weight of the distance between cosine similarities in the batch"),
        "temperature": TEMPERATURE,
        "tikhonov": Hyperparameter(0.1, "added to the diagonal of the covariance", at_least=None, above=0.0),
        "ce_weight": CE_WEIGHT._replace(default=0.1),
    },
    terms=("ce", "kl", "direction"), weight_of={"ce": "ce_weight", "kl": "alpha", "direction": "beta"},
    run="skd-alpha{alpha:g}-beta{beta:g}-T{temperature:g}", table="SKD alpha {alpha:g} beta {beta:g} T {temperature:g}",
    figure="SKD", warmed_up=("alpha", "beta"),
    formula="{ce_weight:g} {ce} + ({alpha:g} * {temperature:g}^2 KL(teacher || student; T = {temperature:g}) "
            "+ {beta:g} direction){ramp}; tikhonov {tikhonov:g}")

CIST = Method(  # after Luong et al. 2026, arXiv 2605.20357
    function="losses.cist:cist_loss",
    hyperparameters={
        "alpha": Hyperparameter(0.7, "weight of KL"),
        "rho": Hyperparameter(2.0, "largest logit of a row over its temperature", at_least=None, above=0.0),
        "ce_weight": KD.hyperparameters["ce_weight"],
    },
    terms=("ce", "kl"), weight_of={"ce": "ce_weight", "kl": "alpha"},
    run="cist-alpha{alpha:g}-rho{rho:g}", table="CIST alpha {alpha:g} rho {rho:g}", figure="CIST",
    formula="{ce_weight:.4g} {ce} + {alpha:g} * T_s T_t KL(teacher at T_t || student at T_s){ramp}, a temperature for each row: "
            "its largest logit above its mean, over {rho:g}")

LABELS = Method(  # of train_teacher.py
    function="losses.cross_entropy:labels_alone", hyperparameters={}, terms=("ce",), run="labels", table="labels alone",
    figure="labels alone", formula="{ce}")


METHODS = {"kd": KD, "dkd": DKD, "dist": DIST, "nkd": NKD, "mlkd": MLKD, "skd": SKD, "cist": CIST}
TERMS = tuple(dict.fromkeys(term for method in METHODS.values() for term in method.terms))  # the order of columns in log.csv
