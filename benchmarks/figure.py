"""The picture of docs/performance.md, from the CSV files of the benchmarks.

    python -m benchmarks.figure               docs/performance.png

Points are medians over the repeats, lines go from the slowest repeat to the fastest; the axes are logarithmic.
"""
import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from benchmarks.table import RESULTS
from rundir import errors

# Title -> file, values of columns that select rows, and the column that is drawn.
PANELS = {
    "augmentation, 32 pixels (images/s)": ("augmentation", {"stage": "pipeline", "batch_size": "128"}, "images_per_s"),
    "augmentation, 224 pixels (images/s)": ("augmentation-photographs", {}, "images_per_s"),
    "step, v2_tiny to v2_pico (times the plain loop)": ("step", {"case": "v2_tiny to v2_pico"}, "times_base"),
    "JPEG, 12 megapixels to 256 pixels (ms)": ("decoding", {"megapixels": "12.0"}, "ms"),
}


def rows(path: Path, chosen: dict) -> list[dict]:
    """The rows with these values, of the hardware of the first."""
    with open(path, newline="") as file:
        found = [row for row in csv.DictReader(file) if all(row[name] == value for name, value in chosen.items())]
    return [row for row in found if row["hardware"] == found[0]["hardware"]]


def main(args) -> None:
    panels = {title: rows(RESULTS / f"{name}-cpu.csv", chosen) for title, (name, chosen, *_) in PANELS.items()}
    figure = Figure(figsize=(8.6, 0.9 + 0.22 * sum(map(len, panels.values()))), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=[len(found) for found in panels.values()])
    for axis, (title, found) in zip(axes, panels.items()):
        column = PANELS[title][-1]
        values, low, high = ([float(row[column + end]) for row in found] for end in ("", "_min", "_max"))
        colours = ["#D55E00" if row["contender"].startswith("ours") else "#555555" for row in found]
        axis.hlines(range(len(found)), low, high, colors=colours, linewidth=1)
        axis.scatter(values, range(len(found)), c=colours, s=18, zorder=3)
        axis.set(xscale="log", yticks=range(len(found)), yticklabels=[row["contender"] for row in found],
                 ylim=(len(found) - 0.4, -0.6))
        axis.set_title(f"{title}; {found[0]['hardware']}", loc="left", fontsize=8)
        axis.tick_params(labelsize=7.5)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", linewidth=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output, dpi=150)
    print(args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=RESULTS.parents[1] / "docs/performance.png", metavar="FILE",
                        help="default: docs/performance.png")
    errors.run(main, parser.parse_args())
