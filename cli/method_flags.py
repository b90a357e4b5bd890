"""The flags of the methods, from their records in losses/methods.py.  Imports no torch."""
from argparse import ArgumentTypeError

from cli.flag_types import number, positive, whole
from losses.chosen_method import ChosenMethod
from losses.methods import LABELS, METHODS, resolved


def add_flags(parser) -> None:
    """A flag for every hyperparameter of every method, a warm-up flag for each method that has `warmed_up`, and two controls."""
    add = parser.add_argument_group("hyperparameters of the method").add_argument
    owners = {}
    for key, method in METHODS.items():
        for name, each in method.hyperparameters.items():
            owners.setdefault(name, {})[key] = each
    for name, by_method in owners.items():
        first = next(iter(by_method.values()))
        if first.default is False:
            options = {"action": "store_const", "const": True}
        elif first.choices:
            options = {"choices": first.choices}
        else:
            options = {"type": number(float), "metavar": "X"}  # each method has its own range
        texts = {}  # help -> the methods with this help, and their defaults
        for key, each in by_method.items():
            default = "" if each.default is False else f", default {each.default_text or each.default}".removesuffix(".0")
            texts.setdefault(each.help, []).append(key + default)
        add(flag(name), help="; ".join(f"{text} ({'; '.join(methods)})" for text, methods in texts.items()), **options)
    for key, method in METHODS.items():
        if method.warmed_up:
            add(flag(f"{key}_warmup"), type=whole, default=0, metavar="EPOCHS",
                help=f"linear warm-up of {key}'s {', '.join(method.warmed_up)} from 0; default: %(default)s")
    add("--loss-scale", type=positive, default=1.0, metavar="X", help="multiply the whole loss by X, and so the gradient before "
        "clipping; not AMP's loss scale, which is divided out again; default: %(default)s")
    add("--match-norm", choices=("none", *METHODS), default="none", help="rescale each step's gradient, before clipping, to the "
        "norm of that of this method's loss with its default hyperparameters; a second backward pass; default: %(default)s")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def fill_in(parser, args, of_preset: set) -> None:
    """Set defaults of the chosen method; flags of another method are errors, unless set by a preset."""
    record = METHODS[args.method]
    for name in sorted({name for method in METHODS.values() for name in method.hyperparameters}):
        value = getattr(args, name)
        if name in record.hyperparameters:
            each = record.hyperparameters[name]
            setattr(args, name, each.default if value is None else value)
            if isinstance(value, float):
                try:
                    number(float, at_least=each.at_least, above=each.above)(value)
                except ArgumentTypeError as failure:
                    parser.error(f"argument {flag(name)}: {failure}")
        elif value is None or name in of_preset:
            setattr(args, name, None)
        else:
            parser.error(f"{flag(name)} does not belong to --method {args.method} ({value})")
    for key, method in METHODS.items():
        if method.warmed_up and key != args.method and getattr(args, f"{key}_warmup"):
            parser.error(f"{flag(key)}-warmup does not belong to --method {args.method} ({getattr(args, f'{key}_warmup')})")
    hyperparameters = {name: getattr(args, name) for name in record.hyperparameters}
    weights = [resolved(record, hyperparameters)[name] for name in record.weight_of.values()]
    if len(weights) == len(record.terms) and not any(weights):
        parser.error(f"every weight of the loss is 0 ({', '.join(map(flag, record.weight_of.values()))})")
    if args.ce_weight is None and min(weights, default=0) < 0:  # of KD, where it is 1 - alpha
        parser.error(f"argument --alpha: must be <= 1 unless --ce-weight is given ({args.alpha:g})")
    if args.match_norm != "none" and args.loss_scale != 1:
        parser.error(f"--loss-scale and --match-norm exclude each other: matching cancels the scale ({args.loss_scale:g})")
    if args.match_norm != "none" and args.compile:
        parser.error(f"--compile and --match-norm exclude each other: matching takes two backward passes ({args.match_norm})")


def chosen(args) -> ChosenMethod:
    """The method of parsed flags; for train_teacher.py cross-entropy alone."""
    name = getattr(args, "method", None)
    record = METHODS[name] if name else LABELS
    return ChosenMethod(record, {each: getattr(args, each) for each in record.hyperparameters}, args.label_smoothing,
                        getattr(args, f"{name}_warmup", 0), args.class_weights, getattr(args, "loss_scale", 1.0),
                        getattr(args, "match_norm", "none"))
