"""The chosen method by its record in losses/methods.py: flags, numbers, names and formula.  Imports no torch."""
from pkgutil import resolve_name

from cli.flag_types import number, whole
from losses.methods import METHODS, resolved


def add_flags(parser) -> None:
    """A flag for every number of every method, whose default is the method's, and a warm-up for each method that ramps some."""
    add = parser.add_argument_group("numbers of the method").add_argument
    owners = {}
    for method in METHODS.values():
        for name in method.hyperparameters:
            owners.setdefault(name, [key for key, other in METHODS.items() if name in other.hyperparameters])
    for name, keys in owners.items():
        numbers = {key: METHODS[key].hyperparameters[name] for key in keys}
        first = numbers[keys[0]]
        if first.default is False:
            how = {"action": "store_const", "const": True}
        elif first.choices:
            how = {"choices": first.choices}
        else:
            how = {"type": number(float, at_least=first.at_least, above=first.above), "metavar": "X"}
        said = {}  # what the help says: of which methods
        for key, each in numbers.items():
            default = f", default {plain(each.default_text or each.default)}" if each.default is not False else ""
            said.setdefault(each.help, []).append(key + default)
        add(flag(name), help="; ".join(f"{text} ({'; '.join(of)})" for text, of in said.items()), **how)
    for key, method in METHODS.items():
        if method.warmed_up:
            add(flag(f"{key}_warmup"), type=whole, default=0, metavar="EPOCHS",
                help=f"raise {' and '.join(method.warmed_up)} of {key} from 0 over so many epochs; default: %(default)s")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def plain(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def fill_in(parser, args, of_preset: set) -> None:
    """Defaults of the chosen method; a flag of another method is refused rather than ignored, unless a preset set it."""
    numbers = METHODS[args.method].hyperparameters
    for name in sorted({name for method in METHODS.values() for name in method.hyperparameters}):
        value = getattr(args, name)
        if name in numbers:
            setattr(args, name, numbers[name].default if value is None else value)
        elif value is None or name in of_preset:
            setattr(args, name, None)
        else:
            parser.error(f"{flag(name)} does not belong to --method {args.method} ({value})")
    for key, method in METHODS.items():
        if method.warmed_up and key != args.method and getattr(args, f"{key}_warmup"):
            parser.error(f"{flag(key)}-warmup does not belong to --method {args.method} ({getattr(args, f'{key}_warmup')})")
    method = METHODS[args.method]
    weights = [resolved(method, own_numbers(args))[name] for name in method.weight_of.values()]
    if len(weights) == len(method.terms) and not any(weights):
        parser.error(f"every weight of the loss is 0 ({', '.join(map(flag, method.weight_of.values()))})")
    reason = method.validate(own_numbers(args))
    if reason:
        parser.error(reason)


def own_numbers(args) -> dict:
    return {name: getattr(args, name) for name in METHODS[args.method].hyperparameters}


def named(template: str, args, separator: str) -> str:
    """A name of the method with its numbers, and which of its switches are on."""
    numbers = own_numbers(args)
    return separator.join([template.format(**numbers), *(name for name, value in numbers.items() if value is True)])


def run_name(args) -> str:
    """The method with the numbers that tell its runs apart: kd-alpha0.7-T4, dkd-beta8-T4-standardize."""
    return named(METHODS[args.method].run, args, "-")


def labels(args) -> dict:
    """How tables and figures, which know no methods, call a run of this one; for its config.json."""
    method = METHODS[args.method]
    return {"method_in_tables": named(method.table, args, " "), "method_in_figures": named(method.figure, args, " ")}


def function(args):
    """The method's function in losses/."""
    return resolve_name(METHODS[args.method].function)


def warmup(args) -> int:
    return getattr(args, f"{args.method}_warmup", 0)


def numbers(args, device="cpu") -> dict:
    """Its keyword arguments.  Those that its warm-up raises are 0-dim fp32 tensors on `device`, which `ramp` fills: a recorded
    step reads them there."""
    found = own_numbers(args) | {"label_smoothing": args.label_smoothing}
    if warmup(args):
        import torch
        found |= {name: torch.tensor(float(found[name]), device=device) for name in METHODS[args.method].warmed_up}
    return found


def ramp(numbers: dict, args, epoch: int) -> None:
    """Before an epoch (from 1): fill the `numbers` that the method's warm-up raises."""
    if warmup(args):
        factor = min(epoch / warmup(args), 1)
        for name in METHODS[args.method].warmed_up:
            numbers[name].fill_(factor * getattr(args, name))


def objective(args) -> str:
    """What is minimised, as a formula with its numbers; one for both scripts."""
    ce = f"CE(label smoothing {args.label_smoothing:g})"
    if "method" in args:
        ramp = f" * min(epoch / {warmup(args)}, 1)" if warmup(args) else ""
        return f"loss = {METHODS[args.method].formula(own_numbers(args), ce, ramp)}"
    return f"loss = {ce}"
