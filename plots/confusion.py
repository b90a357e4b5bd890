"""Draws the confusion matrix of a run, at its end: confusion.png."""
import io
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from diagnostics.classes import Confusion
from rundir.terminal import shortened

MOST = 100  # classes that can be told apart on a page
WRITTEN = 20  # classes up to which a cell has its number
DPI = 120
CHARACTERS = 24  # of a class's name


def picture(confusion: Confusion, title: str) -> bytes:
    """A PNG: the shares of each true class's images, and for few classes their numbers; 0 for a class without images."""
    names = [shortened(name, CHARACTERS) for name in confusion.names]
    classes, images = len(names), confusion.labels[:, None]
    shares = np.where(images > 0, 100 * confusion.counts / np.maximum(images, 1), 0.0)
    side = min(1.5 + 0.35 * classes, 9)  # inches, of the matrix
    points = min(8.0, 0.75 * 72 * side / classes)
    margin = 0.4 + max(map(len, names)) * 0.6 * points / 72  # around the names; a layout engine would draw everything twice
    width, height, content = margin + side + 1, margin + side + 0.4, io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False, "font.size": 8}):
        warnings.simplefilter("ignore")  # of a glyph that the font lacks
        figure = Figure(figsize=(width, height), dpi=DPI)
        axis = figure.add_axes((margin / width, margin / height, side / width, side / height))
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        figure.text(0.1 / width, 1 - 0.25 / height, title, fontsize=9)
        axis.set(xlabel="predicted class", ylabel="true class")
        axis.set_xticks(range(classes), names, rotation=90, fontsize=points)
        axis.set_yticks(range(classes), names, fontsize=points)
        scale = figure.add_axes(((margin + side + 0.15) / width, margin / height, 0.12 / width, side / height))
        figure.colorbar(image, cax=scale, label="% of the true class's images")
        if classes <= WRITTEN:
            for (row, column), count in np.ndenumerate(confusion.counts):
                colour = "white" if shares[row, column] > 50 else "black" if count else "#AAAAAA"
                axis.text(column, row, str(count), ha="center", va="center", fontsize=points, color=colour)
        figure.savefig(content, format="png")
    return content.getvalue()
