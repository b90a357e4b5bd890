"""What all benchmarks share: their flags, the name of the hardware, the wait for it, and the CSV."""
import csv
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from cli import flag_types
from cli.flag_types import positive
from cli.options import debug_flag
from rundir.errors import USAGE, Failure, Parser, Unwritable
from rundir.files import make_directory

RESULTS = Path(__file__).resolve().parent / "results"
TINY = "tiny"  # what --tiny makes of --quick


def parser(description: str, quick: str, cases=(), tiny: bool = False) -> Parser:
    """The flags of a benchmark.  quick: what --quick does.  cases: the names that --case takes.  tiny: whether it has --tiny."""
    made = Parser(description=description.partition("\n")[0], allow_abbrev=False)
    add = made.add_argument
    add("--quick", action="store_true", help=f"{quick}; nothing is written without --output")
    if tiny:
        add("--tiny", dest="quick", action="store_const", const=TINY, help="one repeat of the least, to try the command itself")
    device_flag(add)
    add("--output", type=Path, metavar="DIR", help="where the CSV goes; default: benchmarks/results")
    made.set_defaults(case=None, seconds=None)
    if cases:
        add("--case", nargs="+", choices=cases, metavar="NAME", help=f"of {', '.join(cases)}; default: what suits the device")
        add("--seconds", type=positive, metavar="N", help="begin no further case after so long")
    debug_flag(add)
    return made


def device_flag(add) -> None:
    add("--device", type=flag_types.device, default="auto", help="auto, cpu, cuda or cuda:N; default: %(default)s")


def device(name: str) -> torch.device:
    """What --device names.  Failure USAGE: no such GPU."""
    found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise Failure(USAGE, f"no such GPU here (--device {name})", "use --device cpu, or check the driver")
    return found


def repeats(args, quick: int, whole: int) -> int:
    return 1 if args.quick == TINY else quick if args.quick else whole


def chosen(args, usual) -> Iterator[str]:
    """The names that --case gives, or those of `usual`, as long as --seconds last."""
    end = time.monotonic() + (args.seconds or float("inf"))
    names = list(args.case or usual)
    while names and time.monotonic() < end:
        yield names.pop(0)
    if names:
        print(f"not begun, for want of time: {', '.join(names)}")


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def short(device: torch.device) -> str:
    """The hardware as a part of a file's name."""
    return hardware(device) if device.type == "cuda" else "cpu"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Rows:
    """Rows of one kind of dataclass.  Each is appended to <what>-<where>.csv as it comes, so a benchmark that is cut off leaves
    what it had; the first one replaces the file of an earlier run.

    where: in words, of which the file's name has the letters and digits.  args: of `parser`.
    """

    def __init__(self, args, what: str, where: str):
        folder = args.output or (None if args.quick else RESULTS)
        self.path = folder and folder / f"{what}-{re.sub('[^a-z0-9]+', '-', where.lower()).strip('-')}.csv"
        self.all = []
        if self.path:  # before anything is measured
            make_directory(self.path.parent)

    def add(self, row) -> None:
        if self.path:
            try:
                with open(self.path, "a" if self.all else "w", newline="", encoding="utf-8") as file:
                    table = csv.DictWriter(file, asdict(row), lineterminator="\n")
                    if not self.all:
                        table.writeheader()
                    table.writerow(asdict(row))
            except OSError as failure:
                raise Unwritable(failure.errno, failure.strerror, str(self.path)) from failure
        self.all.append(row)

    def close(self, draw=None) -> None:
        """Draw all rows into a PNG beside the CSV, by `draw(rows, path)`; say where both are."""
        if self.path and self.all:
            if draw:
                draw(self.all, self.path.with_suffix(".png"))
            print(self.path)
