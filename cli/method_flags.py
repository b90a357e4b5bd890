"""The flags of the methods, by their records in losses/methods.py.  Imports no torch."""
from cli.flag_types import number, whole
from losses.chosen_method import ChosenMethod
from losses.methods import LABELS, METHODS, resolved


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
    record, hyperparameters = METHODS[args.method], {name: getattr(args, name) for name in numbers}
    weights = [resolved(record, hyperparameters)[name] for name in record.weight_of.values()]
    if len(weights) == len(record.terms) and not any(weights):
        parser.error(f"every weight of the loss is 0 ({', '.join(map(flag, record.weight_of.values()))})")
    reason = record.validate(hyperparameters)
    if reason:
        parser.error(reason)


def chosen(args) -> ChosenMethod:
    """The method of checked flags; that of train_teacher.py is the training on labels alone."""
    name = getattr(args, "method", None)
    record = METHODS[name] if name else LABELS
    return ChosenMethod(record, {each: getattr(args, each) for each in record.hyperparameters}, args.label_smoothing,
                        getattr(args, f"{name}_warmup", 0))
