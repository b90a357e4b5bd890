"""docs/runtimes.md: its table comes from the CSV, its blocks follow the convention of benchmarks.runtimes, and they run."""
import ast
import csv

import numpy as np
import pytest
import torch
from exporting import needs_onnx
from torch import nn

from benchmarks import runtimes, table
from deploy import options, writers

PAGE = runtimes.PAGE.read_text(encoding="utf-8")
SECTIONS = runtimes.sections(PAGE)
PYTHON = [section for section in SECTIONS if section.language == "python"]
by_name = pytest.mark.parametrize("section", [pytest.param(section, id=section.name) for section in PYTHON])


def test_the_table_comes_from_the_csv():
    with open(table.RESULTS / "runtimes-cpu.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert PAGE.split(runtimes.BEGIN)[1].split(runtimes.END)[0] == runtimes.result_table(rows)
    assert [(row["runtime"], row["file"]) for row in rows] == [(each.name, name) for each in SECTIONS for name in each.files]


def test_sections_are_complete():
    assert len({section.name for section in SECTIONS}) == len(SECTIONS) == PAGE.count("\n## ")
    assert SECTIONS[0].name == runtimes.REFERENCE and "best-fp32.onnx" in SECTIONS[0].files
    for section in SECTIONS:
        assert runtimes.packages(section.install) and "\n" not in section.install and section.language in ("python", "js")
        for name in section.files:
            stem, suffix = name.split(".")
            _, precision, *floats = stem.split("-")
            assert f".{suffix}" in runtimes.FORMATS and precision in options.PRECISIONS and floats in ([], ["float"])


@by_name
def test_blocks_open_path_and_leave_logits(section):
    opening, running = (ast.parse(part) for part in section.code.split("\n\n"))
    assert "path" in {node.id for node in ast.walk(opening) if isinstance(node, ast.Name)}
    assert "images" in {node.id for node in ast.walk(running) if isinstance(node, ast.Name)}
    stored = {node.id for node in ast.walk(running) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert "logits" in stored


@needs_onnx
def test_the_block_of_onnx_runtime_agrees(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net.info = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "image_size": 8, "stored_size": 8, "model": "tiny"}
    module = writers.Deployed(net, "uint8").eval()
    writers.export(module, "onnx", "fp32", None, tmp_path / "best-fp32.onnx")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    space = {"path": str(tmp_path / "best-fp32.onnx"), "images": images}
    exec(SECTIONS[0].code, space)
    with torch.no_grad():
        np.testing.assert_allclose(space["logits"], module(torch.from_numpy(images))[1], atol=1e-5)


@pytest.mark.parametrize("code, opens, reason", [
    ("scale = 2\n\nlogits = images.reshape(1, -1)[:, :3] * scale\n", "yes", None),
    ("scale = missing\n\nlogits = images\n", "no", "NameError: name 'missing' is not defined"),
    ("import os\n\nos.abort()\n", "yes", "ended abnormally")])
def test_workers_answer_or_say_why_not(code, opens, reason, tmp_path):
    path = tmp_path / "best-fp32.onnx"
    path.write_bytes(b"")
    images = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
    section = runtimes.Section("any", [path.name], "python -m pip install numpy", "python", code)
    worker = runtimes.Worker(section, path, images, tmp_path, {})
    assert (worker.row.opens, worker.row.version) == (opens, np.__version__)
    assert worker.row.reason is None if reason is None else worker.row.reason.startswith(reason)
    if reason is None:
        assert worker.measure() > 0
        np.testing.assert_array_equal(worker.logits, 2 * images.reshape(4, -1)[:, :3])
    worker.stop()


def test_reasons_are_one_line_without_paths():
    assert runtimes.shorten("Error: no\n file /home/user/best.onnx here" + 200 * "x") == "Error: no file ... here" + 97 * "x"
