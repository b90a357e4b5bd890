"""Flags, hardware names, printed rows and CSV files of the benchmarks."""
import platform
import re
from argparse import ArgumentTypeError
from pathlib import Path
from statistics import median
from threading import Lock
from types import SimpleNamespace

import torch

from cli import flag_types
from cli.options import debug_flag
from rundir.errors import Parser
from rundir.files import as_csv, make_directory, write_atomic

Row = SimpleNamespace  # its attributes are the columns
RESULTS = Path(__file__).resolve().parent / "results"
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of CIFAR-100
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parser(description: str, quick: str = "", cases=(), tiny: bool = False) -> Parser:
    """The flags of a benchmark.

    quick: what --quick does; without it there is no such flag, and --output is required.  cases: the choices of --case.
    tiny: whether there is --tiny.
    """
    made = Parser(description=description.partition("\n")[0], allow_abbrev=False)
    made.set_defaults(quick=False, tiny=False, case=None)
    add = made.add_argument
    if quick:
        add("--quick", action="store_true", help=f"{quick}; nothing is written without --output")
    if tiny:
        add("--tiny", action="store_true", help="one repeat of the smallest case, to try the command itself")
    add("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N; default: %(default)s")
    add("--output", type=Path, metavar="DIR", required=not quick,
        help="folder of the CSV, or its name" + "; default: benchmarks/results" * bool(quick))
    if cases:
        add("--case", nargs="+", choices=cases, metavar="NAME", help=f"of {', '.join(cases)}; default: what suits the device")
    debug_flag(add)
    return made


def device(name: str) -> torch.device:
    """The argparse type of --device: one that is there."""
    name = flag_types.device(name)
    found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ArgumentTypeError(f"no such GPU here ({name}). use --device cpu, or check the driver")
    return found


def repeats(args, quick: int, whole: int) -> int:
    return 1 if args.tiny else quick if args.quick else whole


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def short(device: torch.device) -> str:
    """The hardware in a file name."""
    return hardware(device) if device.type == "cuda" else "cpu"


def versions(device: torch.device, *packages) -> dict:
    """The first columns of a row: the hardware, and the version of each package."""
    return {"hardware": hardware(device)} | {package.__name__: package.__version__ for package in packages}


def spread(column: str, values, digits: int | None = 3) -> dict:
    """Median, minimum and maximum in `column`, `column`_min and `column`_max; None without values.  digits None: integers."""
    picked = {"": median, "_min": min, "_max": max}
    return {column + end: round(pick(values), digits) if values else None for end, pick in picked.items()}


class Rows:
    """Rows with the same columns in a CSV file, which is written anew with each, so an interrupted benchmark keeps what it had.

    args: of `parser`.  what, where: in the file's name <what>-<where>.csv, unless --output is a file.  show: the columns to
    print, separated by spaces.
    """

    def __init__(self, args, what: str, where: str, show: str = ""):
        self.all, self.show, self.lock = [], show.split(), Lock()
        self.path = args.output or (None if args.quick or args.tiny else RESULTS)
        if self.path and self.path.suffix != ".csv":
            self.path /= f"{what}-{re.sub('[^a-z0-9]+', '-', where.lower()).strip('-')}.csv"
        if self.path:  # before anything is measured
            make_directory(self.path.parent)
            print(f"rows -> {self.path}", flush=True)

    def add(self, row) -> None:
        """Print and write a row; several threads may."""
        columns = vars(row)
        with self.lock:
            self.all.append(row)
            if self.show:
                print(*(f"{name} {columns[name]}" if isinstance(columns[name], int | float) else str(columns[name] or "-")
                        for name in self.show), sep=", ", flush=True)
            if self.path:
                write_atomic(self.path, as_csv(list(columns), list(map(vars, self.all))))
