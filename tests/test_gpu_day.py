"""benchmarks.gpu_day: however a part ends, the others have their results, and a table says how each ended."""
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import be_the_command
from helpers import table_of, wait_for

from benchmarks import augmentation, gpu_checks, gpu_day, gpu_runs, loss, step

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
ROOT = Path(__file__).parent.parent
WRITES = "open(r'{rows}', 'w').write('a\\n1\\n'); print('well')"
HANGS = ("import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid); open(r'{rows}', 'w').write('a\\n'); "
         "time.sleep(60)")
PARTS = {"first": WRITES, "hangs": HANGS, "killed": "import os; print('begun'); os.kill(os.getpid(), 9)",
         "imports": "import no_such_module", "last": WRITES}


@pytest.fixture
def day(tmp_path, monkeypatch):
    """Runs a stage of planted parts (name -> code); gives its exit code, and how each part ended."""
    monkeypatch.setattr(gpu_day, "GRACE", 1)

    def run(parts: dict, seconds: float = 60, least: float = 1):
        monkeypatch.setattr(gpu_day, "LEAST", least)
        planted = [gpu_day.Part(name, ["-c", code], 1.5 if name == "hangs" else 60) for name, code in parts.items()]
        monkeypatch.setattr(gpu_day, "parts_of", lambda args: planted)
        code = 0
        try:
            gpu_day.main(SimpleNamespace(stage=2, output=tmp_path / "out", minutes=seconds / 60, part=None, data=None,
                                         device="cpu", tiny=False))
        except SystemExit as leave:
            code = leave.code
        return code, {row["part"]: row["outcome"] for row in table_of(tmp_path / "out" / "stage2-parts.csv")}
    return run


def alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_part_that_fails_leaves_the_others_their_results(day, tmp_path, capsys):
    code, outcomes = day(PARTS)
    assert code == 1 and list(outcomes) == list(PARTS)
    assert outcomes["first"] == outcomes["last"] == "ok" and outcomes["killed"] == "killed (SIGKILL)"
    assert outcomes["imports"] == "failed (1)" and outcomes["hangs"].startswith("out of time")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [f"stage2-{name}" for name in (
        "first.csv", "hangs.csv", "last.csv", "log.txt", "parts.csv")]
    assert table_of(out / "stage2-last.csv") == [{"a": "1"}] and "no_such_module" in (out / "stage2-log.txt").read_text()
    lines = {row["part"]: row["last_line"] for row in table_of(out / "stage2-parts.csv")}
    assert lines["first"] == "well" and "no_such_module" in lines["imports"] and not alive(int(lines["hangs"]))
    table = capsys.readouterr().out.splitlines()[-len(PARTS):]
    assert [line.split()[1] for line in table] == list(PARTS)


def test_no_part_is_begun_that_has_too_little_time(day, tmp_path):
    slow = {"slow": "import time; time.sleep(1)", "quick": WRITES}
    assert day(slow, seconds=7, least=4.5) == (0, {"slow": "ok", "quick": "not begun"})
    assert day({"quick": WRITES}, seconds=2) == (1, {"quick": "not begun"})
    assert not (tmp_path / "out" / "stage2-quick.csv").exists()


def test_rows_of_an_earlier_call_do_not_stay(day, tmp_path):
    assert day({"first": WRITES}) == (0, {"first": "ok"})
    assert day({"first": "print()"}) == (0, {"first": "ok"})
    assert not (tmp_path / "out" / "stage2-first.csv").exists()


def test_a_table_that_cannot_be_written_is_printed(day, monkeypatch, capsys):
    def full(path, content):
        raise OSError("No space left on device")

    assert day({"first": WRITES}) == (0, {"first": "ok"})
    monkeypatch.setattr(gpu_day, "write_atomic", full)
    assert day({"second": WRITES})[0] == 0
    assert capsys.readouterr().out.split()[-4:-2] == ["second", "ok"]


def test_a_signal_ends_the_part_and_leaves_the_table(tmp_path):
    plant = tmp_path / "plant.py"
    plant.write_text(f"""
from benchmarks import gpu_day
gpu_day.GRACE = 1
gpu_day.parts_of = lambda args: [gpu_day.Part("hangs", ["-c", {HANGS!r}], 60), gpu_day.Part("never", ["-c", ""], 60)]
gpu_day.command()
""")
    flags = [str(plant), "--stage", "2", "--output", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=functools.partial(be_the_command, flags))
    wait_for(tmp_path / "out" / "stage2-hangs.csv")
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=30)
    pid = int((tmp_path / "out" / "stage2-log.txt").read_text().splitlines()[-1])
    assert process.returncode == 128 + signal.SIGTERM and not error and not alive(pid)
    assert output.splitlines()[-1].split()[:3] == ["2", "hangs", "stopped"]
    assert [row["outcome"] for row in table_of(tmp_path / "out" / "stage2-parts.csv")] == ["stopped"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    gpu_runs.pictures(folder / "images")
    with tarfile.open(folder / "images.tar.xz", "w:xz") as file:
        for part in ("train", "test"):
            file.add(folder / "images" / part, part)
    return folder / "images.tar.xz"


@pytest.fixture(scope="module")
def forked():
    """Our commands are forked from this process."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles here, and would in the forked processes")
    with pytest.MonkeyPatch.context() as patch:
        popen, fork = subprocess.Popen, multiprocessing.get_context("fork")

        def start(command, **how):
            if command[0] == sys.executable:
                how["preexec_fn"] = functools.partial(be_the_command, command[1:], how.get("env") or {})
            return popen(command, **how)

        patch.setattr(subprocess, "Popen", start)
        patch.setattr(multiprocessing, "get_context", lambda method=None: fork)
        patch.setenv("TRITON_INTERPRET", "1")  # which a stage sets
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


@pytest.fixture(scope="module")
def dry(archive, forked, tmp_path_factory):
    """The folder in which a stage has run with --tiny on a CPU, once: what it wrote is in out."""
    @functools.cache
    def run(stage: int) -> Path:
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        flags = ["--stage", str(stage), "--output", str(folder / "out"), "--data", str(archive)]
        forked.setattr(gpu_day, "WORK", folder / "work")
        forked.setattr(sys, "argv", ["gpu_day", *flags, "--device", "cpu", "--tiny"])
        gpu_day.command()
        return folder
    return run


WRITTEN = {1: {"machine": 13, "kernels": 4, "augmentation": 1, "variants": 3}, 2: {"loss": 4, "step": 4, "bounds": 4,
           "augmentation": 7}, 3: {"runs": 2}}  # rows of each part, at least
SILENT = {1: {"sanitizer"}, 2: set(), 3: set()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_dry_run_has_rows_of_every_part(dry, stage):
    out = dry(stage) / "out"
    parts = table_of(out / f"stage{stage}-parts.csv")
    args = SimpleNamespace(stage=stage, device="cuda", tiny=True, data=None)
    assert [row["part"] for row in parts] == [part.name for part in gpu_day.parts_of(args)]
    assert {row["part"] for row in parts} == WRITTEN[stage].keys() | SILENT[stage]
    assert all(row["outcome"] == "ok" and row["last_line"] for row in parts), parts
    assert {path.name for path in out.iterdir()} == {f"stage{stage}-{name}" for name in (
        "parts.csv", "log.txt", *(f"{name}.csv" for name in WRITTEN[stage]))}
    for name, least in WRITTEN[stage].items():
        rows = table_of(out / f"stage{stage}-{name}.csv")
        assert len(rows) >= least and all(row.get("ok", "True") == "True" for row in rows), rows


def test_training_goes_on_from_call_to_call(dry, archive, monkeypatch):
    folder = dry(3)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("best.pt")}
    rows = table_of(folder / "out" / "stage3-runs.csv")
    assert gpu_runs_code(monkeypatch, "runs", folder, archive, "--tiny") == 0
    for rows in (rows, table_of(folder / "runs-cpu.csv")):
        assert [(row["run"], row["outcome"]) for row in rows] == [("teacher", "ok"), ("v2", "ok")]
        assert all(float(row["test_acc1"]) >= 0 and row["verdict"] and row["first_epoch_s"] for row in rows)
        assert all(row["retention"] for row in rows if row["run"] == "v2")
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("best.pt")}
    assert before == after and len(after) == 4, "a run that is whole stays, and so does what planned it"


def gpu_runs_code(monkeypatch, task: str, folder: Path, archive: Path, *flags: str) -> int:
    """The exit code of benchmarks.gpu_runs."""
    arguments = [task, "--output", str(folder), "--work", str(folder / "work"), "--device", "cpu", "--data", str(archive), *flags]
    monkeypatch.setattr(sys, "argv", ["gpu_runs", *arguments])
    with pytest.raises(SystemExit) as leave:
        runpy.run_module("benchmarks.gpu_runs", run_name="__main__")
    return leave.value.code


@pytest.mark.parametrize("flags", [["--stage", "3"], ["--stage", "1", "--part", "nothing"], ["--stage", "4"]])
def test_what_cannot_be_done_is_one_line(tmp_path, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_day", *flags, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as leave:
        gpu_day.command()
    error = capsys.readouterr().err
    assert leave.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_stage_asks_for_cases_that_there_are_and_leaves_eight_files_at_most():
    known = {"loss": loss.SIZES, "step": step.GPU_CASES, "augmentation": list(map(str, augmentation.SIZES))}
    for stage in (1, 2, 3):
        args = SimpleNamespace(stage=stage, device="cuda", tiny=False, data=Path("images.tar.xz"))
        parts = gpu_day.parts_of(args)
        assert len({part.name for part in parts if "pytest" not in part.command and part.name != "sanitizer"}) + 2 <= 8
        assert all((ROOT / word).is_file() for part in parts for word in part.command if word.startswith("tests/"))
        for part in parts:
            if "--case" in part.command:
                assert set(part.command[part.command.index("--case") + 1:]) <= set(known[part.command[1].partition(".")[2]])


def dies_at_two(device: str, number: int):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    yield f"case {number}", 1, 0.0, 0.0


def test_a_comparison_whose_process_dies_leaves_the_others(forked, tmp_path):
    args = SimpleNamespace(check="kernels", device=torch.device("cpu"), output=tmp_path, tiny=True)
    with pytest.raises(SystemExit) as leave:
        gpu_checks.compare_all(args, dies_at_two, [(1,), (2,), (3,)])
    rows = table_of(tmp_path / "kernels-cpu.csv")
    assert leave.value.code == 1 and [row["ok"] for row in rows if row["failure"]] == ["False"]
    assert {row["case"] for row in rows if row["ok"] == "True"} == {"case 1", "case 3"}


def test_variants_are_compared():
    one = [{"train_loss": "2.0", "val_acc1": "50", "epoch_s": "1"}, {"train_loss": "1.0", "val_acc1": "60", "epoch_s": "1"}]
    other = [one[0] | {"epoch_s": "3"}, one[1] | {"train_loss": "1.03"}]
    assert gpu_runs.difference(one, other, exact=True) == 1
    assert gpu_runs.difference(one, other, exact=False) == pytest.approx(0.03 / 1.03)
    assert gpu_runs.difference(one, one[:1], exact=False) == gpu_runs.difference([], [], exact=True) == float("inf")


def test_what_is_no_archive_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.tar.xz").write_text("hello")
    assert gpu_runs_code(monkeypatch, "runs", tmp_path, tmp_path / "text.tar.xz") == 4
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
