"""Defaults of flags from a preset of the study and from the config.json of another run.  Imports no torch."""
from argparse import ArgumentError
from pathlib import Path

from losses.methods import METHODS
from rundir.errors import Failure, Parser
from rundir.files import read_json
from rundir.identity import listed

STUDY_TEACHERS = ("runs/teacher/best.pt", "runs/teacher-strong/best.pt")  # the default, and that of v4
EXPERIMENTS = {
    "v1": {"method": "kd", "policy": "none", "random_erasing": 0.0},
    "v2": {"method": "kd"},
    "v3": {"method": "dkd", "beta": 8.0},
    "v3.1": {"method": "dkd", "beta": 2.0},
    "v4": {"method": "kd", "teacher_checkpoint": STUDY_TEACHERS[1]},
}
# Flags that belong to one run or one machine, to a method, and to a teacher.
OF_RUN = {"config", "experiment", "output", "resume", "overwrite", "dry_run", "debug", "device", "kernels", "teacher_logits",
          "teacher_logits_limit"}
OF_METHOD = {name for key, method in METHODS.items() for name in (*method.hyperparameters, f"{key}_warmup")}
OF_TEACHER = {"teacher", "teacher_image_size", "teacher_mean", "teacher_std"}


def defaults(parser, argv, *scripts: str) -> dict:
    """The defaults that the --experiment and --config in `argv` set, the former first; {} without either.

    scripts: of whose runs the config.json may be.  From it come the flags that `parser` knows, but for hyperparameters of another
    method than the chosen one, and for what is said of a teacher if `argv` names another.
    Exits with 2 and one line if the file is not such a config.json, or has a value that the flag does not take.
    """
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    for flag in ("--config", "--method", "--teacher-checkpoint"):
        first.add_argument(flag)
    first.add_argument("--experiment", choices=EXPERIMENTS)
    given = first.parse_known_args(argv)[0]
    preset = EXPERIMENTS.get(given.experiment, {})
    if given.config is None:
        return preset
    try:
        config = read_json(Path(given.config))
    except Failure as failure:
        parser.error(str(failure))
    if config is None:
        parser.error(f"no such file (--config {given.config})")
    if config.get("script") not in scripts:
        parser.error(f"not the config.json of a run of {' or '.join(scripts)} ({given.config})")
    method, left_out = given.method or preset.get("method"), OF_RUN
    if method not in (None, config.get("method")):
        left_out = left_out | OF_METHOD
    if given.teacher_checkpoint or "teacher_checkpoint" in preset:
        left_out = left_out | OF_TEACHER
    found = {}
    for action in (action for action in parser._actions if action.dest in config.keys() - left_out):
        found[action.dest] = value = config[action.dest]
        try:
            if action.nargs == 0 and value not in (None, True, False):
                raise ArgumentError(action, f"must be true or false ({value})")
            for each in listed(value) if action.nargs != 0 and value is not None else ():
                parser._check_value(action, parser._get_value(action, str(each)))
        except ArgumentError as failure:
            parser.error(f"{failure}, in {given.config}")
    return found | preset
