"""results/: the study's figures come from its committed tables, and the tables from run directories."""
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import table_of

from diagnostics import alarms
from diagnostics.classes import Confusion
from losses.methods import METHODS
from plots import make_figures
from results.cells import read_sweep

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
SETTINGS = {"0.7", "0.3", "0.22", "4.5", "0.1", "0.2", "1.6", "0.05", "0.31", "0.03"}  # in the text, beside results


def script(name):
    spec = importlib.util.spec_from_file_location("script", RESULTS / name)
    module = sys.modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_come_from_the_tables(tmp_path, monkeypatch):
    """Laid out and not written, which takes longest; their numbers are the committed ones."""
    drawn = []
    monkeypatch.setattr(make_figures, "write_figure", lambda figure, path: (figure.draw_without_rendering(), drawn.append(path)))
    script("ablation-small/figures.py").main(["--output", str(tmp_path)])
    assert drawn == [tmp_path / f"figure{number}" for number in (7, 8)]
    assert (tmp_path / "figure7.csv").read_bytes() == (RESULTS / "ablation-small" / "figure7.csv").read_bytes()


def rows_of(page, header):
    """The cells of the Markdown table with this header, row by row."""
    lines = page[page.index(header):].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(bool, lines)][2:]


def test_the_numbers_of_the_study_come_from_its_tables():
    """Each table is on a page as it is made, and each number with decimals in the text is in one of them, or in figure 7."""
    page = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "STUDY.md", RESULTS / "ablation-small" / "README.md"))
    for name, table in script("ablation-small/study.py").tables().items():
        assert page.count(table) == 1, f"{name} is not as the sweeps have it"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page += "\n" + readme[readme.index("- [STUDY.md]"):readme.index("## Performance")]
    text, tables = ("\n".join(line for line in page.splitlines() if line.startswith("|") == inside) for inside in (False, True))
    tables += "\n".join(f"{float(row[name]):.1f}" for row in table_of(RESULTS / "ablation-small/figure7.csv")
                        for name in ("difference", "accuracy", "kd_accuracy"))
    numbers, known = (set(re.findall(r"\d+\.\d+", part)) for part in (re.sub(r"(arXiv|torch) [\d.]+|`[^`]*`", "", text), tables))
    assert numbers <= known | SETTINGS, sorted(numbers - known - SETTINGS)


def test_the_time_of_the_ablation_is_that_of_its_repeat():
    (row,) = table_of(RESULTS / "ablation-small/repeat/clock.csv")
    minutes = f"{int(row['seconds']) / 60:.0f} minutes"
    assert all(minutes in (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "experiments.sh"))
    runs = [run for sweep in ("recipe", "recipe-long", "high", "high-long", "usual", "findings")
            for cell in read_sweep(RESULTS / "ablation-small/repeat" / sweep).values() for run in cell.runs.values()]
    assert len(runs) == 207 and 60 * 90 > int(row["seconds"]) > sum(run["wall_s"] for run in runs) / int(row["cores"])


def test_the_table_of_the_readme_comes_from_the_runs_of_the_demo():
    runs = {row["run"]: row for row in table_of(RESULTS / "demo/runs.csv")}
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, _, _, teacher, accuracy, retention in rows_of(page, "| exp. | method |"):
        own = float(runs[name]["test_acc1_best"])
        beside = float(runs[name]["teacher_test_acc1"] or runs["teacher"]["test_acc1_best"])
        assert accuracy == f"{own:.2f}" and retention == f"{100 * own / beside:.2f}"
        assert teacher == ("" if name == "alone" else f"{beside:.2f}")
    there = {row["run"]: float(row["test_acc1_best"]) for row in table_of(RESULTS / "demo/epyc.csv")}
    here = {name: float(row["test_acc1_best"]) for name, row in runs.items()}
    assert there.keys() == here.keys() and max(abs(there[name] - here[name]) for name in here) <= 1, "by up to a point"
    assert here["v3"] < here["v3.1"] and there["v3"] > there["v3.1"]


def test_the_recorded_alarms_are_those_of_the_code():
    val = Confusion([""] * 100, np.diag([10] * 100))  # has the labels; predictions by class were not recorded
    sweeps = (read_sweep(RESULTS / "ablation-small" / name) for name in script("ablation-small/alarms.py").SWEEPS)
    for cell in (cell for cells in sweeps for cell in cells.values() if cell.flags.get("teacher")):
        method, recipe = SimpleNamespace(record=METHODS[cell.flags["method"]]), SimpleNamespace(**cell.flags)
        for run in cell.runs.values():
            rows = [SimpleNamespace(**row) for row in run["epochs"]]
            found = alarms.alarms(method, recipe, recipe.monitor, rows, run["epochs"], val, run["stopped_early"])
            # Python 3.12 sums more exactly
            assert {alarm.name: alarm.value for alarm in found} == pytest.approx(run["alarms"])


EXPORTED = {"v2_pico": 32, "v2_tiny": 32} | dict.fromkeys(
    ("resnet18", "mobilenet_v2", "mobilenetv4_conv_small", "efficientnet_v2_s"), 224)  # network: pixels


def export_table() -> str:
    """The table of docs/export.md: a row per network and format, a cell per precision."""
    refused = {(row["network"], row["format"], row["precision"]) for row in table_of(RESULTS / "export/refused.csv")}
    lines = ["| network | pixels | file | fp32 | fp16 | int8 | int8, in OpenVINO and OpenCV as in ONNX Runtime |",
             "|---|---:|---|---:|---:|---|---|"]
    for name, side in EXPORTED.items():
        rows = table_of(RESULTS / "export" / f"{name}.csv")
        for format, suffix in (("onnx", ".onnx"), ("pt2", ".pt2"), ("executorch", ".pte")):
            cells = [name, str(side), f"`{suffix}`"]
            own = {row["precision"]: row for row in rows if row["format"] == format and not row["same_in_onnxruntime"]}
            for precision in ("fp32", "fp16", "int8"):
                row = own.get(precision)
                cell = f"{int(row['bytes']) / 1000:,.0f} kB" if row else "refused" if (name, format, precision) in refused else ""
                if precision == "int8" and row:
                    cell += f", {float(own['fp32']['accuracy']):.2f} -> {float(row['accuracy']):.2f} %"
                cells.append(cell)
            same = {row["runtime"].split()[0]: row for row in rows if row["file"] == "best-int8.onnx"}
            if format == "onnx" and "int8" in own:
                cells.append(", ".join(f"{same[runtime]['same_in_onnxruntime']} of {same[runtime]['images']}" if runtime in same
                                       else "refused" for runtime in ("openvino", "opencv-python-headless")))
            else:
                cells.append("")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_exported_files_comes_from_their_checks():
    assert export_table() in (ROOT / "docs/export.md").read_text(encoding="utf-8")


def test_the_table_of_latencies_comes_from_the_benchmark():
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    rows = [row for row in table_of(ROOT / "benchmarks/results/latency-cpu.csv") if row["threads"] == "1"]
    engines = {"onnxruntime fp32": "ONNX Runtime FP32", "onnxruntime int8": "ONNX Runtime int8"}
    expected = [[f"{row['network']}, {row['run']}, {engines.get(row['engine'], row['engine'])}", row["accuracy"],
                 f"{float(row['ms_median']):.2f}, {float(row['ms_p95']):.2f}", f"{float(row['images_per_s']):,.0f}",
                 f"{float(row['process_mb']):.0f}" if row["process_mb"] else ""] for row in rows]
    assert rows_of(page, "| | accuracy (%) |") == expected


def test_how_often_alarms_are_raised_comes_from_the_tables(tmp_path):
    """The committed counts; the alarms in runs.csv; limits as calibrated."""
    counts = script("ablation-small/alarms.py")
    counts.main(["--output", str(tmp_path / "alarms.csv")])
    committed = RESULTS / "ablation-small" / "alarms.csv"
    assert (tmp_path / "alarms.csv").read_bytes() == committed.read_bytes()
    assert len(counts.read_runs()) == 194
    calibrated = {row["alarm"]: round(float(row["calibrated"]), 2) for row in table_of(committed) if row["calibrated"]}
    assert calibrated == {"dead": alarms.DEAD, "move": alarms.MOVE}


def test_tables_hold_the_runs_that_ended(tmp_path):
    for name, beta, end in (("a-s1", 8.0, "summary.json"), ("b-s0", None, "status.json"), ("b-s1", None, None)):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"method": "dkd", "beta": beta, "seed": int(name[-1]), "output": name}))
        (path / "log.csv").write_text("epoch,val_acc1,amp_scale\n1,0.30000000000000004,\n")
        if end:
            (path / end).write_text(json.dumps({"exit_code": 6} if beta is None else {"test_acc1_best": 40.1, "verdict": "x"}))
    (path.parent / "a-s1" / "diagnostics.csv").write_text("epoch,share_ce\n1,0.5\n")
    script("tables.py").main([str(tmp_path / "runs"), str(tmp_path)])
    assert json.loads((tmp_path / "settings.json").read_text()) == {"method": "dkd"}
    assert (tmp_path / "epochs.csv").read_text() == (
        "run,epoch,val_acc1,share_ce\na-s1,1,0.30000000000000004,0.5\nb-s0,1,0.30000000000000004,\n")
    one, other = table_of(tmp_path / "runs.csv")
    assert one == {"run": "a-s1", "cell": "a", "seed": "1", "beta": "8.0", "test_acc1_best": "40.1", "verdict": "x"}
    assert (other["cell"], other["beta"], other["test_acc1_best"], other["verdict"]) == ("b", "", "", "diverged")


@pytest.mark.parametrize("name, flags", [
    ("tables.py", ["nowhere", "nowhere"]), ("ablation-small/figures.py", ["--tables", "nowhere"])])
def test_what_is_missing_is_one_line(name, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script(name).main(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 4 and err.startswith("error: ") and err.count("\n") == 1 and "nowhere" in err
