"""A sweep: the runs that a command means, its table, and that it ends with that table however often it is interrupted.

Its runs are stubs that leave the files of a run without training; tests/test_scripts.py has a sweep of the real scripts.
"""
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import pytest
from command import run_main
from helpers import make_images, random_moments, table_of, wait_for
from scipy import stats

import sweep
from cli import options, sweep_grid, sweep_jobs, sweep_table
from rundir import errors, files

ROOT = Path(__file__).parent.parent


def run_sweep(line):
    """`python sweep.py line` in this process -> exit code, stdout, stderr."""
    return run_main(lambda words: errors.run(sweep.main, sweep_grid.parse_sweep(argv=words)), *shlex.split(line))


def refused(code, line, *parts):
    """A sweep that must not start a run, but say why in one line."""
    begun = len(started_runs())
    got, out, err = run_sweep(line)
    assert got == code and len(started_runs()) == begun, out + err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(part in err for part in parts), err


def cells(line):
    script, *words = shlex.split(line)
    return sweep_grid.expand(script, words)


# The runs that a command means

@pytest.mark.parametrize("line, labels", [
    ("distill.py --method dkd --beta 1 2 --mixed-target pair dominant --milestones 3 6", [
        "--beta 1 --mixed-target pair", "--beta 1 --mixed-target dominant", "--beta 2 --mixed-target pair",
        "--beta 2 --mixed-target dominant"]),
    ("distill.py --method kd dkd --beta 2 8", ["--method kd", "--method dkd --beta 2", "--method dkd --beta 8"]),
    ("distill.py --method kd dkd --dkd-warmup 2 --epochs 9", ["--method kd", "--method dkd"]),
    ("distill.py --experiment v1 v3 --mixed-target pair first",
     ["--experiment v1", "--experiment v3 --mixed-target pair", "--experiment v3 --mixed-target first"]),
    ("distill.py --method dkd -- --beta 8 -- --beta 8.0 2", ["--beta 8", "--beta 2"]),
    ("distill.py --method dkd -- -- --standardize", ["distill.py", "--standardize"]),
    ("distill.py --lr=0.1 --method dkd -- -b 32 64 -- --lr 0.2 -b 32", [
        "--lr 0.1 --batch-size 32", "--lr 0.1 --batch-size 64", "--lr 0.2 --batch-size 32"]),
    ("train_teacher.py --model v2_pico --policy none -- -- --policy randaugment", ["--policy none", "--policy randaugment"]),
    ("train_teacher.py --model v2_pico -- -- distill.py --student v2_pico --alpha 0.5", [
        "train_teacher.py", "distill.py --student v2_pico --alpha 0.5"]),
])
def test_values_make_cells_without_the_flags_of_other_methods(line, labels):
    made = cells(line)
    assert [cell.label for cell in made] == labels
    assert len({cell.name for cell in made}) == len(made) and all(list(cell.runs) == [42] for cell in made)


def test_three_numbers_of_a_teacher_are_one_setting():
    three = cells("distill.py --teacher-mean 0.1 0.2 0.3")
    two = cells("distill.py --teacher-mean 0.1,0.2,0.3 0.4,0.5,0.6")
    assert [cell.runs[42].teacher_mean for cell in three + two] == [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]


def test_two_dashes_separate_grids_that_share_the_first_flags():
    made = cells("distill.py --student v2_pico --epochs 9 --seed 0 1 -- --method kd -- --method dkd --beta 2 8 "
                 "-- --method dkd --lr 1.6 --seed 5 -- train_teacher.py --model v2_pico")
    assert [(cell.label, list(cell.runs)) for cell in made] == [
        ("--method kd", [0, 1]), ("--method dkd --beta 2", [0, 1]), ("--method dkd --beta 8", [0, 1]),
        ("--method dkd --lr 1.6", [5]), ("train_teacher.py --model v2_pico", [0, 1])]
    assert made[4].name == "train_teacher_model-v2_pico" and "--student" in made[4].dropped
    assert sweep_grid.command(made[4].flags) == ["--epochs", "9", "--model", "v2_pico"]
    args = made[2].runs[1]
    assert (args.student, args.method, args.beta, args.epochs, args.seed) == ("v2_pico", "dkd", 8.0, 9, 1)
    assert [list(cell.runs) for cell in cells("distill.py --method dkd -- --seed 0 1 -- --beta 8 --seed 1 2")] == [[0, 1, 2]]
    line = f"distill.py --teacher-checkpoint runs/a/best.pt runs-a/best.pt 'my runs/b.pt' {'x' * 300}.pt"
    names = [cell.name for cell in cells(line)]
    assert len(set(names)) == 4 and all(re.fullmatch(r"[\w.+-]{1,140}", name) for name in names)
    assert names[2] == "teacher-checkpoint-my-runs-b.pt" and names == [cell.name for cell in cells(line)]


def test_the_method_and_the_seed_may_come_from_another_run(tmp_path):
    args = vars(options.parse_distill(argv="--method dkd --beta 4 --seed 7".split()))
    (tmp_path / "config.json").write_text(json.dumps(args | {"script": "distill"}))
    made = cells(f"distill.py --config {tmp_path}/config.json --beta 2 8 -- --lr 1e-3 -- --method kd")
    assert [(cell.label, list(cell.runs)) for cell in made] == [
        ("--beta 2 --lr 1e-3", [7]), ("--beta 8 --lr 1e-3", [7]), ("--method kd", [7])]


def test_the_control_is_named_by_its_flags():
    made = cells("distill.py --student v2_pico -- --method kd -- --method dkd --beta 2 8 -- --method dkd --beta 8 --lr 1.6 "
                 "-- train_teacher.py --model v2_pico")
    for text, at in ((None, 0), ("--method kd", 0), ("--method dkd --beta 8", 2), ("--lr 1.6", 3), ("train_teacher.py", 4),
                     *((cell.label, at) for at, cell in enumerate(made))):
        assert sweep_grid.find_control(made, text) is made[at], text
    for text in ("--method dkd", "--beta 4", "", "train_teacher.py --beta 2", "--lr '1"):
        with pytest.raises(errors.Failure, match="--control"):
            sweep_grid.find_control(made, text)


@pytest.mark.parametrize("control", ["--control train_teacher.py", "--control '--method kd'", "--control=--standardize"])
def test_flags_of_the_sweep_end_at_the_script(control):
    args = sweep_grid.parse_sweep(argv=shlex.split(f"--jobs 2 {control} distill.py --output x -- -b 2"))
    assert (args.jobs, args.script, args.flags) == (2, "distill.py", ["--output", "x", "--", "-b", "2"])
    assert args.control == shlex.split(control.replace("=", " "))[1]


@pytest.mark.parametrize("line, named", [
    ("--jobs 0 distill.py", "--jobs"), ("other.py", "other.py"), ("", "script"), ("--metric loss distill.py", "--metric"),
    ("distill.py --output x", "--output"), ("distill.py --resume auto", "--resume"), ("distill.py --overwrite", "--overwrite"),
    ("distill.py -- --dry-run", "--dry-run"), ("distill.py --beta=1 --lr 1 --beta 2", "--beta"), ("distill.py 8", "8"),
    ("distill.py --method kd --beta 2 8", "--beta 2 8"), ("distill.py -- --method dkd -- --method kd --gamma 1", "--gamma 1"),
    ("distill.py --lr 0.1 -1", "--lr"), ("distill.py --no-such-flag 1", "--no-such-flag"), ("distill.py --seed 0 x", "--seed"),
    ("distill.py --method kd fitnet", "fitnet"), ("distill.py --method", "see distill.py"), ("distill.py --seed", "--seed"),
    ("distill.py -- train_teacher.py --beta 8", "see train_teacher.py --help"),
    ("distill.py --epochs 3 --warmup-epochs 3", "--warmup-epochs"),
    ("distill.py --experiment v9", "see distill.py --help"), ("distill.py --standardize yes no --method kd", "yes"),
])
def test_flags_that_are_refused(line, named):
    refused(2, line, named)


# The table

DIVERGED = {"verdict": "diverged"}
ONE, OTHER = [50.0, 52.0, 54.0], [51.0, 54.0, 57.0]


def summary(accuracy, last=None, verdict="completed", minutes=2):
    return {"test_acc1_best": accuracy, "test_acc1_last": accuracy - 1 if last is None else last, "verdict": verdict,
            "wall_s": 60 * minutes, "selected_on": "validation split, 20 images"}


def test_statistics_by_hand_and_by_scipy():
    """Of 50, 52, 54: SD 2, standard error 2 / sqrt(3), and t(0.975; 2) = 4.302653.  Of the differences 1, 2, 3: t = 2 sqrt(3)."""
    mean, sd, low, high, _ = sweep_table.spread(ONE)
    assert (mean, sd, (low + high) / 2) == (52, 2, 52) and high - mean == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    row = sweep_table.row_of("", *({seed: summary(value) for seed, value in enumerate(values)} for values in (OTHER, ONE)),
                             "test_acc1_best")
    test = stats.ttest_rel(OTHER, ONE)
    assert row["difference"] == 2 and row["p"] == pytest.approx(test.pvalue) == pytest.approx(0.0741799, rel=1e-5)
    assert (row["difference_ci_low"], row["difference_ci_high"]) == pytest.approx(tuple(test.confidence_interval()))
    assert sweep_table.spread(ONE[:2])[4] == pytest.approx(stats.ttest_1samp(ONE[:2], 0).pvalue)


def test_undefined_numbers_are_empty_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sweep_table.spread([]) == (None,) * 5 and sweep_table.spread([3.0]) == (3.0, *[None] * 4)
        assert sweep_table.spread([1.0, 1.0]) == (1.0, 0.0, None, None, None)
        assert sweep_table.spread([53.1 - 52.9, 51.3 - 51.1, 0.7 - 0.5])[1:] == (0.0, None, None, None), "rounding is no variance"
        row = sweep_table.row_of("", {0: DIVERGED}, {0: summary(1.0)}, "test_acc1_best")
    assert (row["n"], row["diverged"], row["pairs"], row["verdicts"]) == (0, 1, 0, "1 diverged")
    assert all(row[name] is None for name in ("mean", "sd", "ci_low", "difference", "p", "last", "minutes"))


def test_differences_are_over_common_seeds():
    row = sweep_table.row_of("", {0: summary(51.0), 1: DIVERGED, 2: summary(56.0), 7: summary(90.0)},
                             {0: summary(50.0), 1: summary(50.0), 2: summary(53.0), 3: DIVERGED}, "test_acc1_best")
    assert (row["n"], row["diverged"], row["pairs"], row["difference"], row["mean"]) == (3, 1, 2, 2.0, pytest.approx(197 / 3))


def test_the_table_and_its_note():
    results = {"--method kd": {seed: summary(value) for seed, value in enumerate(ONE)},
               "--method dkd": {0: summary(51.0), 1: summary(54.0), 2: summary(57.0, 3.0, "collapsed", 5)},
               "--lr 9": {0: DIVERGED, 1: summary(40.0, minutes=1)}}
    rows, note = sweep_table.table(results, "--method kd", "test_acc1_best", 1)
    *lines, _, below = sweep_table.as_markdown(rows, note).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert [re.split(r" *\| *", line)[1:-1] for line in (*lines[:1], *lines[2:])] == [
        ["flags", "n", "diverged", "accuracy (%)", "SD", "95 % interval", "pairs", "difference", "its 95 % interval", "p",
         "last (%)", "verdicts", "minutes"],
        ["--method kd", "3", "0", "52.00", "2.00", "47.03 to 56.97", "-", "-", "-", "-", "51.00", "3 completed", "2.0"],
        ["--method dkd", "3", "0", "54.00", "3.00", "46.55 to 61.45", "3", "+2.00", "-0.48 to +4.48", "0.074", "35.33",
         "1 collapsed, 2 completed", "3.0"],
        ["--lr 9", "1", "1", "40.00", "-", "-", "1", "-12.00", "-", "-", "39.00", "1 completed, 1 diverged", "1.0"]]
    assert all(part in below for part in ("test_acc1_best", "Seeds: 0, 1, 2.", "control, --method kd,", "(1 made here)",
                                          "selected on: validation split, 20 images.", "Not finished, and not counted: 1 run."))


# Processes

STUB = r'''
import os, time
from pathlib import Path
from rundir import errors, files, run_directory
from cli import sweep_grid
NAME = Path(__file__).name

def main(args):
    with run_directory.RunDirectory(args.output, overwrite=args.overwrite, resume=args.resume) as run:
        if (run / "summary.json").exists():
            return
        teacher, begin = files.existing_digest(vars(args).get("teacher_checkpoint")), time.time()
        files.write_json(run / "config.json", vars(args) | {"script": NAME[:-3], "device": "cpu", "amp": "off", "image_size": 32,
                                                            "teacher_sha256": teacher})
        if args.lr == 98:
            raise errors.Failure(errors.CHECKPOINT, "no teacher (nowhere.pt)", "train one")
        while time.time() < begin + float(os.environ.get("STUB_SECONDS", 0)):
            time.sleep(0.01)  # a signal just before a long sleep would be noticed after it
        with open("times.txt", "a") as times:
            times.write(f"{run.path.name} {begin} {time.time()} {os.environ['OMP_NUM_THREADS']}\n")
        if args.lr == 99:
            files.write_json(run / "status.json", {"exit_code": 6})
            raise errors.Failure(errors.DIVERGED, "val_loss is not finite", "lower --lr")
        accuracy = 50 + args.seed + (vars(args).get("beta") or 0) * (1 + args.seed % 2)
        files.write_json(run / "summary.json", {"test_acc1_best": accuracy, "test_acc1_last": accuracy - 1, "wall_s": 1.5,
                                                "verdict": "completed", "selected_on": "validation split"})

errors.run(main, sweep_grid.PARSERS[NAME]())
'''


@pytest.fixture(scope="module")
def server():
    """A fork server of the stubs, which ends with this process; that of other tests has imported PyTorch, and runs of theirs."""
    own = forkserver.ForkServer()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload"):
            patch.setattr(forkserver, name, getattr(own, name))
        yield


@pytest.fixture
def place(server, tmp_path, monkeypatch):
    """A folder with sweep.py, and stubs of the scripts that it starts and of what takes seconds to import; the current one."""
    shutil.copy(ROOT / "sweep.py", tmp_path)
    (tmp_path / "torch.py").write_text("def set_num_threads(count): pass\n")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").touch()
    (tmp_path / "training" / "run.py").write_text("from cli import sweep_grid\nfrom rundir import run_directory\n")
    for name in sweep_grid.PARSERS:
        (tmp_path / name).write_text(STUB)
    monkeypatch.chdir(tmp_path)
    sweep_jobs.cached_digest.cache_clear()  # of relative paths
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    return tmp_path


def started_runs():
    return [line.split() for line in Path("times.txt").read_text().splitlines()] if Path("times.txt").exists() else []


def start(line, seconds=20):
    """Start a sweep whose stubs take so many seconds."""
    return subprocess.Popen([sys.executable, "sweep.py", *shlex.split(line)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"STUB_SECONDS": str(seconds)})


def runs_of(process):
    """Process ids: those of the children of the server."""
    def children(parent):
        return [int(pid) for path in Path(f"/proc/{parent}/task").glob("*/children") for pid in path.read_text().split()]
    return [run for child in children(process.pid) for run in children(child)]


@pytest.mark.parametrize("line, runs, shares", [
    ("distill.py --method kd dkd --seed 0 1", 4, 4), ("distill.py -- --lr 1 -- --lr 2 --seed 42 43", 3, 2),
    ("distill.py --teacher-checkpoint a.pt b.pt", 2, 0),
    ("distill.py --lr 1 2 --teacher-checkpoint a.pt b.pt -- -- --lr 3 -- train_teacher.py", 8, 6),
    ("distill.py --lr 1 2 --teacher-logits elsewhere", 2, 0)])
def test_runs_with_one_teacher_and_one_seed_share_its_logits(place, line, runs, shares):
    _, *dry = run_sweep(f"--dry-run --output s {line}")[1].splitlines()
    assert len(dry) == runs and sum(command.endswith(" --teacher-logits s/teacher-logits") for command in dry) == shares


def change(path, **values):
    """Change keys of a JSON file."""
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | values))


def test_a_sweep_and_the_same_one_again(place, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "0.2")
    line = "--jobs 2 --output s distill.py --method dkd --beta 1 2 --seed 0 1 -- -- train_teacher.py --model v2_pico"
    names = [f"{name}-s{seed}" for name in ("beta-1", "beta-2", "train_teacher_model-v2_pico") for seed in (0, 1)]
    dry = run_sweep(f"--dry-run {line}")[1].splitlines()
    assert len(dry) == 7 and "python distill.py --method dkd --beta 1 --seed 0 --resume auto --output s/beta-1-s0 " \
        "--teacher-logits s/teacher-logits" == dry[1]
    assert not Path("s").exists()
    code, out, err = run_sweep(line)
    assert (code, err) == (0, ""), out + err
    assert out.startswith("6 runs of 3 cells, 2 at once, compared with --beta 1 -> s\n")
    assert re.search(r"^\[6/6\] .* seed 1: completed, \d\d.\d\d %  \(0:00:0\d, eta 0:00:00\)$", out, re.M), out
    assert {path.name for path in Path("s").iterdir()} == {".lock", "sweep.json", "logs", "table.md", "table.csv", *names}
    assert out.endswith(Path("s/table.md").read_text()) and Path("s/logs/beta-1-s0.txt").read_text() == f"$ {dry[1]}\n"
    assert sorted(name for name, *_ in started_runs()) == names
    assert {threads for *_, threads in started_runs()} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    moments = sorted((float(at), by) for _, begin, end, _ in started_runs() for at, by in ((begin, 1), (end, -1)))
    assert max(itertools.accumulate(by for _, by in moments)) <= 2

    table = Path("s/table.md").read_bytes()
    assert run_sweep(line)[0] == 0 and len(started_runs()) == 6, "a finished run was started again"
    assert Path("s/table.md").read_bytes() == table
    out = run_sweep(f"--control '--beta 2' --metric test_acc1_last {line}")[1]
    assert "control, --beta 2," in out and "test_acc1_last" in out


def test_several_sweeps_share_one_pool_and_have_a_table_each(place, monkeypatch):
    lines = []
    monkeypatch.setattr(sweep, "live", lines.append)
    line = "--output s distill.py --seed 0 1 --sweep a --lr 1 -- --method kd -- --method dkd --sweep b.2 --epochs 3 6 --lr 2"
    code, out, err = run_sweep(line)
    assert (code, err) == (0, ""), out + err
    names = [("method-kd", "method-dkd"), ("epochs-3", "epochs-6")]
    assert [run for run, *_ in started_runs()] == [f"{name}-s{seed}" for pair in names for seed in (0, 1) for name in pair]
    assert "2 runs of 1 cells" not in out and out.count("4 runs of 2 cells") == 2 and "b.2: --epochs 6 seed 1: completed" in out
    assert any(re.fullmatch(r"7 of 8 runs, 1 running, 0:00:\d\d, eta 0:00:\d\d", line) for line in lines), lines
    assert {path.name for path in Path("s").iterdir()} == {".lock", "a", "b.2"}
    flags = [[row["flags"] for row in table_of(Path("s", name, "table.csv"))] for name in ("a", "b.2")]
    assert flags == [["--method kd", "--method dkd"], ["--epochs 3", "--epochs 6"]]
    assert "--teacher-logits s/a/teacher-logits" in Path("s/a/logs/method-kd-s0.txt").read_text()


@pytest.mark.parametrize("words", ["--sweep", "--sweep --lr 1", "--sweep ../a --lr 1", "--sweep a --lr 1 --sweep a --lr 2",
                                   "-- --lr 1 --sweep a"])
def test_sweeps_without_a_name_of_their_own_are_refused(place, words):
    refused(2, f"--output s distill.py {words}", "--sweep")
    assert not Path("s").exists()


def test_another_experiment_in_the_directory_of_a_run_is_refused(place):
    line, record, config = "--output s distill.py --seed 1 --lr 0.1", Path("s/sweep.json"), Path("s/distill-s1/config.json")
    assert run_sweep(line)[0] == 0
    for flags in ("--image-size 24", "--epochs 300", "--amp bf16", "--weight-decay 0"):
        refused(2, f"{line} {flags}", "s/distill-s1", "->")
    refused(2, "--output s distill.py --seed 0 1 --lr 0.2", "s/distill-s1", "lr 0.1 -> 0.2")
    for flags in ("", "--amp off", "--device cpu", "--grad-checkpoint"):  # as the run chose itself, or of no consequence
        assert run_sweep(f"{line} {flags}")[0] == 0
    code, out, _ = run_sweep("--output s distill.py --seed 2")
    assert code == 0 and "1 runs of another sweep are left out of the table: distill-s1" in out
    change(record, **{"distill-s1": {"amp": "bf16"}})
    refused(2, line, "amp bf16 -> None")
    change(record, **{"distill-s1": 3})
    refused(4, line, "s/sweep.json")
    record.unlink()
    assert run_sweep(line)[0] == 0, "a run that no sweep began"
    change(config, weight_decay=0.5)
    refused(2, line, "weight_decay 0.5 -> 0.05")
    config.write_text("{")
    refused(4, line, str(config))


def test_the_content_of_files_decides_and_not_their_path(place):
    for name, content in (("one", b"one"), ("moved", b"one"), ("other", b"two")):
        Path(f"{name}.pt").write_bytes(content)
    line = "--output s distill.py --teacher-checkpoint"
    assert run_sweep(f"{line} one.pt")[0] == 0 == run_sweep(f"{line} moved.pt")[0] and len(started_runs()) == 1
    refused(2, f"{line} other.pt", "teacher_sha256", "teacher_checkpoint one.pt -> other.pt")

    for folder, seed in (("one", 0), ("two", 0), ("three", 1)):
        make_images(place / folder, ["a", "b"], 4, seed=seed)
    line = "--output t train_teacher.py --dataset imagefolder --data-dir {} --init {}"
    assert run_sweep(line.format("one", "one.pt"))[0] == 0
    from data import datasets
    change("t/train_teacher-s42/config.json", init_sha256=files.digest("one.pt"),
           data_sha256=datasets.load("imagefolder", "one", val_size=0).fingerprint)
    assert run_sweep(line.format("./two/", "moved.pt"))[0] == 0 and len(started_runs()) == 2
    Path("moved.pt").write_bytes(b"two")
    sweep_jobs.cached_digest.cache_clear()
    refused(2, line.format("one", "moved.pt"), "init_sha256")
    refused(2, line.format("one", "lost.pt"), "init one.pt -> lost.pt")
    refused(2, line.format("three", "one.pt"), "data_dir one -> three")
    refused(4, line.format("lost", "one.pt"), "lost")


def test_a_diverged_run_is_a_result_and_a_failed_one_is_named(place):
    line = "--output s distill.py --seed 0 1 -- --lr 0.1 -- --lr 99 -- --lr 98"
    code, out, err = run_sweep(line)
    assert code == 5 and err.startswith("error: 2 of 6 runs failed (s/logs/lr-98-s0.txt: no teacher (nowhere.pt)"), out + err
    assert out.count("failed with exit code 5: no teacher (nowhere.pt). train one (s/logs/lr-98-s") == 2
    assert "--lr 99 seed 0: diverged" in out and "Not finished, and not counted: 2 runs." in out
    assert [(row["flags"], row["n"], row["diverged"], row["mean"]) for row in table_of(Path("s/table.csv"))] == [
        ("--lr 0.1", "2", "0", "50.5"), ("--lr 99", "0", "2", ""), ("--lr 98", "0", "0", "")]
    assert run_sweep(line)[0] == 5 and len(started_runs()) == 4, "a diverged run was started again"
    for seed, images in ((0, "aa"), (1, "bb")):  # as where the images in the folder were replaced between two calls
        change(f"s/lr-0.1-s{seed}/config.json", data_sha256=images)
    refused(4, line, "s/lr-0.1-s0", "s/lr-0.1-s1")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_every_run_once(place, number, code):
    """A second signal would end a run without its line."""
    process = start("--jobs 2 --output s distill.py --seed 0 1 2")
    wait_for(Path("s/distill-s0/config.json"))
    wait_for(Path("s/distill-s1/config.json"))
    runs = runs_of(process)
    refused(3, "--output s distill.py --seed 7", "another sweep", "(s)")
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code and len(runs) == 2 and err.startswith(f"error: stopped ({number.name})"), err
    assert not any(Path(f"/proc/{pid}").exists() for pid in runs) and not Path("s/distill-s2").exists()
    assert all(f"error: stopped ({number.name})" in Path(f"s/logs/distill-s{seed}.txt").read_text() for seed in (0, 1))
    assert run_sweep("--jobs 2 --output s distill.py --seed 0 1 2")[0] == 0


def test_killed_runs_and_runs_of_a_killed_sweep_fail_and_are_continued(place):
    process = start("--output s distill.py --seed 0 1", seconds=60)
    wait_for(Path("s/distill-s0/config.json"))
    os.kill(*runs_of(process), signal.SIGKILL)
    wait_for(Path("s/distill-s1/config.json"))
    orphan, = runs_of(process)
    process.kill()
    process.wait()
    code, out, _ = run_sweep("--output s distill.py --seed 0 1")
    assert code == 3 and "seed 1: failed with exit code 3: run directory is in use" in out and "seed 0: completed" in out
    os.kill(orphan, signal.SIGKILL)
    assert "seed 0: failed with exit code 137: no output" in process.communicate()[0]
    assert finished("s", "distill.py --seed 0 1") and sorted(name for name, *_ in started_runs()) == ["distill-s0", "distill-s1"]


def finished(output, line):
    """Repeat a sweep until no run of a killed one is in its way -> its table, but for the column of time."""
    while (process := start(f"--jobs 2 --output {output} {line}", 0.3)).communicate() and process.returncode:
        assert process.returncode == 3
    text, rows = Path(output, "table.md").read_text().splitlines(), table_of(Path(output, "table.csv"))
    return [row.rpartition(" | ")[0] or row for row in text], [row | {"minutes": None} for row in rows]


def test_killed_at_any_moment_a_sweep_ends_with_the_same_table(place):
    """The sweep is killed, but not its runs."""
    draw, line, begin = random_moments(), "distill.py --method dkd --beta 1 2 --seed 0 1", time.monotonic()
    wanted, usual = finished("undisturbed", line), time.monotonic() - begin
    for _ in range(3):
        process = start(f"--jobs 2 --output s {line}", 0.3)
        with suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, usual / 2))
        process.kill()
        process.communicate()
    assert finished("s", line) == wanted and len(started_runs()) == 8, "a run was done twice"
