"""Exported files in the runtimes of docs/runtimes.md: which of them open them, with which predictions, and in what time.

    python -m benchmarks.runtimes runs/demo/v2           -> benchmarks/results/runtimes-cpu.csv, and the table of docs/runtimes.md
    python -m benchmarks.runtimes --quick runs/demo/v2   100 images, one round; writes nothing

The code is read from the page: each section has the files to try, an install line, and a block.  A block gets `path`, and
`images` in the input format of the file; what is above its blank line opens the file, what is below leaves `logits`.
Packages that this Python lacks are installed in environments of their own in runs/runtimes.

Each file runs in a process of its own, on one core with one thread, with one image per call.  same: equal predictions as ONNX
Runtime on the same file, or on best-fp32.onnx for other formats.  ms is of one call, the median over rounds of medians; ratio is
the median over rounds of the time relative to that of ONNX Runtime in the same round.
"""
import csv
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from threading import Timer
from typing import NamedTuple

import numpy as np
import torch

import models
from benchmarks import table
from deploy import check, runtime, writers
from rundir import errors
from rundir.files import write_atomic
from rundir.run_directory import processor

ROOT = Path(__file__).resolve().parent.parent
PAGE, WORKER, ENVIRONMENTS = ROOT / "docs" / "runtimes.md", ROOT / "benchmarks" / "runtime_worker", ROOT / "runs" / "runtimes"
BEGIN, END = "<!-- made by benchmarks.runtimes -->\n", "<!-- end -->\n"
REFERENCE = "ONNX Runtime"
ANSWER_S, PREDICT_S = 300, 60  # limits of a step of a worker, and of its predictions
ROUNDS, CALLS = 7, 60
FORMATS = {suffix: name for name, (suffix, _) in writers.FORMATS.items()}


class Section(NamedTuple):
    """A runtime of the page.  files: names of exported files.  language: python or js."""
    name: str
    files: list[str]
    install: str
    language: str
    code: str


def sections(page: str) -> list[Section]:
    found = []
    for part in page.split("\n## ")[1:]:
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        if files := re.search(r"^Files: (.*)$", part, re.MULTILINE):
            (_, install), (language, code) = fences
            found.append(Section(part.splitlines()[0], re.findall("`(.*?)`", files[1]), install.strip(), language, code))
    return found


def packages(install: str) -> list[str]:
    """The requirements of an install line, such as numpy<2."""
    words = shlex.split(install)
    return [word for word in words[words.index("install") + 1:] if word[0].isalpha()]


def environment(section: Section) -> Path:
    """The folder with the packages of a section: that of this Python if it has them, or one that is made once.

    RuntimeError: the installation failed.
    """
    installed = {each.name.lower() for each in importlib.metadata.distributions()}
    if section.language == "python" and set(map(str.lower, packages(section.install))) <= installed:
        return Path(sys.prefix)
    folder = ENVIRONMENTS / re.sub("[^a-z0-9]+", "-", section.name.lower()).strip("-")
    marker = folder / "installed"
    if not marker.exists() or marker.read_text() != section.install:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        made = subprocess.run(["sh", "-ec", section.install], cwd=folder, env=variables(folder), capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(next((line for line in made.stderr.splitlines() if "ERR" in line), "the installation failed"))
        marker.write_text(section.install)
    return folder


def variables(folder: Path) -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def export(checkpoint: Path, data, path: Path) -> np.ndarray:
    """Write an exported file, such as best-int8.onnx or best-fp32-float.pt2.  Returns the test images in its input format."""
    _, precision, *floats = path.stem.split("-")
    module = writers.from_checkpoint(checkpoint, *floats or ["uint8"], precision)
    writers.export(module, FORMATS[path.suffix], precision, check.calibration(data), path)
    return runtime.as_input(data.test.images.numpy(), module.input)


class Worker:
    """A block that runs a file in a process of its own, until it fails or is stopped.

    row: its columns so far.  logits: float32 (images, C).  times: ms of a call, by round.
    """

    def __init__(self, section: Section, path: Path, images: np.ndarray, folder: Path, columns: dict):
        self.row = table.Row(**columns, runtime=section.name, version=None, file=path.name, precision=path.stem.split("-")[1],
                             bytes=path.stat().st_size, opens="no", same=None, images=None, accuracy=None, ms=None, ratio=None,
                             reason=None)
        self.times, self.process = [], None
        try:
            place = environment(section)
        except RuntimeError as failure:
            self.row.reason = shorten(str(failure))
            return
        images.tofile(folder / "images")
        package = re.split("[<>=]", packages(section.install)[0])[0]
        self.process = subprocess.Popen(
            [*command(section, place, folder), package, path, folder / "images", images.dtype.name,
             ",".join(map(str, images.shape)), folder / "logits", str(PREDICT_S), str(CALLS)],
            cwd=place if section.language == "js" else folder, env=variables(place), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}))
        for _ in ("version", "opens", "images"):
            self.read()
        if not self.row.reason:
            self.logits = np.fromfile(folder / "logits", np.float32).reshape(self.row.images, -1)

    def read(self) -> None:
        """The next answer of the process, to the columns; reason if there is none."""
        if self.row.reason:
            return
        timer = Timer(ANSWER_S, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            vars(self.row).update(json.loads(line))
        else:
            code = self.process.wait()
            self.row.reason = f"took over {ANSWER_S} s" if code == -signal.SIGKILL else f"ended abnormally ({code})"
        self.row.reason = self.row.reason and shorten(self.row.reason)

    def measure(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.read()
        return self.row.ms

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()


def command(section: Section, place: Path, folder: Path) -> list:
    """The start of the command of a worker: its program and its block."""
    if section.language == "python":
        (folder / "block").write_text(section.code)
        return [place / "bin" / "python", "-P", WORKER.with_suffix(".py"), folder / "block"]
    program = WORKER.with_suffix(".mjs").read_text()
    for name, code in zip(("OPENING", "RUNNING"), section.code.split("\n\n")):
        program = program.replace(f"{name}\n", code)
    (place / "worker.mjs").write_text(program)
    return ["node", place / "worker.mjs"]


def shorten(reason: str) -> str:
    """One line of at most 120 characters without paths."""
    return re.sub(r"\S*/\S*/\S*", "...", " ".join(reason.split()))[:120]


def result_table(rows: list[dict]) -> str:
    """The table of the page, from the rows of the CSV."""
    lines = ["| runtime | version | file | predictions as in ONNX Runtime | accuracy (%) | one image (ms) | times ONNX Runtime |",
             "|---|---|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row["runtime"], row["version"], f"`{row['file']}`"]
        if row["reason"]:
            cells += [f"no: {row['reason'].replace('|', '/')}", "", "", ""]
        else:
            cells += [f"{row['same']} of {row['images']}", f"{float(row['accuracy']):.2f}", f"{float(row['ms']):.3f}",
                      f"{float(row['ratio']):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def start(section: Section, path: Path, images: np.ndarray, labels: np.ndarray, columns: dict, references: dict) -> Worker:
    """A worker whose predictions are compared.  references: the workers of ONNX Runtime by file."""
    folder = path.parent / f"{section.name} {path.name}"
    folder.mkdir()
    worker = Worker(section, path, images, folder, columns)
    if not worker.row.reason:
        if section.name == REFERENCE:
            references[path.name] = worker
        worker.reference = references.get(path.name, references.get("best-fp32.onnx"))
        if worker.reference is None:
            worker.row.reason = f"{REFERENCE} did not run, with which it would be compared"
            return worker
        predictions, count = worker.logits.argmax(1), worker.row.images
        worker.row.same = int(np.sum(predictions == worker.reference.logits[:count].argmax(1)))
        worker.row.accuracy = round(100 * float(np.mean(predictions == labels[:count])), 4)
    return worker


def main(args) -> None:
    checkpoint, page = Path(args.run) / "best.pt", PAGE.read_text(encoding="utf-8")
    data = check.data_of_run(checkpoint, models.read(checkpoint)["classes"])
    labels, inputs, references, workers = data.test.labels.numpy(), {}, {}, []
    columns = {"hardware": table.hardware(torch.device("cpu")), "processor": processor()}
    found = table.Rows(args, "runtimes", "cpu", "runtime version file same images accuracy ms ratio reason")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for section in sections(page):
            for path in [Path(folder) / name for name in section.files]:
                if path not in inputs:
                    inputs[path] = export(checkpoint, data, path)[:100 if args.quick else None]
                workers.append(start(section, path, inputs[path], labels, columns, references))
                stack.callback(workers[-1].stop)
                found.add(workers[-1].row)
        working = [worker for worker in workers if not worker.row.reason]
        for _ in range(1 if args.quick else ROUNDS):
            for worker in [worker for worker in working if not worker.row.reason]:
                worker.times.append(worker.measure())
    found.all.clear()  # again, with times
    for worker in workers:
        if not worker.row.reason:
            worker.row.ms = round(median(worker.times), 4)
            worker.row.ratio = round(median(np.divide(worker.times, worker.reference.times)), 3)
        found.add(worker.row)
    if found.path and found.path.parent == table.RESULTS:
        rows = list(csv.DictReader(found.path.read_text(encoding="utf-8").splitlines()))
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        write_atomic(PAGE, f"{before}{BEGIN}{result_table(rows)}{END}{after}".encode())


if __name__ == "__main__":
    flags = table.parser(__doc__, "100 images, one round")
    flags.add_argument("run", metavar="RUN", help="a run's directory")
    errors.run(main, flags.parse_args())
