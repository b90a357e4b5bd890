"""A code block of docs/runtimes.md as a process, for benchmarks.runtimes: python runtime_worker.py BLOCK PACKAGE FILE ...

It runs in the environment of the runtime, with nothing of this project.  It opens FILE, predicts the images one at a time, and
then measures whenever a line arrives on stdin.  Each step is answered by a line of JSON on stdout.
"""
import importlib.metadata
import json
import os
import sys
import time

import numpy as np


def main(block: str, package: str, path: str, images: str, dtype: str, shape: str, logits: str, seconds: str, calls: str) -> None:
    """images: raw file of `dtype` and `shape`.  logits: the raw float32 file to write.  seconds: limit of the predictions."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the runtime prints

    def answer(**values):
        print(json.dumps(values), file=answers)

    try:
        answer(version=importlib.metadata.version(package))
        data = np.fromfile(images, dtype).reshape([int(side) for side in shape.split(",")])
        with open(block) as file:
            opening, running = file.read().split("\n\n")
        code, space = compile(running, "block", "exec"), {"path": path, "images": data[:1]}
        exec(opening, space)
        answer(opens="yes")
        found, end = [], time.monotonic() + float(seconds)
        for index in range(len(data)):
            space["images"] = data[index:index + 1]
            exec(code, space)
            found.append(np.array(space["logits"], np.float32))
            if time.monotonic() > end:
                break
        np.concatenate(found).tofile(logits)
        answer(images=len(found))
        space["images"] = data[:1]
        for _ in sys.stdin:
            times = []
            for _ in range(int(calls)):
                start = time.perf_counter()
                exec(code, space)
                times.append(time.perf_counter() - start)
            answer(ms=1000 * float(np.median(times[len(times) // 3:])))  # the first ones warm the caches
    except Exception as failure:  # each runtime has its own exception types
        answer(reason=f"{type(failure).__name__}: {failure}")


if __name__ == "__main__":
    main(*sys.argv[1:])
