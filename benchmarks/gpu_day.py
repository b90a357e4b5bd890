"""All checks and measurements that need a GPU: three stages of nine minutes each, without network or installation.

    python -m benchmarks.gpu_day --stage 1 --output DIR                      is everything right?
    python -m benchmarks.gpu_day --stage 2 --output DIR                      how fast is it?
    python -m benchmarks.gpu_day --stage 3 --output DIR --data FILE.tar.xz   real training, on train/CLASS/*.jpg, test/CLASS/*.jpg
    make gpu PYTHON=python3 STAGE=2 OUTPUT=dir                               the same

Needs torch, torchvision, triton, numpy, matplotlib and pytest.  The parts of a stage are ordered by importance.  Each is a
process with a time limit, and however it ends, the next one begins, as long as the minutes last.  The rows of a part are copied
to DIR/stage<N>-<part>.csv as they come, its output to DIR/stage<N>-log.txt, and how it ended to DIR/stage<N>-parts.csv: at most 8
files.  All else is in runs/gpu-day and stays there: stage 3, called again, goes on.
"""
import contextlib
import os
import shutil
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
POLL = 5  # seconds between two copies of new rows
LEAST = 15  # seconds that a part needs
KEPT = 2**20  # bytes of the end of a part's output
ON_THE_GPU = ["tests/test_softmax_kl.py", "tests/test_augment_kernel.py", "tests/test_capture.py", "tests/test_loop.py"]
LEFT_OUT = {"tests-all": "by --tiny: they are `make test`", "step-compiled": "by --tiny: torch.compile takes minutes"}
NOT_RUN = {"not begun", "left out"}  # outcomes


class Part(NamedTuple):
    """name: of its files.  command: Python's arguments, in which {folder} and {seconds} are filled in.  most: seconds.
    left_out: why it does not run."""
    name: str
    command: list[str]
    most: float
    left_out: str = ""


def parts_of(args) -> list[Part]:
    """The parts of a stage, the most important first."""
    tiny = ["--tiny"] * args.tiny

    def part(name: str, most: float, module: str, *more: str) -> Part:
        return Part(name, ["-m", f"benchmarks.{module}", "--device", args.device, "--output", "{folder}", *tiny, *more], most)

    def check(name: str, most: float) -> Part:
        return part(name, most, "gpu_checks", name)

    def training(name: str, most: float, *more: str) -> Part:
        return part(name, most, "gpu_runs", name, "--seconds", "{seconds}", *more)

    def benchmark(name: str, most: float, *more: str) -> Part:
        return part(name, most, name.partition("-")[0], *more * (not args.tiny))

    def tests(name: str, most: float, *files: str) -> Part:
        parallel = ["-n", str(min(12, os.cpu_count())), "--dist", "loadfile"] if find_spec("xdist") and not args.tiny else []
        return Part(name, ["-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *files], most)

    pairs = ["--case", "resnet32x4-resnet8x4-128", "efficientnet_v2_l-efficientnet_v2_s-128", "resnet32x4-resnet8x4-64",
             "resnet32x4-resnet8x4-512"]
    archive = ["--data", str(args.data and args.data.resolve())]
    few = ["tests/test_softmax_kl.py", "-k", "test_cross_entropy_alone"] if args.tiny else []
    stages = {
        1: [check("machine", 60), check("kernels", 100), check("augmentation", 100), training("variants", 200),
            tests("tests-gpu", 120, *few or ON_THE_GPU), check("sanitizer", 90), tests("tests-all", 600)],
        2: [benchmark("loss", 110, "--case", "128x100", "512x100", "1024x1000", "4096x8192", "4096x32000"),
            benchmark("step", 150, "--quick", *pairs), check("bounds", 60),
            benchmark("augmentation", 70, "--quick", "--case", "128", "512"), benchmark("step-compiled", 600, *pairs)],
        3: [training("unpack", 120, *archive), training("runs", 600, *archive)],
    }
    return [part._replace(left_out=LEFT_OUT.get(part.name, "") if args.tiny else "") for part in stages[args.stage]]


class Outcome(NamedTuple):
    """A row of the table of parts."""
    stage: int
    part: str
    outcome: str
    seconds: float
    last_line: str


class Day:
    """Runs the parts of a stage one after the other, and keeps their rows and output in `output`."""

    def __init__(self, stage: int, output: Path, seconds: float):
        self.stage, self.output, self.rows = stage, output, []
        self.end = time.monotonic() + seconds - GRACE - 1

    def file(self, name: str) -> Path:
        return self.output / f"stage{self.stage}-{name}"

    def folder(self, part: Part) -> Path:
        return WORK / f"stage{self.stage}" / part.name

    def go(self, part: Part) -> None:
        """Run a part and add its row, however it ends."""
        if part.left_out:
            return self.add(part, "left out", 0, part.left_out)
        left, started = self.end - time.monotonic(), time.monotonic()
        if left < LEAST:
            return self.add(part, "not begun", 0, f"{max(0, left):.0f} s are left, it needs {LEAST}")
        outcome = "stopped"
        try:
            self.file(f"{part.name}.csv").unlink(missing_ok=True)  # of an earlier call
            outcome = self.run(part, min(part.most, left))
        except OSError as failure:
            outcome = f"failed ({failure.strerror})"
        finally:
            outcome += self.collect(part)
            lines = [line for line in self.printed(part, 2000).splitlines() if line.strip()]
            last_line = "".join(filter(str.isprintable, lines[-1]))[:160] if lines else ""
            self.add(part, outcome, time.monotonic() - started, last_line)

    def run(self, part: Part, seconds: float) -> str:
        """Run a part's process and copy its rows as they come; how it ended.  Its child processes end with it."""
        folder = self.folder(part)
        shutil.rmtree(folder, ignore_errors=True)
        make_directory(folder)
        command = [word.replace("{folder}", str(folder)).replace("{seconds}", str(round(seconds))) for word in part.command]
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(folder / "log.txt", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"})
        end = time.monotonic() + seconds
        try:
            while (code := process.poll()) is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(POLL, max(0.0, end - time.monotonic())))
                self.collect(part)
        finally:
            end_group(process)
        if code is None:
            return f"out of time ({seconds:.0f} s)"
        return "ok" if code == 0 else f"failed ({code})" if code > 0 else f"killed ({signal.Signals(-code).name})"

    def collect(self, part: Part) -> str:
        """Copy the rows of a part to `output`; why that could not be done."""
        try:
            for path in self.folder(part).glob("*.csv"):
                write_atomic(self.file(f"{part.name}.csv"), path.read_bytes())
        except OSError as failure:
            return f", not kept: {failure.strerror}"
        return ""

    def printed(self, part: Part, size: int) -> str:
        """The end of a part's output."""
        path = self.folder(part) / "log.txt"
        with contextlib.suppress(OSError), open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode(errors="replace")
        return ""

    def add(self, part: Part, outcome: str, seconds: float, line: str) -> None:
        """Add a row to the table of parts, and the part's output to the log."""
        first = all(row.outcome in NOT_RUN for row in self.rows)
        self.rows.append(Outcome(self.stage, part.name, outcome, round(seconds, 1), line))
        print(f"{part.name}: {outcome}, {seconds:.0f} s. {line}".rstrip(), flush=True)
        try:
            write_atomic(self.file("parts.csv"), as_csv(list(Outcome._fields), [row._asdict() for row in self.rows]))
            if outcome not in NOT_RUN:
                with open(self.file("log.txt"), "w" if first else "a", encoding="utf-8") as log:
                    log.write(f"=== {part.name}: {outcome}\n{self.printed(part, KEPT)}\n")
        except OSError as failure:
            print(f"not kept of {part.name} in {self.output}: {failure.strerror}", flush=True)

    def print_table(self) -> None:
        widths = [max(len(str(row[column])) for row in self.rows) for column in range(4)]
        for row in self.rows:
            cells = (f"{cell!s:{width}}" for cell, width in zip(row, widths))
            print(*cells, row.last_line, sep="  ", flush=True)


def end_group(process) -> None:
    """End a process and all of its group: SIGTERM, then SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(args) -> None:
    if args.stage == 3 and not (args.data and args.data.is_file()):
        raise Failure(USAGE, f"stage 3 needs an archive of images (--data {args.data})", "name a .tar.xz of train/CLASS/*.jpg")
    device, parts = table.device(args.device), parts_of(args)
    names = [part.name for part in parts]
    if unknown := set(args.part or ()) - set(names):
        raise Failure(USAGE, f"no such part of stage {args.stage} ({', '.join(sorted(unknown))})", f"choose of {', '.join(names)}")
    if args.tiny and device.type == "cpu":
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    make_directory(args.output)
    day = Day(args.stage, args.output, 60 * args.minutes)
    try:
        with stopping_on_signals():
            for part in parts:
                if part.name in (args.part or names):
                    day.go(part)
    except Stopped as stopped:
        raise SystemExit(STOPPED + stopped.number) from None
    finally:
        day.print_table()
    outcomes = [row.outcome for row in day.rows]
    if any(each.startswith(("failed", "killed")) or "not kept" in each for each in outcomes) or NOT_RUN.issuperset(outcomes):
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
