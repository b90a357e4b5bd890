"""benchmarks.latency on a small run: what it prints, its rows and figure, and what it does without ONNX Runtime."""
import csv
import sys

import pytest
from command import one_line
from exporting import needs_onnx, trained_run
from PIL import Image

from benchmarks import latency, peak_memory, table


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("latency")


@pytest.fixture
def trained(place, capsys):
    return trained_run(place, capsys)


def benchmark(capsys, monkeypatch, *arguments):
    """Exit code, stdout and stderr of python -m benchmarks.latency."""
    capsys.readouterr()
    monkeypatch.setattr(latency, "BLOCK_S", 0.001)
    monkeypatch.setattr(sys, "argv", ["latency", *map(str, arguments)])
    code = 0
    try:
        latency.main()
    except SystemExit as leave:
        code = leave.code
    return (code, *capsys.readouterr())


def engines(out):
    return {line[17:34].strip() for line in out.splitlines() if line.startswith("run ") and "threads" not in line}


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


def test_what_lies_on_the_front():
    points = [(3, 50), (1, 40), (2, 45), (2, 44), (4, 49), (5, 60), (0.5, 40)]
    assert latency.front(points) == [(0.5, 40), (2, 45), (3, 50), (5, 60)]


def test_rows_become_a_table_and_a_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "BLOCK_S", 0.001)
    rows = table.Rows(table.parser("", "").parse_args(["--output", str(tmp_path)]), "latency", "cpu")
    entered = (("teacher", "eager", 60.0), ("student", "compiled", 55.0), ("student", "onnxruntime int8", None))
    for run, engine, accuracy in entered:
        for threads in (1, 2):
            sizes = []
            contender = latency.Contender(
                lambda images, sizes=sizes: sizes.append(len(images)), 8, threads, hardware="a CPU", processor="A",
                torch="2", onnxruntime="1", run=run, network="net", parameters=5, flops=7, engine=engine, file_mb=1.0,
                process_mb=None, peak_mb=None, accuracy=accuracy, repeats=2)
            before = latency.torch.get_num_threads()
            contender.warm_up()
            contender.take_turn()
            contender.take_turn()
            latency.torch.set_num_threads(before)
            assert len(contender.single_s) == 2 * latency.CALLS and set(sizes) == {1, *latency.BATCHES}
            rows.add(contender.row())
    latency.draw(rows.path)
    found = list(csv.DictReader(rows.path.read_text().splitlines()))
    assert len(found) == 6 and all(float(row["ms_median"]) <= float(row["ms_p95"]) for row in found)
    assert all(int(row["best_batch"]) in (1, *latency.BATCHES) for row in found)
    assert Image.open(rows.path.with_suffix(".png")).width > 600


def test_the_memory_is_that_of_another_process(trained):
    """The one that asks holds half a gigabyte more, which a process would inherit in getrusage's eyes."""
    ballast = bytearray(b"x") * 500_000_000
    measured = latency.memory(trained / "best.pt")
    assert 50 < measured["process_mb"] < peak_memory.peak_mb() - len(ballast) / 2e6 and 0 < measured["peak_mb"] < 200
