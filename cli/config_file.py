"""--config: the flags of another run, as defaults.  Imports no torch."""
from pathlib import Path

from losses.methods import METHODS
from rundir.errors import Failure, Parser
from rundir.files import read_json

# Flags that belong to one run or one machine.
LEFT_OUT = {"config", "experiment", "output", "resume", "overwrite", "dry_run", "debug", "device", "kernels"}
HYPERPARAMETERS = {name for method in METHODS.values() for name in method.hyperparameters}


def add_flag(add) -> None:
    add("--config", metavar="FILE", help="config.json of a run: its flags are the defaults, and flags take precedence")


def flags_of(parser, argv, *scripts: str) -> dict:
    """The flags in the file of --config, of a run of one of `scripts`, that `parser` knows; {} without it.

    If --method is another one than that of the file, the hyperparameters of the file's method are left out.
    """
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--method")
    given = first.parse_known_args(argv)[0]
    if given.config is None:
        return {}
    try:
        config = read_json(Path(given.config))
    except Failure as failure:
        parser.error(str(failure))
    if config is None:
        parser.error(f"no such file (--config {given.config})")
    if config.get("script") not in scripts:
        parser.error(f"not the config.json of a run of {' or '.join(scripts)} ({given.config})")
    of_method = HYPERPARAMETERS if given.method not in (None, config.get("method")) else set()
    known = {action.dest for action in parser._actions} - LEFT_OUT - of_method
    return {name: value for name, value in config.items() if name in known}
