"""benchmarks.latency on a small run: what it prints, its rows, and what it does without ONNX Runtime."""
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from command import one_line
from exporting import needs_onnx

from benchmarks import latency, peak_memory, table

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def benchmark(capsys, monkeypatch, *arguments):
    """Exit code, stdout and stderr of python -m benchmarks.latency."""
    monkeypatch.setattr(sys, "argv", ["latency", *map(str, arguments)])
    code = 0
    try:
        runpy.run_module("benchmarks.latency", run_name="__main__")
    except SystemExit as leave:
        code = leave.code
    return (code, *capsys.readouterr())


def engines(out):
    return set(re.findall(r"^run, (.*?), threads \d", out, re.MULTILINE))


@needs_onnx
def test_quick_prints_every_engine_and_writes_nothing(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    code, out, err = benchmark(capsys, monkeypatch, "--quick", "--device", "cpu", trained)
    assert code == 0, err
    assert engines(out) == {"eager", "onnxruntime fp32", "onnxruntime int8"} and not list(tmp_path.iterdir()), out


def test_without_onnxruntime_there_is_pytorch(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, err = benchmark(capsys, monkeypatch, "--quick", "--device", "cpu", trained)
    assert code == 0 and engines(out) == {"eager"} and "without ONNX Runtime" in out, err


def test_a_directory_that_is_no_run_is_one_line(tmp_path, capsys, monkeypatch):
    code, _, err = benchmark(capsys, monkeypatch, "--quick", "--device", "cpu", tmp_path)
    assert "best.pt" in one_line(code, 5, err)


def test_rows_add_up(monkeypatch):
    monkeypatch.setattr(latency, "BLOCK_S", 0.001)
    sizes, before = [], torch.get_num_threads()
    entered = [table.Row(call=lambda images: sizes.append((torch.get_num_threads(), len(images))), columns={"threads": threads},
                         images=np.zeros((max(latency.BATCHES), 8, 8, 3), np.uint8), ms=[],
                         rates={size: [] for size in latency.BATCHES}) for threads in (1, 2)]
    rows = list(latency.measure(entered, repeats=2))
    torch.set_num_threads(before)
    assert set(sizes) == {(threads, size) for threads in (1, 2) for size in (1, *latency.BATCHES)}
    assert [len(each.ms) for each in entered] == [2 * latency.CALLS] * 2 and [row.threads for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row.ms_median <= row.ms_p95 and row.best_batch in (1, *latency.BATCHES) and row.images_per_s > 0


def test_the_memory_is_that_of_another_process(trained):
    """The one that asks holds half a gigabyte more, which a process would inherit in getrusage's eyes."""
    ballast = bytearray(b"x") * 500_000_000
    measured = latency.memory(trained / "best.pt")
    assert 50 < measured["process_mb"] < peak_memory.peak_mb() - len(ballast) / 2e6 and 0 < measured["peak_mb"] < 200
