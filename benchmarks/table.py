"""What all benchmarks share: their flags, the name of the hardware, the wait for it, and the CSV."""
import argparse
import platform
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch

from training.files import as_csv

ROOT = Path(__file__).resolve().parent.parent


def flags(description: str, quick: str):
    """--quick, which does what `quick` says and writes nothing, and --device."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help=f"{quick}; nothing is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser.parse_args()


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write(rows: list, what: str, where: str) -> Path:
    """Rows, one kind of dataclass, to benchmarks/results/<what>-<where>.csv; `where` in lower case and hyphens."""
    path = ROOT / "benchmarks" / "results" / f"{what}-{re.sub('[^a-z0-9]+', '-', where.lower()).strip('-')}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_csv([field.name for field in fields(rows[0])], list(map(asdict, rows))))
    print(path)
    return path


def short(device: torch.device) -> str:
    """The hardware in a file's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
