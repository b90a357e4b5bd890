"""Runtimes beside ONNX Runtime in which export.py --check runs an .onnx file."""
import importlib.metadata
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np

from deploy.runtime import Model, quiet, require
from rundir.errors import DIVERGED, USAGE, Failure, first_line

WEB = Path(__file__).parent / "web"


def openvino_model(path: Path):
    import openvino
    # By default it computes in bf16 where the processor has it.
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: model(images)["logits"]


def opencv_net(path: Path):
    import cv2
    net = cv2.dnn.readNetFromONNX(str(path))

    def run(images):
        net.setInput(images, "images")
        return net.forward("logits")

    return run


def onnxruntime_web(path: Path):
    """onnxruntime-web in Node.js.  All images in one call: a start takes seconds."""
    def run(images):
        command = ["node", WEB / "run.mjs", path, images.dtype.name, ",".join(map(str, images.shape))]
        ended = subprocess.run(command, input=images.tobytes(), capture_output=True)
        if ended.returncode:
            lines = ended.stderr.decode(errors="replace").splitlines()
            raise RuntimeError(next((line for line in lines if "Error" in line), f"exit code {ended.returncode}"))
        return np.frombuffer(ended.stdout, np.float32).reshape(len(images), -1)

    return run


RUNTIMES = {"openvino": openvino_model, "opencv": opencv_net, "web": onnxruntime_web}
PACKAGES = {"openvino": "openvino", "opencv": "cv2"}  # Python's; `web` is npm's


def version(name: str) -> str:
    """Name and version of the installed package.  Failure USAGE: there is none."""
    if name in PACKAGES:
        require(PACKAGES[name])
        return version_of(PACKAGES[name])
    package = WEB / "node_modules" / "onnxruntime-web" / "package.json"
    if not package.exists() or not shutil.which("node"):
        raise Failure(USAGE, "missing onnxruntime-web or Node.js", "npm ci --prefix deploy/web")
    return f"onnxruntime-web {json.loads(package.read_text())['version']}"


@cache
def version_of(module: str) -> str:
    """Name and version of the distribution of an importable module, such as `onnxruntime 1.32.0`."""
    package = module.partition(".")[0]
    distributions = importlib.metadata.packages_distributions().get(package)
    if not distributions:  # such as an OpenCV built from source
        return f"{package} {sys.modules[package].__version__}"
    return f"{distributions[0]} {importlib.metadata.version(distributions[0])}"


def logits(name: str, path: Path, metadata: dict, images: np.ndarray) -> np.ndarray:
    """float32 (N, C) of images uint8 (N, H, W, 3).  Failure DIVERGED: the runtime cannot run the file."""
    try:
        with quiet():
            run, size = RUNTIMES[name](path), len(images) if name == "web" else None
            return Model(metadata | {"largest_batch": size}, lambda batch: [run(batch)] * 2)(images)[1]
    except Exception as failure:  # each runtime has its own exception types
        raise Failure(DIVERGED, f"{name} cannot run the exported file ({path.name}: {first_line(failure)})",
                      f"nothing was written; leave {name} out of --check") from failure
