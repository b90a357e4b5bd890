"""Kill and signal training runs by the hundred, fill their disk, and compare the results with those of uninterrupted runs.

    make torture                                                all of it
    PYTHONPATH=. python tests/torture.py --kills 10 --signals 10             less of it; --seed 1 at other moments

Every attempt must end in the state of the uninterrupted run, bit for bit (its clock columns aside), or in one line and the exit
code of the fault.  tests/test_reliability.py makes a few of each kind.  All runs are forked from one process that has imported
torch, so that a run of three epochs takes a second.
"""
import argparse
import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import PIL
from faults import die_at, no_space_at
from helpers import make_images, table_of

ROOT = Path(__file__).resolve().parent.parent
CLOCK = ("images_per_s", "epoch_s", "val_s", "total_s", "peak_mem_mb")
RECIPE = "--dataset imagefolder --data-dir images --epochs 3 --warmup-epochs 1 --batch-size 16 --val-size 20 --device cpu"
COMMANDS = {  # between them: both optimizers, a moving average, an epoch that is not the best, a loss scale, and dropout
    "teacher": f"train_teacher.py --model resnet8 {RECIPE} --opt sgd --lr 2 --weight-decay 5e-4 --model-ema 0.9",
    "student": "distill.py --method dkd --temperature 1 --alpha 0.25 --beta 0.5 --ce-weight 0.25 --student forgetful "
               f"--allow-weak-teacher {RECIPE} --opt adamw --amp fp16 --kernels reference",
    "pair": "torchrun --nproc-per-node 2 distill.py --temperature 1 --alpha 0.25 --ce-weight 0.25 --student forgetful "
            f"--allow-weak-teacher --model-ema 0.9 {RECIPE} --batch-size 8 --opt adamw --amp fp16 --kernels reference",
}  # with losses so small that FP16 finds its scale within a step or two of the four in an epoch, on any processor
CONTEXT = multiprocessing.get_context("forkserver")
os.environ["PYTHONPATH"] = str(ROOT)  # where the server from which all runs are forked finds our modules
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that share a core must not spin
CONTEXT.set_forkserver_preload(["torch.optim.swa_utils", "torch.utils.flop_counter", "matplotlib", "augment", "losses.kd",
                                "losses.dkd", "training.run", *(f"PIL.{name}" for name in PIL._plugins)])


class Result(NamedTuple):
    """Of a command: exit code (negative: the signal that killed it), the text of both streams, seconds."""
    code: int
    out: str
    err: str
    seconds: float


class Job(NamedTuple):
    """A running command, of one process or several."""
    processes: list
    logs: list
    started: float
    store: object  # where several processes find each other

    @property
    def pid(self) -> int:
        return self.processes[0].pid


def forgetful(num_classes: int):
    """The smallest network that draws random numbers: its dropout must go on where it was."""
    import torch

    from models.cifar_networks import resnet
    net = resnet(num_classes, widths=(16, 16), blocks=(1,))
    net.flatten = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout())
    return net


def as_torchrun_does(size: int) -> tuple:
    """The store where `size` processes find each other, and the environment of each."""
    from torch.distributed import TCPStore
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    return store, [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def be_the_script(line: str, folder: str, log: str, fault, environment: dict) -> None:
    """In a child: call `fault()`, then run `line` in `folder`."""
    gc.freeze()  # else every collection walks through all that was imported before the fork
    os.chdir(folder)
    os.environ |= environment
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    import torch

    import models
    from plots import confusion
    torch.set_num_threads(1)
    models.cifar_networks.NETWORKS["forgetful"] = forgetful
    confusion.picture = lambda *matrix: b""  # to draw it takes a fifth of such a short run
    script, *flags = shlex.split(line)
    sys.argv = [str(ROOT / script), *flags]
    if fault:
        fault()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.stdout.flush(), sys.stderr.flush()


class Workplace:
    """A folder with images and a trained teacher, in which commands run in processes of their own."""

    def __init__(self, folder):
        self.folder, self.usual = Path(folder), {}  # usual: seconds that a whole run of each kind takes
        self.one_at_a_time = threading.Lock()  # multiprocessing looks at all children whenever one starts
        classes = [f"class{index}" for index in range(4)]
        make_images(self.folder / "images" / "train", classes, 24, seed=0, size=8)
        make_images(self.folder / "images" / "test", classes, 6, seed=1, size=8)

    def start(self, line: str, fault=None) -> "Job":
        """Start a script, after `fault()` in every process; `torchrun --nproc-per-node N` is emulated."""
        store, environments = None, [{}]
        if line.startswith("torchrun "):
            _, _, size, line = line.split(maxsplit=3)
            store, environments = as_torchrun_does(int(size))
        job = Job([], [], time.perf_counter(), store)
        for environment in environments:
            job.logs.append(tempfile.mktemp(dir=self.folder, prefix="log"))
            arguments = (line, str(self.folder), job.logs[-1], fault, environment)
            job.processes.append(CONTEXT.Process(target=be_the_script, args=arguments))
            with self.one_at_a_time:
                job.processes[-1].start()
        return job

    def finish(self, job: "Job", limit: float = 60) -> Result:
        """Wait for the end; as under torchrun, the first process to fail gives the code, and the others are terminated."""
        running, code = list(job.processes), 0
        while running:
            ended = multiprocessing.connection.wait([process.sentinel for process in running], limit)
            assert ended, f"still running after {limit} s"
            with self.one_at_a_time:
                for process in [process for process in running if process.sentinel in ended]:
                    running.remove(process)
                    process.join()
                    if process.exitcode and not code:
                        code = process.exitcode
                        time.sleep(0.2 * len(running))  # torchrun looks ten times a second
                        for other in running:
                            other.terminate()
        seconds, texts = time.perf_counter() - job.started, []
        for stream in ("out", "err"):
            paths = [path for log in job.logs if (path := Path(f"{log}.{stream}")).exists()]  # none if killed before it wrote
            texts.append("".join(path.read_text() for path in paths))
            for path in paths:
                path.unlink()
        return Result(code, *texts, seconds)

    def run(self, line: str, fault=None) -> Result:
        return self.finish(self.start(line, fault))

    def undisturbed(self, kind: str) -> Path:
        """The uninterrupted run."""
        folder = self.folder / "undisturbed" / kind
        if not folder.exists():
            kind == "teacher" or self.undisturbed("teacher")
            result = self.run(f"{command(kind)} --output {folder}")
            assert result.code == 0, result.err
            self.usual[kind] = result.seconds
        return folder


def command(kind: str) -> str:
    return COMMANDS[kind] + (" --teacher-checkpoint undisturbed/teacher/best.pt" if kind != "teacher" else "")


# --- comparing


def log_of(run: Path) -> list[dict]:
    """The rows of log.csv without its columns of clock and memory."""
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in table_of(run / "log.csv")]


def tensors_of(tree, path: str = "") -> dict:
    """Every leaf of nested containers by its path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        return {path: tree}
    return {name: leaf for key, value in items for name, leaf in tensors_of(value, f"{path}/{key}").items()}


def equal(one, two) -> bool:
    import torch
    return type(one) is type(two) and (torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two)


def difference(run: Path, undisturbed: Path, *names: str) -> str:
    """The first difference between two runs, or "".  names: of checkpoints; default: last.pt and best.pt."""
    from rundir import checkpoint
    if log_of(run) != log_of(undisturbed):
        return "log.csv"
    if (run / "diagnostics.csv").read_bytes() != (undisturbed / "diagnostics.csv").read_bytes():
        return "diagnostics.csv"
    for name in names or ("last.pt", "best.pt"):
        ours, theirs = (tensors_of({key: value for key, value in checkpoint.read(folder / name).items()
                                    if key not in ("config", "rows", "sha256")}) for folder in (run, undisturbed))
        if ours.keys() != theirs.keys():
            return f"keys of {name}"
        for key in ours:
            if not equal(ours[key], theirs[key]):
                return f"{name}{key}"
    return "a partial file is left" if list(run.glob("*.tmp")) else ""


def outcome_of_resuming(place: Workplace, kind: str, run: Path) -> str:
    """Continue `run` to its end -> how it differs from the uninterrupted one, or ""."""
    result = place.run(f"{command(kind)} --output {run} --resume auto")
    if result.code:
        return f"exit {result.code}: {result.err}"
    found = difference(run, place.undisturbed(kind))
    shutil.rmtree(run)
    return found


# --- attempts: each returns "", or what went wrong


def new_run(place: Workplace) -> Path:
    return Path(tempfile.mkdtemp(dir=place.folder))


def write_point(place: Workplace, kind: str, point: int, fault, code: int) -> str | None:
    """Meet `fault` at the `point`-th write, which ends the run with `code`; None where the run ends before."""
    run = new_run(place)
    result = place.run(f"{command(kind)} --output {run} --resume auto", partial(fault, point))
    if result.code == 0:
        shutil.rmtree(run)
        return None
    if result.code != code or code > 0 and (result.err.count("\n") != 1 or list(run.glob("*.tmp"))):
        return f"exit {result.code}: {result.err} {list(run.glob('*.tmp'))}"
    return outcome_of_resuming(place, kind, run)


crash_point = partial(write_point, fault=die_at, code=-signal.SIGKILL)
full_disk_point = partial(write_point, fault=no_space_at, code=8)


def interruption(place: Workplace, kind: str, number: int, fraction: float) -> str:
    """Send a signal after a fraction of a run's usual time; SIGKILL up to three times in one run, to any one of its processes."""
    run, kill = new_run(place), number == signal.SIGKILL
    for _ in range(3 if kill else 1):
        job = place.start(f"{command(kind)} --output {run} --resume auto")
        time.sleep(fraction * place.usual[kind])
        sent = time.perf_counter()
        for process in [job.processes[int(fraction * 1000) % len(job.processes)]] if kill else job.processes:
            with suppress(ProcessLookupError):  # it may have ended
                os.kill(process.pid, number)
        result = place.finish(job)
        took = time.perf_counter() - sent
        if result.code == 0:
            continue
        if kill:
            good = took < 10 and "Traceback" not in result.err
        else:  # where flags are not parsed yet, or torchrun handles signals, it ends without a line of ours
            ours = len(job.processes) == 1 and result.out
            line = result.code == 128 + number and result.err.count("\n") == 1 and "--resume auto" in result.err
            good = took < 2 and (line or not ours)
        if not good:
            return f"exit {result.code} after {took:.1f} s: {result.err}"
    return outcome_of_resuming(place, kind, run)


def all_points(pool, place, kind, attempt) -> list[str]:
    """The attempts at every write of a run."""
    outcomes = []
    while None not in outcomes:
        outcomes += pool.map(partial(attempt, place, kind), range(len(outcomes) + 1, len(outcomes) + 9))
    return [outcome for outcome in outcomes if outcome is not None]


def random_points(pool, place, kind, draw, numbers, count) -> list[str]:
    """Interruptions by the signals `numbers` in turn, at random moments."""
    moments = [(numbers[index % len(numbers)], draw.random()) for index in range(count)]
    return list(pool.map(lambda moment: interruption(place, kind, *moment), moments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for name, count in (("kills", 50), ("signals", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    draw, failures = random.Random(args.seed), 0
    os.environ["OMP_NUM_THREADS"] = "1"

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        place = Workplace(folder)
        attacks = []
        for kind in COMMANDS:
            place.undisturbed(kind)
            share = 5 if kind == "pair" else 2  # the two scripts share the counts; two processes on one run are extra
            interrupted = partial(random_points, pool, place, kind, draw)
            points = [("crash-points (all)", crash_point), ("full-disks (all)", full_disk_point)][:1 if kind == "pair" else 2]
            attacks += [*((name, kind, partial(all_points, pool, place, kind, attempt)) for name, attempt in points),
                        ("kills", kind, partial(interrupted, [signal.SIGKILL], args.kills // share)),
                        ("signals", kind, partial(interrupted, [signal.SIGINT, signal.SIGTERM], args.signals // share))]
        print(f"{'':32} {'attempts':>8} {'passed':>8} {'seconds':>8}")
        for name, kind, attack in attacks:
            started, outcomes = time.perf_counter(), attack()
            bad = [outcome for outcome in outcomes if outcome]
            failures += len(bad)
            print(f"{f'{kind}: {name}':32} {len(outcomes):8} {len(outcomes) - len(bad):8} {time.perf_counter() - started:8.0f}",
                  *bad[:10], sep="\n    ", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
