"""All checks and measurements that need a GPU: three stages of nine minutes each, without network or installation.

    python -m benchmarks.gpu_day --stage 1 --output DIR                      is everything right?
    python -m benchmarks.gpu_day --stage 2 --output DIR                      how fast is it?
    python -m benchmarks.gpu_day --stage 3 --output DIR --data FILE.tar.xz   real training, on train/CLASS/*.jpg, test/CLASS/*.jpg
    make gpu PYTHON=python3 STAGE=2 OUTPUT=dir                               the same

Needs torch, torchvision, triton, numpy, matplotlib and pytest.  The parts of a stage are ordered by importance.  Each is a
process with a time limit, and however it ends, the next one begins, as long as the minutes last.  A part writes its rows to
DIR/stage<N>-<part>.csv as they come; its output is in DIR/stage<N>-log.txt, and how it ended in DIR/stage<N>-parts.csv: at most 8
files.  All else is in runs/gpu-day and stays there: stage 3, called again, goes on.
"""
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks import table
from cli.flag_types import positive
from rundir.errors import STOPPED, USAGE, Failure, Stopped, run, stopping_on_signals
from rundir.files import as_csv, make_directory, write_atomic

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "gpu-day"
GRACE = 5  # seconds from SIGTERM to SIGKILL
LEAST = 15  # seconds that a part needs
PAIRS = ("resnet32x4-resnet8x4-128 efficientnet_v2_l-efficientnet_v2_s-128 resnet32x4-resnet8x4-64 "
         "resnet32x4-resnet8x4-512")
STAGES = {  # part: the most seconds that it may take, its module and flags; the most important first
    1: {"machine": (60, "gpu_checks machine"), "kernels": (100, "gpu_checks kernels"),
        "tests-only-gpu": (60, "pytest tests/test_softmax_kl.py tests/test_augment_kernel.py tests/test_capture.py "
                               "-k 'captured_graph or compile_nothing or few_launches or gpu_records'"),
        "augmentation": (100, "gpu_checks augmentation"), "variants": (200, "gpu_runs variants"),
        "tests-gpu": (120, "pytest tests/test_softmax_kl.py tests/test_augment_kernel.py tests/test_capture.py "
                           "tests/test_loop.py"),
        "sanitizer": (90, "gpu_checks sanitizer"), "tests-all": (600, "pytest")},
    2: {"loss": (150, "loss --case 128x100 4096x32000 1024x1000 4096x8192 512x100"),
        "step": (150, f"step --quick --case {PAIRS}"), "bounds": (120, "gpu_checks bounds"),
        "augmentation": (70, "augmentation --quick --case 128 512"), "step-compiled": (600, f"step --case {PAIRS}")},
    3: {"runs": (600, "gpu_runs runs")}}
TOO_LONG = ("tests-only-gpu", "tests-gpu", "tests-all", "step-compiled")  # for --tiny


class Part(NamedTuple):
    """name: of its file.  command: Python's arguments, in which {rows} and {seconds} are filled in.  most: seconds."""
    name: str
    command: list[str]
    most: float


def parts_of(args) -> list[Part]:
    """The parts of a stage, the most important first."""
    parts, common = [], ["--device", str(args.device), "--output", "{rows}", *["--tiny"] * args.tiny]
    pytest = ["-v", "-p", "no:cacheprovider"]  # -v names what failed, also of a part that is out of time
    if find_spec("xdist"):
        pytest += ["-n", str(min(12, os.cpu_count())), "--dist", "worksteal"]
    for name, (most, line) in STAGES[args.stage].items():
        module, *flags = shlex.split(line)
        if module == "gpu_runs":
            flags += ["--seconds", "{seconds}", "--work", str(WORK), "--data", str(args.data and args.data.resolve())]
        elif args.tiny and module != "gpu_checks":
            flags = []
        command = ["-m", "pytest", *pytest, *flags] if module == "pytest" else ["-m", f"benchmarks.{module}", *common, *flags]
        if not (args.tiny and name in TOO_LONG):
            parts.append(Part(name, command, most))
    return parts


def run_part(part: Part, seconds: float, rows: Path, log: Path) -> str:
    """Run a part's process, and append its output to `log`; how it ended, with its children."""
    rows.unlink(missing_ok=True)  # of an earlier call
    with open(log, "a") as output:
        print(f"=== {part.name}, {max(0.0, seconds):.0f} s", file=output, flush=True)
        if seconds < LEAST:
            return "not begun"
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [word.replace("{rows}", str(rows)).replace("{seconds}", f"{seconds:.0f}") for word in part.command]
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"})
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"out of time ({seconds:.0f} s)"
        finally:
            end_group(process)
    return "ok" if code == 0 else f"failed ({code})" if code > 0 else f"killed ({signal.Signals(-code).name})"


def end_group(process) -> None:
    """End a process and all of its group: SIGTERM, then SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(stage: int, parts: list[Part], output: Path, end: float, table: list[dict]) -> None:
    """Run the parts one after the other until `end`; a row of each goes to `table`, which is written each time."""
    log = output / f"stage{stage}-log.txt"
    log.unlink(missing_ok=True)
    for part in parts:
        started, outcome = time.monotonic(), "stopped"
        try:
            outcome = run_part(part, min(part.most, end - started), output / f"stage{stage}-{part.name}.csv", log)
        except OSError as failure:
            outcome = f"failed ({failure.strerror})"
        finally:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            table.append({"stage": stage, "part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - started, 1),
                          "last_line": "".join(filter(str.isprintable, lines[-1]))[:160]})
            with contextlib.suppress(OSError):  # it is printed, too
                write_atomic(output / f"stage{stage}-parts.csv", as_csv(list(table[0]), table))


def main(args) -> None:
    if args.stage == 3 and not (args.data and args.data.is_file()):
        raise Failure(USAGE, f"stage 3 needs an archive of images (--data {args.data})", "name a .tar.xz of train/CLASS/*.jpg")
    end, parts = time.monotonic() + 60 * args.minutes - GRACE - 1, parts_of(args)
    names, rows = [part.name for part in parts], []
    if unknown := sorted(set(args.part or ()) - set(names)):
        raise Failure(USAGE, f"no such part of stage {args.stage} ({', '.join(unknown)})", f"choose of {', '.join(names)}")
    if args.tiny and args.device.type == "cpu":
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    make_directory(args.output)
    try:
        with stopping_on_signals():
            run_stage(args.stage, [part for part in parts if part.name in (args.part or names)], args.output, end, rows)
    except Stopped as stopped:
        raise SystemExit(STOPPED + stopped.number) from None
    finally:
        for row in rows:
            print(*(f"{cell!s:{width}}" for cell, width in zip(row.values(), (1, 14, 24, 5, 0))), sep="  ", flush=True)
    outcomes = {row["outcome"] for row in rows}
    if any(each.startswith(("failed", "killed")) for each in outcomes) or outcomes == {"not begun"}:
        raise SystemExit(1)


def command() -> None:
    parser = table.parser(__doc__, tiny=True)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--minutes", type=positive, default=9, metavar="N", help="of all parts together; default: %(default)s")
    parser.add_argument("--part", nargs="+", metavar="NAME", help="these parts alone")
    parser.add_argument("--data", type=Path, metavar="FILE", help="of stage 3: an archive of images")
    run(main, parser.parse_args())


if __name__ == "__main__":
    command()
