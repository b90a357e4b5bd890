"""Defaults of flags from a preset of the study and from the config.json of another run.  Imports no torch."""
import sys
from pathlib import Path

from losses.methods import METHODS
from rundir.errors import Failure, Parser
from rundir.files import read_json
from rundir.identity import BETWEEN, listed

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
    method than the chosen one, for what is said of a teacher if `argv` names another, and of --init and --pretrained for the one
    that `argv` does not have.
    Exits with 2 and one line if the file is not such a config.json, or has a value that the flag does not take.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    for flag in ("--config", "--method", "--init"):
        first.add_argument(flag)
    first.add_argument("--teacher-checkpoint", nargs="+")
    first.add_argument("--pretrained", action="store_true")
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
    method, teacher = given.method or preset.get("method"), given.teacher_checkpoint or preset.get("teacher_checkpoint")
    left_out = set(OF_RUN)
    if method not in (None, config.get("method")):
        left_out |= OF_METHOD
    if teacher and listed(teacher) != listed(config.get("teacher_checkpoint")):
        left_out |= OF_TEACHER
    left_out |= {"pretrained"} if given.init else {"init"} if given.pretrained else set()
    found = {action.dest: action for action in parser._actions if action.dest in config.keys() - left_out}
    refuse, parser.error = parser.error, lambda message: refuse(f"{message}, in {given.config}")
    values = parser.parse_args([word for name, action in found.items() for word in words(parser, action, config[name])])
    del parser.error
    return {name: getattr(values, name) for name in found} | preset


def words(parser, action, value) -> list[str]:
    """The command line's words for a value of config.json."""
    flag = action.option_strings[-1 if value is False else 0]  # --no-flip is the last of --flip
    if value is None and action.default is None:
        return []
    if value is None or action.nargs == 0 and not isinstance(value, bool):
        parser.error(f"argument {flag}: invalid value ({value})")
    if action.nargs == 0:
        return [flag] * (value or flag.startswith("--no-"))
    if action.dest == "teacher":
        value = value.split(BETWEEN)
    return [flag, *map(str, listed(value))]
