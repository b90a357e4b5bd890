"""Peak memory of this process, which opens a network in its runtime and predicts one image, on a CPU.

    python -m benchmarks.peak_memory runs/v2-s42/best.pt        -> megabytes of the process, and of them those of the network
"""
import re
import sys
from pathlib import Path

import numpy as np

from deploy import runtime


def peak_mb() -> float:
    """Of this program's own memory; getrusage would count what the process was before it ran this program."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1e3


if __name__ == "__main__":
    runtime.require("onnxruntime" if sys.argv[1].endswith(".onnx") else "models")  # before the network is read
    before = peak_mb()
    model = runtime.load(sys.argv[1])
    model(np.zeros((1, *2 * [model.metadata["image_size"]], 3), np.uint8))
    print(round(peak_mb(), 1), round(peak_mb() - before, 1))
