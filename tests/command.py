"""Runs a script in this process, or in a fork of it, as a command would."""
import contextlib
import gc
import io
import os
import re
import runpy
import shlex
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = ("--dataset imagefolder --epochs 2 --warmup-epochs 0 --batch-size 16 --opt sgd --lr 0.02 --weight-decay 5e-4 "
         "--label-smoothing 0.1 --val-size 20 --device cpu")


def run_main(main, *arguments):
    """Exit code, stdout and stderr of `main(arguments)`."""
    code, output, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as leave:
            code = leave.code
    return code, output.getvalue(), errors.getvalue()


def refused(main, code, *arguments):
    """The one line on stderr with which `main` must leave by `code`, having printed nothing else."""
    got, output, errors = run_main(main, *arguments)
    assert (got, output) == (code, ""), (got, output, errors)
    assert re.fullmatch(r"error: [^\n]+\. [^\n]+\n", errors), errors
    return errors


def run(capsys, script, line):
    """Run a script as `python script.py line` would -> (exit code, stdout, stderr)."""
    capsys.readouterr()
    argv, sys.argv = sys.argv, [str(ROOT / script), *shlex.split(line)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return (code, *capsys.readouterr())


def succeeds(capsys, script, line) -> str:
    """stdout of a script that must end without an error."""
    code, out, err = run(capsys, script, line)
    assert code == 0, err
    return out


def student_of(capsys, place, teacher="teacher", seed=1) -> str:
    """Flags of distill.py for a student of `place`/teacher on `place`/images; the teacher is trained where it is not there."""
    common = f"{SMALL} --data-dir {place}/images"
    if not (place / teacher).exists():
        succeeds(capsys, "train_teacher.py", f"{common} --model resnet8 --seed {seed} --output {place}/{teacher}")
    return f"{common} --student v2_pico --allow-weak-teacher --teacher-checkpoint {place}/{teacher}/best.pt"


def one_line(code: int, expected: int, errors: str) -> str:
    """stderr, which must be the one line of an expected error."""
    assert code == expected, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1 and ". " in errors, errors
    return errors


def be_the_command(flags: list[str], environment=()) -> None:
    """In a child forked by subprocess.Popen: what `python *flags` does, without importing torch again."""
    gc.enable()
    os.closerange(3, 1000)  # or Popen would wait for the child to exec
    os.environ |= environment
    sys.path.insert(0, os.getcwd())
    sys.stdout, sys.stderr, code = open(1, "w", closefd=False), open(2, "w", closefd=False), 0
    try:
        if flags[0] == "-m":
            sys.argv = flags[1:]
            runpy.run_module(flags[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = flags
            runpy.run_path(flags[0], run_name="__main__")
    except SystemExit as leave:
        code = int(leave.code or 0)
    except BaseException:
        code = traceback.print_exc() or 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
