"""The cells of a sweep, from a command in which flags may have several values.  Imports no torch.

All errors are one line and exit code 2.
"""
import itertools
import re
import shlex
from argparse import REMAINDER, Namespace
from dataclasses import dataclass
from zlib import crc32

from cli import method_flags, options
from cli.flag_types import count, nonempty
from losses.methods import METHODS
from rundir.errors import USAGE, Failure

PARSERS = {"distill.py": options.parse_distill, "train_teacher.py": options.parse_teacher}
DEFAULTS = {script: parse(argv=[]) for script, parse in PARSERS.items()}
SET_BY_SWEEP = ("--output", "--resume", "--overwrite", "--dry-run")
LONG_FORM = {"-b": "--batch-size"}
DECIDING = {"--config", "--experiment", "--method"}  # the method, and the seed without --seed
CONSTANTS = ("--teacher-mean", "--teacher-std")  # three numbers each
METRICS = ("test_acc1_best", "test_acc1_last")
LONGEST_NAME = 120  # characters of a run's name, before the seed


@dataclass
class Cell:
    """A script and its flags, run once for every seed.

    flags: flag -> its values, none for a switch; without "--seed".  dropped: flags of the command that this script or method does
    not have.  runs: seed -> the parsed flags of its run.  differing: the `flags` that not all cells share; label: `differing` as
    typed; name: `differing` as part of a path.
    """
    script: str
    flags: dict[str, tuple[str, ...]]
    dropped: set[str]
    runs: dict[int, Namespace]
    differing: dict[str, tuple[str, ...]] = None
    label: str = ""
    name: str = ""


def parse_sweep(description=None, usage_lines=None, argv=None) -> Namespace:
    """The flags of sweep.py, the `script`, and the unparsed rest of the command in `flags`."""
    parser = options.new_parser(description, usage_lines)
    add = parser.add_argument_group("before the script").add_argument
    add("--jobs", type=count, default=1, metavar="N", help="runs at once, on one GPU or CPU; " + options.DEFAULT)
    add("--output", type=nonempty, default="runs/sweep", metavar="DIR", help="directory of runs and table; " + options.DEFAULT)
    add("--control", metavar="FLAGS", help="the cell to compare with, by its flags, as in --control=\"--method kd\"; "
        "default: the first")
    add("--metric", choices=METRICS, default=METRICS[0], help="of the best or the last epoch; " + options.DEFAULT)
    add("--dry-run", action="store_true", help="list the runs, then stop")
    options.debug_flag(add)
    add = parser.add_argument_group("runs").add_argument
    add("command", nargs=REMAINDER, metavar="script flags", help="distill.py or train_teacher.py, and its flags; several values "
        "make an axis of the grid, those of --seed are repeats; -- separates grids that share the flags before the first --; "
        "--sweep NAME begins a sweep with a table of its own, in --output/NAME")
    args = parser.parse_args(argv)
    args.script, *args.flags = args.command or [None]
    if args.script not in PARSERS:
        parser.error(f"the script must be {' or '.join(PARSERS)} ({args.script})")
    return args


def named(words: list[str]) -> dict[str, list[str]]:
    """Name -> words of each sweep: those before the first --sweep, and its own.  Without --sweep there is one, named ""."""
    common, *sweeps = split(words, "--sweep")
    if not sweeps:
        return {"": common}
    for name, *_ in (own or [""] for own in sweeps):
        if not re.fullmatch(r"\w[\w.-]*", name) or [own[:1] for own in sweeps].count([name]) > 1:
            raise Failure(USAGE, f"--sweep needs a name of its own, of letters, digits, . and - ({name or 'none'})",
                          "write --sweep NAME and its flags")
    if "--" in common:
        raise Failure(USAGE, "-- before the first --sweep", "give grids to each --sweep")
    return {name: common + own for name, *own in sweeps}


def expand(script: str, words: list[str]) -> list[Cell]:
    """All cells of a sweep, named, in order; equal cells are merged.  The script's parser checks every flag."""
    first, *others = split(words, "--")
    common, cells, unique = read_flags(first), [], {}
    for words in others or [[]]:
        own_script, *words = words if words and words[0] in PARSERS else [script, *words]
        own = read_flags(words)
        foreign = {flag for flag in common if own_script != script and has(script, flag) and not has(own_script, flag)}
        grid = list(product(own_script, {flag: values for flag, values in common.items() if flag not in foreign} | own, foreign))
        refuse_unused(own, grid)
        cells += grid
    refuse_unused(common, cells)
    for cell in cells:
        first = vars(next(iter(cell.runs.values())))
        key = repr((cell.script, {name: value for name, value in first.items() if name not in ("seed", "output")}))
        unique.setdefault(key, cell).runs |= cell.runs
    name_cells(script, list(unique.values()))
    return list(unique.values())


def split(words: list[str], at: str) -> list[list[str]]:
    parts = [[]]
    for word in words:
        if word == at:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def read_flags(words: list[str]) -> dict[str, tuple[str, ...]]:
    flags, values = {}, None
    for word in words:
        if not re.match(r"--?[A-Za-z]", word):
            if values is None:
                raise Failure(USAGE, f"a value without a flag ({word})", "flags begin with --")
            values.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = LONG_FORM.get(flag, flag)
        if flag in SET_BY_SWEEP:
            raise Failure(USAGE, f"the sweep sets {flag} of its runs ({word})",
                          "remove it; --output and --dry-run of the sweep come before the script")
        if flag in flags:
            raise Failure(USAGE, f"a flag is given twice in a grid ({word})", "give all its values after one flag")
        values = flags[flag] = [value] * bool(equals)
    return {flag: tuple(values) for flag, values in flags.items()}


def has(script: str, flag: str) -> bool:
    return re.sub("^--(no-)?", "", flag).replace("-", "_") in DEFAULTS[script]


def product(script: str, flags: dict, dropped: set):
    """The cells of one grid, each without the hyperparameters of other methods; the script's parser exits with 2 on an error."""
    axes = {flag: axis(script, flag, values) for flag, values in flags.items()}
    seeds = axes.pop("--seed", None)
    for point in itertools.product(*axes.values()):
        chosen = dict(zip(axes, point))
        base = PARSERS[script](argv=command({flag: chosen[flag] for flag in DECIDING & chosen.keys()}), prog=script)
        foreign = foreign_hyperparameters(chosen, base.method) if script == "distill.py" else set()
        cell = Cell(script, {flag: values for flag, values in chosen.items() if flag not in foreign}, dropped | foreign, {})
        parsed = (PARSERS[script](argv=[*command(cell.flags), "--seed", *seed, "--output", "-"], prog=script)
                  for seed in seeds or [(str(base.seed),)])
        cell.runs = {args.seed: args for args in parsed}
        yield cell


def axis(script: str, flag: str, values: tuple) -> list[tuple]:
    """The settings of a flag; a list, as for --milestones, is one setting, and so is what has commas between it for a teacher."""
    whole = not values or isinstance(getattr(DEFAULTS[script], flag[2:].replace("-", "_"), None), list)
    whole |= flag in CONSTANTS and "," not in "".join(values)
    of_teachers = flag in ("--teacher-checkpoint", "--teacher", *CONSTANTS)
    return [values] if whole else [tuple(value.split(",")) if of_teachers else (value,) for value in values]


def foreign_hyperparameters(flags: dict, method: str) -> set[str]:
    owned = {key: {*map(method_flags.flag, (*each.hyperparameters, f"{key}_warmup"))} for key, each in METHODS.items()}
    return set(flags) & set.union(*owned.values()) - owned[method]


def refuse_unused(flags: dict, cells: list[Cell]) -> None:
    """Failure USAGE: a flag that no cell has."""
    for flag in flags:
        if all(flag in cell.dropped for cell in cells):
            raise Failure(USAGE, f"no method of this grid has this flag ({' '.join((flag, *flags[flag]))})",
                          "remove it, or add its --method")


def command(flags: dict) -> list[str]:
    return [word for flag, values in flags.items() for word in (flag, *values)]


def name_cells(script: str, cells: list[Cell]) -> None:
    """Set `differing`, `label` and `name` of the cells.

    A flag that only some cells have counts as differing, unless the others dropped it.  A cell without differing flags, or of
    another script than `script`, is named by its script.
    """
    every = dict.fromkeys(flag for cell in cells for flag in cell.flags)
    varied = [flag for flag in every if len({cell.flags.get(flag) for cell in cells if flag not in cell.dropped}) > 1]
    for cell in cells:
        cell.differing = {flag: cell.flags[flag] for flag in varied if flag in cell.flags}
        prefix = [cell.script] if cell.script != script or not cell.differing else []
        cell.label = shlex.join([*prefix, *command(cell.differing)])
        parts = [*(word.removesuffix(".py") for word in prefix),
                 *("-".join((flag[2:], *values)) for flag, values in cell.differing.items())]
        cell.name = "_".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", part).strip("-.") for part in parts)
    names = [cell.name for cell in cells]
    for cell in cells:
        if len(cell.name) > LONGEST_NAME or names.count(cell.name) > 1:
            cell.name = f"{cell.name[:LONGEST_NAME]}-{crc32(cell.label.encode()):08x}"


def find_control(cells: list[Cell], text: str | None) -> Cell:
    """The cell whose differing flags are exactly these, else the only one that has them; default: the first."""
    if text is None:
        return cells[0]
    try:
        words = shlex.split(text)
    except ValueError as failure:
        raise Failure(USAGE, f"--control cannot be read ({text}: {failure})", "close the quotes") from None
    script = words.pop(0) if words and words[0] in PARSERS else None
    flags = read_flags(words)
    having = [cell for cell in cells if script in (None, cell.script) and flags.items() <= cell.flags.items()]
    chosen = [cell for cell in having if cell.differing == flags] or having
    if len(chosen) != 1:
        raise Failure(USAGE, f"--control matches {len(chosen)} of {len(cells)} cells ({text})",
                      f"name one of: {'; '.join(cell.label for cell in cells)}")
    return chosen[0]
