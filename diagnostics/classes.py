"""Accuracy by class and chance, from a confusion matrix.  Imports no torch."""
from typing import NamedTuple

import numpy as np


class Confusion(NamedTuple):
    """The images of a split by class.  names: of the C classes.  counts: int64 (C, C), by true and predicted class."""
    names: list[str]
    counts: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int64 (C,): the images of each class, which may have none."""
        return self.counts.sum(1)

    @property
    def predicted(self) -> np.ndarray:
        """int64 (C,): the images predicted as each class."""
        return self.counts.sum(0)

    @property
    def accuracies(self) -> list[float | None]:
        """Accuracy (%) on the images of each class; None without an image."""
        return [100 * int(right) / int(images) if images else None for right, images in zip(self.counts.diagonal(), self.labels)]

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the accuracies over the classes that have images."""
        found = [accuracy for accuracy in self.accuracies if accuracy is not None]
        return sum(found) / len(found)

    @property
    def exchanged(self) -> dict[str, str]:
        """Class -> as which more than half of its images are predicted, if that is another class whose own images are not mostly
        predicted as itself: as with a wrong order, and not where classes are merely confused, or all predicted as one."""
        most = self.counts.argmax(1).tolist()
        return {self.names[k]: self.names[other] for k, other in enumerate(most)
                if other != k and most[other] != other and 2 * self.counts[k, other] > self.labels[k]}

    @property
    def chance(self) -> float:
        """Accuracy (%) of the constant prediction of the largest class."""
        return 100 * int(self.labels.max()) / int(self.labels.sum())


def effective_number(images) -> float:
    """The effective number of classes of a histogram (C,): the exponential of its entropy, from 1 to C."""
    shares = np.asarray(images, dtype=float) / np.sum(images)
    return float(np.exp(-np.sum(shares * np.log(shares, where=shares > 0, out=np.zeros_like(shares)))))
