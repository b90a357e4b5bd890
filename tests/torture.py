"""Kill, signal and corrupt training runs by the thousand, and compare what is left with a run that nobody disturbed.

    make torture                                                all of it
    python tests/torture.py --kills 10 --flips 500              less of it; --only crash-points,signals picks kinds

Every attempt ends in the state of the undisturbed run, bit for bit (its clock columns aside), or in one line and the exit
code of the fault.  tests/test_reliability.py runs a few of each kind.  All runs are forked from one process that has
imported torch, so that a run of three epochs takes a second.
"""
import argparse
import csv
import errno
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
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
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CLOCK = ("images_per_s", "epoch_s", "val_s", "total_s", "peak_mem_mb")
RECIPE = "--dataset imagefolder --data-dir images --epochs 3 --warmup-epochs 1 --batch-size 16 --val-size 20 --device cpu"
COMMANDS = {  # between them: both optimizers, a moving average, an epoch that is not the best, a loss scale, and dropout
    "teacher": f"train_teacher.py --model resnet8 {RECIPE} --opt sgd --lr 2 --weight-decay 5e-4 --model-ema 0.9",
    "student": "distill.py --method dkd --temperature 1 --alpha 0.25 --beta 0.5 --ce-weight 0.25 --student forgetful_pico "
               f"{RECIPE} --opt adamw --amp fp16 --kernels reference",
    "pair": "torchrun --nproc-per-node 2 distill.py --temperature 1 --alpha 0.25 --ce-weight 0.25 --student forgetful_pico "
            f"--model-ema 0.9 {RECIPE} --batch-size 8 --opt adamw --amp fp16 --kernels reference",
}  # with losses so small that FP16 finds its scale within a step or two of the four in an epoch, on any processor
CONTEXT = multiprocessing.get_context("forkserver")
os.environ["PYTHONPATH"] = str(ROOT)  # where the server from which all runs are forked finds our modules
CONTEXT.set_forkserver_preload(["torch.optim.swa_utils", "torch.utils.flop_counter", "matplotlib", "augment", "losses.kd",
                                "losses.dkd", "training.run"])


class Result(NamedTuple):
    """Exit code (negative: the signal that killed it), the text of both streams, and seconds."""
    code: int
    out: str
    err: str
    seconds: float


class Job(NamedTuple):
    """A command that runs, in one process or several."""
    processes: list
    logs: list
    started: float
    store: object  # by which several processes find each other

    @property
    def pid(self) -> int:
        return self.processes[0].pid


def forgetful_pico(num_classes: int):
    """A small network that draws random numbers: its dropout must go on where it was."""
    import models
    net = models.cifar_networks.NETWORKS["v2_pico"](num_classes)
    net.classifier[0].p = 0.5
    return net


def as_torchrun_does(size: int) -> tuple:
    """The store by which `size` processes find each other, and the variables for each of them."""
    from torch.distributed import TCPStore
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    return store, [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def be_the_script(line: str, folder: str, log: str, fault, environment: dict) -> None:
    """The child: run `line` in `folder`, with `fault()` called first."""
    os.chdir(folder)
    os.environ |= environment
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    import torch

    import models
    torch.set_num_threads(1)
    models.cifar_networks.NETWORKS["forgetful_pico"] = forgetful_pico
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
        from helpers import make_images
        self.folder, self.usual = Path(folder), {}  # usual: seconds that a whole run of each kind takes
        self.one_at_a_time = threading.Lock()  # multiprocessing looks at all children whenever one starts
        classes = [f"class{index}" for index in range(4)]
        make_images(self.folder / "images" / "train", classes, 24, seed=0)
        make_images(self.folder / "images" / "test", classes, 6, seed=1)

    def start(self, line: str, fault=None) -> "Job":
        """Start a script; `torchrun --nproc-per-node N` before it is played by this class: `fault()` is called in every
        process."""
        store, environments = None, [{}]
        if line.startswith("torchrun "):
            _, _, size, line = line.split(maxsplit=3)
            store, environments = as_torchrun_does(int(size))
        job = Job([], [], time.perf_counter(), store)
        for environment in environments:
            job.logs.append(str(self.folder / f"log{random.random()}"))
            job.processes.append(CONTEXT.Process(target=be_the_script, args=(line, str(self.folder), job.logs[-1], fault,
                                                                             environment)))
            with self.one_at_a_time:
                job.processes[-1].start()
        return job

    def finish(self, job: "Job", limit: float = 60) -> Result:
        """Wait for the end; of several processes the first to fail gives the code, and the others are terminated, as torchrun
        does."""
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
        seconds = time.perf_counter() - job.started
        texts = []
        for stream in ("out", "err"):
            paths = [Path(f"{log}.{stream}") for log in job.logs]
            texts.append("".join(path.read_text() for path in paths if path.exists()))  # none where it was killed before it wrote
            for path in paths:
                path.unlink(missing_ok=True)
        return Result(code, *texts, seconds)

    def run(self, line: str, fault=None) -> Result:
        return self.finish(self.start(line, fault))

    def undisturbed(self, kind: str) -> Path:
        """The run to compare with."""
        folder = self.folder / "undisturbed" / kind
        if not folder.exists():
            if kind != "teacher":
                self.undisturbed("teacher")
            result = self.run(f"{command(kind)} --output {folder}")
            assert result.code == 0, result.err
            self.usual[kind] = result.seconds
        return folder


def command(kind: str) -> str:
    return COMMANDS[kind] + (" --teacher-checkpoint undisturbed/teacher/best.pt" if kind != "teacher" else "")


# --- faults: called in the child before the script


def on_rank(rank: int, fault) -> None:
    """A fault of one of several processes."""
    if os.environ["RANK"] == str(rank):
        fault()


def die_at(point: int) -> None:
    """SIGKILL before the `point`-th (from 1) call that makes something on the disk final."""
    at_write(point, lambda: os.kill(os.getpid(), signal.SIGKILL))


def no_space_at(point: int) -> None:
    """That call and those after it fail as on a full disk."""
    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_write(point, fail)


def at_write(point: int, action) -> None:
    reached = [0]

    def counting(function):
        def call(*args, **flags):
            reached[0] += 1
            if reached[0] >= point:
                action()
            return function(*args, **flags)
        return call

    for name in ("fsync", "replace", "link"):
        setattr(os, name, counting(getattr(os, name)))


def fill_the_disk(largest: int) -> None:
    """No file may grow beyond `largest` bytes: write(2) fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def poison(term: str, calls) -> None:
    """NaN into the loss of the given steps (from 0); term: "loss", or one of the named terms as well."""
    import losses
    from losses.methods import METHODS

    def poisoned(function):
        def call(logits, *args, **flags):
            answer = function(logits, *args, **flags)
            if logits.is_leaf:  # a gradient for diagnostics.csv, no step
                return answer
            bad = count[0] in calls
            count[0] += 1
            if not bad:
                return answer
            if not isinstance(answer, tuple):
                return answer * float("nan")
            loss, terms = answer
            return loss * float("nan"), terms | {name: value * float("nan") for name, value in terms.items() if name == term}
        return call

    count = [0]
    losses.mixed_ce = poisoned(losses.mixed_ce)
    for method in METHODS.values():
        module, name = method.function.split(":")
        setattr(import_module(module), name, poisoned(resolve_name(method.function)))


def poison_images(calls) -> None:
    """NaN into the images of the given training batches (from 0), so that activations and running statistics see it too."""
    import augment
    count, draw = [0], augment.BatchAugmenter.__call__

    def call(self, *args):
        batch = draw(self, *args)
        bad = count[0] in calls
        count[0] += 1
        return batch._replace(images=batch.images * float("nan")) if bad else batch

    augment.BatchAugmenter.__call__ = call


# --- comparing


def log_of(run: Path) -> list[dict]:
    """The rows of log.csv without what the clock and the memory say."""
    with open(run / "log.csv") as file:
        return [{name: value for name, value in row.items() if name not in CLOCK} for row in csv.DictReader(file)]


def tensors_of(tree, path: str = "") -> dict:
    """Every leaf of nested containers by its path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        return {path: tree}
    return {name: leaf for key, value in items for name, leaf in tensors_of(value, f"{path}/{key}").items()}


def equal(one, two) -> bool:
    import torch
    return type(one) is type(two) and (torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two)


def difference(run: Path, undisturbed: Path) -> str:
    """What differs between two runs, "" where nothing does."""
    from rundir import checkpoint
    if log_of(run) != log_of(undisturbed):
        return "log.csv"
    if (run / "diagnostics.csv").read_bytes() != (undisturbed / "diagnostics.csv").read_bytes():
        return "diagnostics.csv"
    for name in ("last.pt", "best.pt"):
        both = [tensors_of({key: value for key, value in checkpoint.read(folder / name).items()
                            if key not in ("config", "rows", "sha256")}) for folder in (run, undisturbed)]
        if both[0].keys() != both[1].keys():
            return f"keys of {name}"
        for key, value in both[0].items():
            if not equal(value, both[1][key]):
                return f"{name}{key}"
    if list(run.glob("*.tmp")):
        return "a partial file is left"
    return ""


def outcome_of_resuming(place: Workplace, kind: str, run: Path) -> str:
    """Continue `run` to its end and compare; "" where it is the undisturbed run."""
    result = place.run(f"{command(kind)} --output {run} --resume auto")
    if result.code:
        return f"exit {result.code}: {result.err}"
    found = difference(run, place.undisturbed(kind))
    shutil.rmtree(run)
    return found


# --- the kinds of torture: each yields the outcomes of its attempts, "" for a good one


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
    run, usual, kill = new_run(place), place.usual[kind], number == signal.SIGKILL
    for _ in range(3 if kill else 1):
        job = place.start(f"{command(kind)} --output {run} --resume auto")
        time.sleep(fraction * usual)
        sent = time.perf_counter()
        for process in [random.choice(job.processes)] if kill else job.processes:
            with suppress(ProcessLookupError):  # it may have ended
                os.kill(process.pid, number)
        result = place.finish(job)
        took = time.perf_counter() - sent
        if kill or result.code == 0:
            if kill and (took > 10 and result.code or "Traceback" in result.err):
                return f"exit {result.code} after {took:.1f} s: {result.err}"
            continue
        due = len(job.processes) > 1  # there Python's and the system's own ways hold
        if not due:  # before it says what it is about to do, the flags are not parsed yet, and Python's own ways hold
            due = not result.out or result.code == 128 + number and result.err.count("\n") == 1 and "--resume auto" in result.err
        if took > 2 or not due:
            return f"exit {result.code} after {took:.1f} s: {result.err}"
    return outcome_of_resuming(place, kind, run)


def corrupted(good: bytes, path: Path, damage) -> str:
    """Read a damaged last.pt: refused in one line, or equal to the good one."""
    from rundir import resume
    from rundir.errors import Failure
    path.write_bytes(damage(good))
    try:
        content = tensors_of(resume.read_run(path))
    except Failure as failure:
        return "" if failure.code == 5 and str(path) in str(failure) and "\n" not in str(failure) else f"bad line: {failure}"
    except Exception as failure:
        return f"traceback: {failure!r}"
    path.write_bytes(good)
    wanted = tensors_of(resume.read_run(path))
    wrong = [key for key in content.keys() | wanted.keys() if key not in content or key not in wanted or not equal(content[key],
                                                                                                                   wanted[key])]
    return f"other content without a word: {wrong[:3]}" if wrong else ""


def flip(draw: random.Random, good: bytes) -> bytes:
    place = draw.randrange(len(good))
    return good[:place] + bytes([good[place] ^ 1 << draw.randrange(8)]) + good[place + 1:]


def truncate(draw: random.Random, good: bytes) -> bytes:
    return good[:draw.randrange(len(good))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    kinds = {"kills": 50, "signals": 40, "flips": 4000, "truncations": 1000}
    for name, count in kinds.items():
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help="default: %(default)s")
    parser.add_argument("--only", default=",".join(["crash-points", "full-disks", *kinds]), metavar="KIND,...",
                        help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    chosen, draw, table = args.only.split(","), random.Random(args.seed), []
    os.environ["OMP_NUM_THREADS"] = "1"

    def report(name: str, outcomes: list[str], started: float) -> None:
        bad = [outcome for outcome in outcomes if outcome]
        table.append(f"{name:32} {len(outcomes):8} {len(outcomes) - len(bad):8} {time.perf_counter() - started:8.0f}")
        print(table[-1], *bad[:10], sep="\n    ", flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        place = Workplace(folder)
        print(f"{'attempts':32} {'made':>8} {'as due':>8} {'seconds':>8}")
        for kind in COMMANDS:
            started, undisturbed = time.perf_counter(), place.undisturbed(kind)
            again = place.run(f"{command(kind)} --output again/{kind}")
            place.usual[kind] = again.seconds
            report(f"{kind}: the same seed twice", [difference(place.folder / "again" / kind, undisturbed)], started)
        for kind in COMMANDS:
            share = 5 if kind == "pair" else 2  # the two scripts share what is asked for; two processes on one run come on top
            for name, attempt in (("crash-points", crash_point), ("full-disks", full_disk_point)):
                if name in chosen and (kind, name) != ("pair", "full-disks"):
                    started, outcomes = time.perf_counter(), []
                    while None not in outcomes:
                        points = range(len(outcomes) + 1, len(outcomes) + 9)
                        outcomes += pool.map(partial(attempt, place, kind), points)
                    report(f"{kind}: {name} (all)", [outcome for outcome in outcomes if outcome is not None], started)
            for name, numbers in (("kills", [signal.SIGKILL]), ("signals", [signal.SIGINT, signal.SIGTERM])):
                if name in chosen:
                    started, count = time.perf_counter(), getattr(args, name) // share
                    attempts = [(numbers[index % len(numbers)], draw.random()) for index in range(count)]
                    report(f"{kind}: {name}", list(pool.map(lambda attempt: interruption(place, kind, *attempt), attempts)),
                           started)
            good = (place.undisturbed(kind) / "last.pt").read_bytes()
            for name, damage in (("flips", flip), ("truncations", truncate)):
                if name in chosen and kind != "pair":
                    started = time.perf_counter()
                    outcomes = [corrupted(good, place.folder / "damaged.pt", partial(damage, draw))
                                for _ in range(getattr(args, name) // share)]
                    report(f"{kind}: {name} of last.pt", outcomes, started)
    print("", f"{'attempts':32} {'made':>8} {'as due':>8} {'seconds':>8}", *table, sep="\n")
    sys.exit(any(line.split()[-3] != line.split()[-2] for line in table))


if __name__ == "__main__":
    main()
