"""A sweep: which runs a command means, what its table says, and that it ends with that table whatever happens to it on the way.

The processes of most tests are stubs that leave the files of a run without training; one test, and the one of TORTURE=1, runs
the real scripts.
"""
import csv
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from scipy import stats
from test_scripts import make_images
from test_structure import ALLOWED

from cli import options, sweep_grid, sweep_jobs, sweep_table
from rundir import files
from rundir.errors import Failure, Parser

ROOT = Path(__file__).parent.parent
DRAW = random.Random(time.time_ns())  # other moments in every test run: each of them has to do


def cells(line):
    script, *words = shlex.split(line)
    return sweep_grid.expand(script, words)


def words(line):
    return [(cell.words, cell.seeds) for cell in cells(line)]


# Which runs a command means

def test_several_values_make_an_axis_and_seeds_repeat():
    made = cells("distill.py --method dkd --beta 1 2 --mixed-target pair dominant --epochs 9 --milestones 3 6 --seed 0 1 2")
    assert [(cell.words, cell.name) for cell in made] == [
        ("--beta 1 --mixed-target pair", "beta-1_mixed-target-pair"),
        ("--beta 1 --mixed-target dominant", "beta-1_mixed-target-dominant"),
        ("--beta 2 --mixed-target pair", "beta-2_mixed-target-pair"),
        ("--beta 2 --mixed-target dominant", "beta-2_mixed-target-dominant")]
    assert all(cell.seeds == [0, 1, 2] and cell.flags["--milestones"] == ("3", "6") for cell in made)
    args = sweep_grid.parse(made[3], 2)
    assert (args.method, args.beta, args.mixed_target, args.epochs, args.milestones, args.seed) == (
        "dkd", 2.0, "dominant", 9, [3, 6], 2)


def test_two_dashes_separate_grids_that_share_the_first_flags():
    line = ("distill.py --student v2_pico --epochs 9 --seed 0 1 -- --method kd -- --method dkd --beta 2 8 "
            "-- --method dkd --lr 1.6 --seed 5 -- train_teacher.py --model v2_pico")
    assert words(line) == [
        ("--method kd", [0, 1]), ("--method dkd --beta 2", [0, 1]), ("--method dkd --beta 8", [0, 1]),
        ("--method dkd --lr 1.6", [5]), ("train_teacher.py --model v2_pico", [0, 1])]
    alone = cells(line)[-1]
    assert alone.name == "train_teacher_model-v2_pico" and "--student" in alone.left_out
    assert sweep_grid.command(alone) == ["--epochs", "9", "--model", "v2_pico"]


@pytest.mark.parametrize("line, expected", [
    ("distill.py --method kd dkd --beta 2 8", ["--method kd", "--method dkd --beta 2", "--method dkd --beta 8"]),
    ("distill.py --method kd dkd --dkd-warmup 2 --epochs 9", ["--method kd", "--method dkd"]),
    ("distill.py --experiment v1 v3 --mixed-target pair first",
     ["--experiment v1", "--experiment v3 --mixed-target pair", "--experiment v3 --mixed-target first"]),
    ("distill.py --method dkd -- --beta 8 -- --beta 8.0 2", ["--beta 8", "--beta 2"]),
    ("distill.py --method dkd", ["distill.py"]),
    ("distill.py --method dkd -- -- --standardize", ["distill.py", "--standardize"]),
    ("distill.py --lr 0.1 --method dkd -- --beta 2 -- --lr 0.2 --beta 2", ["--lr 0.1", "--lr 0.2"]),
    ("distill.py -b 32 64 --policy autoaugment", ["--batch-size 32", "--batch-size 64"]),
    ("distill.py --lr=0.1 0.2", ["--lr 0.1", "--lr 0.2"]),
    ("train_teacher.py --model v2_pico --policy none -- -- --policy randaugment", ["--policy none", "--policy randaugment"]),
    ("train_teacher.py --model v2_pico -- -- distill.py --student v2_pico --alpha 0.5", [
        "train_teacher.py", "distill.py --student v2_pico --alpha 0.5"]),
])
def test_foreign_numbers_are_left_out_and_equal_cells_are_one(line, expected):
    assert [each for each, _ in words(line)] == expected


def test_equal_cells_join_their_seeds():
    assert words("distill.py --method dkd -- --seed 0 1 -- --beta 8 --seed 1 2") == [("distill.py", [0, 1, 2])]


def test_names_suit_a_path_and_are_different():
    made = cells(f"distill.py --teacher-checkpoint runs/a/best.pt runs-a/best.pt 'my runs/b.pt' {'x' * 300}.pt")
    names = [cell.name for cell in made]
    assert len(set(names)) == 4 and all(re.fullmatch(r"[\w.+-]{1,140}", name) for name in names)
    assert names[2] == "teacher-checkpoint-my-runs-b.pt" and names == [cell.name for cell in made]


@pytest.mark.parametrize("line, said", [
    ("distill.py --output x", "--output"), ("distill.py --resume auto", "--resume"), ("distill.py --overwrite", "--overwrite"),
    ("distill.py -- --dry-run", "--dry-run"), ("distill.py --beta=1 --lr 1 --beta 2", "--beta"), ("distill.py 8", "8"),
    ("distill.py --method kd --beta 2 8", "--beta 2 8"), ("distill.py -- --method dkd -- --method kd --gamma 1", "--gamma 1"),
])
def test_what_a_sweep_refuses(line, said):
    with pytest.raises(Failure) as failure:
        cells(line)
    assert failure.value.code == 2 and said in str(failure.value)


@pytest.mark.parametrize("line, said", [
    ("distill.py --lr 0.1 -1", "--lr"), ("distill.py --no-such-flag 1", "--no-such-flag"), ("distill.py --seed 0 x", "--seed"),
    ("distill.py --method kd fitnet", "fitnet"), ("distill.py --method", "--method"), ("distill.py --seed", "--seed"),
    ("distill.py -- train_teacher.py --beta 8", "--beta"), ("distill.py --epochs 3", "--warmup-epochs"),
    ("distill.py --experiment v9", "v9"), ("distill.py --standardize yes no --method kd", "yes"),
])
def test_a_wrong_flag_is_the_line_of_its_script(line, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cells(line)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1
    assert f"see {'train_teacher' if 'train' in line else 'distill'}.py --help" in err


def test_every_flag_of_the_scripts_is_known(monkeypatch):
    parsers = []
    monkeypatch.setattr(Parser, "parse_args", lambda self, argv: parsers.append(self) or 1 / 0)
    for script, parse in (("distill.py", options.parse_distill), ("train_teacher.py", options.parse_teacher)):
        with pytest.raises(ZeroDivisionError):
            parse("", "", [])
        for action in parsers[-1]._actions:
            for flag in set(action.option_strings) - {"-h", "--help"}:
                long = sweep_grid.SHORT.get(flag, flag)
                assert sweep_grid.has(script, long), flag
                if action.nargs in ("+", "*"):
                    assert sweep_grid.points(script, long, ("1", "2")) == [("1", "2")], flag


def test_the_control_is_named_by_its_flags():
    made = cells("distill.py --student v2_pico -- --method kd -- --method dkd --beta 2 8 -- --method dkd --beta 8 --lr 1.6 "
                 "-- train_teacher.py --model v2_pico")
    for text, at in ((None, 0), ("--method kd", 0), ("--method dkd --beta 8", 2), ("--lr 1.6", 3), ("train_teacher.py", 4),
                     *((cell.words, at) for at, cell in enumerate(made))):
        assert sweep_grid.find_control(made, text) is made[at], text
    for text in ("--method dkd", "--beta 4", "", "train_teacher.py --beta 2"):
        with pytest.raises(Failure, match="--control describes"):
            sweep_grid.find_control(made, text)


def test_flags_of_the_sweep_end_at_the_script(capsys):
    args = sweep_grid.parse_sweep("", "", "--jobs 2 --control train_teacher.py distill.py --output x -- -b 2".split())
    assert (args.jobs, args.control, args.script) == (2, "train_teacher.py", "distill.py")
    assert args.flags == ["--output", "x", "--", "-b", "2"]
    for line in ("--jobs 0 distill.py", "other.py", "", "--seed 1 distill.py", "--metric loss distill.py"):
        with pytest.raises(SystemExit) as stop:
            sweep_grid.parse_sweep("", "", line.split())
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# The table

def summary(accuracy, last=None, verdict="completed", minutes=2):
    return {"test_acc1_best": accuracy, "test_acc1_last": accuracy - 1 if last is None else last, "verdict": verdict,
            "wall_s": 60 * minutes, "selected_on": "validation split, 20 images"}


DIVERGED = {"verdict": "diverged"}
ONE, OTHER = [50.0, 52.0, 54.0], [51.0, 54.0, 57.0]


def test_statistics_by_hand_and_by_scipy():
    """Of 50, 52, 54: SD 2, standard error 2 / sqrt(3), and t(0.975; 2) = 4.302653.  Of the differences 1, 2, 3: t = 2 sqrt(3)."""
    mean, sd, low, high, _ = sweep_table.spread(ONE)
    assert (mean, sd) == (52, 2) and high - mean == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert low + high == pytest.approx(2 * mean)
    row = sweep_table.numbers("", *({seed: summary(value) for seed, value in enumerate(values)} for values in (OTHER, ONE)),
                             "test_acc1_best")
    test = stats.ttest_rel(OTHER, ONE)
    assert row["difference"] == 2 and row["p"] == pytest.approx(test.pvalue) == pytest.approx(0.0741799, rel=1e-5)
    bounds = test.confidence_interval()
    assert (row["difference_ci_low"], row["difference_ci_high"]) == pytest.approx((bounds.low, bounds.high))
    draw = random.Random(0)
    for n in range(2, 9):
        values = [draw.gauss(1, 2) for _ in range(n)]
        assert sweep_table.spread(values)[4] == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_what_is_not_defined_is_empty_and_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sweep_table.spread([]) == (None,) * 5 and sweep_table.spread([3.0]) == (3.0, *[None] * 4)
        assert sweep_table.spread([1.0, 1.0]) == (1.0, 0.0, None, None, None)
        assert sweep_table.spread([53.1 - 52.9, 51.3 - 51.1, 0.7 - 0.5])[1:] == (0.0, None, None, None), "rounding is no variance"
        row = sweep_table.numbers("", {0: DIVERGED}, {0: summary(1.0)}, "test_acc1_best")
        assert (row["n"], row["diverged"], row["pairs"], row["verdicts"]) == (0, 1, 0, "1 diverged")
        assert all(row[name] is None for name in ("mean", "sd", "ci_low", "difference", "p", "last", "minutes"))


def test_differences_are_over_common_seeds():
    row = sweep_table.numbers("", {0: summary(51.0), 1: DIVERGED, 2: summary(56.0), 7: summary(90.0)},
                             {0: summary(50.0), 1: summary(50.0), 2: summary(53.0), 3: DIVERGED}, "test_acc1_best")
    assert (row["n"], row["diverged"], row["pairs"], row["difference"], row["mean"]) == (3, 1, 2, 2.0, pytest.approx(197 / 3))


def test_the_bytes_of_the_table():
    results = {"--method kd": {seed: summary(value) for seed, value in enumerate(ONE)},
               "--method dkd": {0: summary(51.0), 1: summary(54.0), 2: summary(57.0, 3.0, "collapsed", 5)},
               "--lr 9": {0: DIVERGED, 1: summary(40.0, minutes=1)}}
    rows, note = sweep_table.table(results, "--method kd", "test_acc1_best", 1)
    head, line, *body, _, below = sweep_table.as_markdown(rows, note).splitlines()
    left, right = """\
| flags        |   n | diverged | accuracy (%) |   SD |  95 % interval | pairs | difference | its 95 % interval |     p
| ------------ | --: | -------: | -----------: | ---: | -------------: | ----: | ---------: | ----------------: | ----:
| --method kd  |   3 |        0 |        52.00 | 2.00 | 47.03 to 56.97 |     - |          - |                 - |     -
| --method dkd |   3 |        0 |        54.00 | 3.00 | 46.55 to 61.45 |     3 |      +2.00 |    -0.48 to +4.48 | 0.074
| --lr 9       |   1 |        1 |        40.00 |    - |              - |     1 |     -12.00 |                 - |     -""", """\
 | last (%) | verdicts                 | minutes |
 | -------: | ------------------------ | ------: |
 |    51.00 | 3 completed              |     2.0 |
 |    35.33 | 1 collapsed, 2 completed |     3.0 |
 |    39.00 | 1 completed, 1 diverged  |     1.0 |"""
    assert [head, line, *body] == [one + other for one, other in zip(left.splitlines(), right.splitlines(), strict=True)]
    assert all(part in below for part in (
        "test_acc1_best", "Seeds: 0, 1, 2.", "control, --method kd,", "multiple comparisons (1 made here)",
        "selected on: validation split, 20 images.", "Not finished, and not counted: 1 run."))
    records = list(csv.DictReader(files.as_csv(list(rows[0]), rows).decode().splitlines()))
    assert records[0] | {"sd": "2.0", "p": "", "pairs": "", "difference": ""} == records[0]
    assert float(records[1]["p"]) == pytest.approx(0.0741799, rel=1e-5) and records[2]["sd"] == records[2]["p"] == ""


# Processes

STUB = r'''
import fcntl, json, os, sys, time
from pathlib import Path
from rundir import errors, files
from cli import options
NAME = Path(__file__).stem

def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    lock = open(output / ".lock", "ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise errors.Failure(errors.IN_USE, f"in use ({output})", "wait") from None
    assert args.resume == "auto" and not args.overwrite
    if (output / "summary.json").exists():
        return
    files.write_json(output / "config.json", vars(args) | {"script": NAME, "device": "cpu", "amp": "off", "image_size": 32})
    begin = time.time()
    if args.lr == 98:
        raise errors.Failure(errors.CHECKPOINT, "no teacher (nowhere.pt)", "train one")
    time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
    with open("times.txt", "a") as times:
        times.write(f"{output.name} {begin} {time.time()} {os.environ['OMP_NUM_THREADS']}\n")
    if args.lr == 99:
        files.write_json(output / "status.json", {"exit_code": 6})
        raise errors.Failure(errors.DIVERGED, "val_loss is not finite", "lower --lr")
    accuracy = 50 + 7 * args.seed % 5 + (vars(args).get("beta") or 0) * (1 + args.seed % 2)
    files.write_json(output / "summary.json", {
        "test_acc1_best": accuracy, "test_acc1_last": accuracy - 1, "wall_s": time.time() - begin, "verdict": "completed",
        "selected_on": "validation split"})

errors.run(main, (options.parse_distill if NAME == "distill" else options.parse_teacher)("", ""))
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with sweep.py and stubs of the scripts that it starts; the current one."""
    shutil.copy(ROOT / "sweep.py", tmp_path)
    for name in ALLOWED:
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("distill.py", "train_teacher.py"):
        (tmp_path / name).write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def start(line, folder=".", **environment):
    return subprocess.Popen([sys.executable, str(Path(folder) / "sweep.py"), *shlex.split(line)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)


def sweep(line, folder=".", **environment):
    """-> exit code, stdout, stderr."""
    process = start(line, folder, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def times():
    return [line.split() for line in Path("times.txt").read_text().splitlines()] if Path("times.txt").exists() else []


def timeless(folder):
    """The table without its column of time, and its note."""
    text = Path(folder, "table.md").read_text().splitlines()
    records = list(csv.DictReader(Path(folder, "table.csv").read_text().splitlines()))
    return [line.rpartition(" | ")[0] or line for line in text], [record | {"minutes": None} for record in records]


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(what, limit=20):
    end = time.monotonic() + limit
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def one_line(err, *parts):
    assert err.startswith("error: ") and err.count("\n") == 1 and all(part in err for part in parts), err


def test_a_sweep_and_the_same_one_again(place):
    line = "--jobs 2 --output s distill.py --method dkd --beta 1 2 --seed 0 1 -- -- train_teacher.py --model v2_pico"
    code, out, err = sweep(line, STUB_SECONDS="0.2")
    assert (code, err) == (0, ""), out + err
    assert len(times()) == 6 and out.startswith("6 runs of 3 cells, 2 at once, compared with --beta 1 -> s\n")
    assert re.search(r"^\[6/6\] .* seed 1: completed, \d\d.\d\d %  \(0:00:0\d, eta 0:00:00\)$", out, re.M), out
    assert out.endswith(Path("s/table.md").read_text())
    assert {path.name for path in Path("s").iterdir()} == {
        ".lock", "sweep.json", "logs", "table.md", "table.csv",
        *(f"{name}-s{seed}" for name in ("beta-1", "beta-2", "train_teacher_model-v2_pico") for seed in (0, 1))}
    assert {threads for *_, threads in times()} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    moments = sorted((float(at), change) for _, begin, end, _ in times() for at, change in ((begin, 1), (end, -1)))
    assert max(itertools.accumulate(change for _, change in moments)) <= 2
    assert Path("s/logs/beta-1-s0.txt").read_text().startswith("$ python distill.py --method dkd --beta 1 --seed 0 --resume auto")

    table = Path("s/table.md").read_bytes()
    code, again, err = sweep(line)
    assert code == 0 and len(times()) == 6, "a finished run was started again"
    assert "[6/6]" in again and again.count("(it was there)") == 6 and Path("s/table.md").read_bytes() == table
    code, out, err = sweep("--control '--beta 2' --metric test_acc1_last " + line, OMP_NUM_THREADS="1")
    assert code == 0 and "control, --beta 2," in out and "test_acc1_last" in out


def test_a_dry_run_lists_and_leaves_nothing(place):
    code, out, err = sweep("--dry-run --output s distill.py --lr 0.1 0.2")
    assert code == 0 and out.splitlines()[1:] == [
        f"python distill.py --lr {lr} --seed 42 --resume auto --output s/lr-{lr}-s42" for lr in ("0.1", "0.2")]
    assert not Path("s").exists()


def test_a_run_with_other_flags_is_refused_before_anything_starts(place):
    assert sweep("--output s distill.py --lr 0.1 --seed 1")[0] == 0
    begun = len(times())
    for flags in ("--lr 0.2", "--lr 0.1 --image-size 24", "--lr 0.1 --epochs 300", "--lr 0.1 --amp bf16"):
        code, out, err = sweep(f"--output s distill.py --seed 0 1 {flags}")
        assert code == 2, out
        one_line(err, "s/distill-s1", "->")
    for flags in ("--amp off", "--device cpu", "--grad-checkpoint"):  # what the run decided itself, and what no result depends on
        assert sweep(f"--output s distill.py --seed 1 --lr 0.1 {flags}")[0] == 0
    Path("s/sweep.json").unlink()
    assert sweep("--output s distill.py --seed 1 --lr 0.1")[0] == 0
    config = json.loads(Path("s/distill-s1/config.json").read_text())
    Path("s/distill-s1/config.json").write_text(json.dumps(config | {"weight_decay": 0.5}))
    code, _, err = sweep("--output s distill.py --seed 1 --lr 0.1")
    assert code == 2 and len(times()) == begun
    one_line(err, "weight_decay 0.5 -> 0.05")
    Path("s/distill-s1/config.json").write_text("{")
    code, _, err = sweep("--output s distill.py --seed 1 --lr 0.1")
    assert code == 4
    one_line(err, "s/distill-s1/config.json")
    Path("s/distill-s1/config.json").write_text(json.dumps(config))
    Path("s/sweep.json").write_text('{"distill-s1": 3}')
    code, _, err = sweep("--output s distill.py --seed 1 --lr 0.1")
    assert code == 4
    one_line(err, "s/sweep.json", "not the flags")


def test_a_control_whose_quotes_do_not_close_is_refused(place):
    code, _, err = sweep("""--dry-run --control "--lr '1" distill.py --lr 1 2""")
    assert code == 2
    one_line(err, "--control cannot be read", "quotes")


def test_runs_of_another_sweep_in_its_directory_are_told(place):
    assert "left out" not in sweep("--output s distill.py --seed 0 --lr 1 2")[1]
    code, out, _ = sweep("--output s distill.py --seed 0 --lr 3")
    assert code == 0 and "2 runs of another are left out: lr-1-s0, ..." in out


def test_another_teacher_is_refused(place):
    Path("teacher.pt").write_bytes(b"one")
    line = "--output s distill.py --teacher-checkpoint teacher.pt"
    assert sweep(line)[0] == 0
    path = Path("s/distill-s42/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher_sha256": sweep_jobs.digest_once(Path("teacher.pt"))}))
    assert sweep(line)[0] == 0
    Path("moved.pt").write_bytes(b"one")
    assert sweep(line.replace("teacher.pt", "moved.pt"))[0] == 0, "the same teacher"
    Path("teacher.pt").write_bytes(b"two")
    code, _, err = sweep(line)
    assert code == 2 and "teacher_sha256" in err


def test_the_content_of_files_decides_and_not_their_path(place):
    for folder in ("one", "two"):
        make_images(place / folder, ["a", "b"], 4, seed=0)
    Path("start.pt").write_bytes(b"weights")
    Path("moved.pt").write_bytes(b"weights")
    line = "--output s train_teacher.py --dataset imagefolder --data-dir {} --init {}"
    assert sweep(line.format("one", "start.pt"))[0] == 0
    path = Path("s/train_teacher-s42/config.json")
    known = {"data_sha256": sweep_jobs.fingerprint("imagefolder", "one", None),
             "init_sha256": sweep_jobs.digest_once(Path("start.pt"))}
    path.write_text(json.dumps(json.loads(path.read_text()) | known))
    assert sweep(line.format("./two/", "moved.pt"))[0] == 0 and len(times()) == 1
    for other, said in ((line.format("one", "lost.pt"), "init start.pt -> lost.pt"), (line.format("lost", "start.pt"), "lost")):
        code, _, err = sweep(other)
        assert code in (2, 4)
        one_line(err, said)
    shutil.rmtree("two")
    make_images(place / "two", ["a", "b"], 4, seed=1)
    code, _, err = sweep(line.format("two", "start.pt"))
    assert code == 2
    one_line(err, "data_dir one -> two")


def test_runs_on_different_images_do_not_share_a_row(place):
    """As where the images in the folder were replaced between two calls."""
    assert sweep("--output s distill.py --seed 0 1")[0] == 0
    for seed, images in ((0, "aa"), (1, "bb")):
        path = Path(f"s/distill-s{seed}/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data_sha256": images}))
    code, _, err = sweep("--output s distill.py --seed 0 1")
    assert code == 4
    one_line(err, "s/distill-s0", "s/distill-s1")


def test_a_diverged_run_is_a_result_and_a_failed_one_is_told(place):
    line = "--output s distill.py --seed 0 1 -- --lr 0.1 -- --lr 99 -- --lr 98"
    code, out, err = sweep(line)
    assert code == 5, out
    one_line(err, "2 of 6 runs failed", "s/logs/lr-98-s0.txt", "no teacher (nowhere.pt)")
    assert out.count("failed with exit code 5: no teacher (nowhere.pt). train one (s/logs/lr-98-s") == 2
    assert "--lr 99 seed 0: diverged" in out and "Not finished, and not counted: 2 runs." in out
    rows = {row["flags"]: row for row in csv.DictReader(Path("s/table.csv").read_text().splitlines())}
    assert [(rows[f"--lr {lr}"]["n"], rows[f"--lr {lr}"]["diverged"]) for lr in ("0.1", "99", "98")] == [
        ("2", "0"), ("0", "2"), ("0", "0")]
    assert rows["--lr 99"]["verdicts"] == "2 diverged" and rows["--lr 99"]["mean"] == ""
    begun = len(times())
    code, again, _ = sweep(line)
    assert code == 5 and len(times()) == begun, "a diverged run was started again"


def test_a_killed_child_fails_and_is_continued(place):
    process = start("--output s distill.py --seed 0", STUB_SECONDS="20")
    wait_for(lambda: Path("s/distill-s0/config.json").exists())
    os.kill(*children(process), signal.SIGKILL)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 137, out
    one_line(err, "1 of 1 runs failed")
    assert sweep("--output s distill.py --seed 0")[0] == 0


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_and_waited_for(place, number, code):
    process = start("--jobs 2 --output s distill.py --seed 0 1 2", STUB_SECONDS="20")
    wait_for(lambda: all(Path(f"s/distill-s{seed}/config.json").exists() for seed in (0, 1)))
    pids = children(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code and len(pids) == 2
    one_line(err, f"stopped ({number.name}). the same command goes on")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids) and not Path("s/distill-s2").exists()
    assert f"stopped ({number.name})" in Path("s/logs/distill-s0.txt").read_text()
    assert sweep("--jobs 2 --output s distill.py --seed 0 1 2")[0] == 0


def test_two_sweeps_do_not_share_a_directory(place):
    process = start("--output s distill.py --seed 0", STUB_SECONDS="20")
    wait_for(lambda: Path("s/distill-s0/config.json").exists())
    code, _, err = sweep("--output s distill.py --seed 1")
    process.terminate()
    process.communicate(timeout=10)
    assert code == 3
    one_line(err, "another sweep", "(s)")


def kill(process, orphans: bool):
    """SIGKILL, of the sweep alone or with its runs; -> the ids of the runs that are left."""
    os.kill(process.pid, signal.SIGSTOP)  # so that it starts no other meanwhile
    pids = children(process)
    process.kill()
    process.communicate()
    for pid in pids if not orphans else ():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids if orphans else []


def test_killed_at_any_moment_it_ends_with_the_same_table(place):
    line = "distill.py --method dkd --beta 1 2 --seed 0 1 2"
    begin = time.monotonic()
    assert sweep(f"--jobs 2 --output undisturbed {line}", STUB_SECONDS="0.4")[0] == 0
    usual = time.monotonic() - begin
    for orphans in (True, False, True):
        process = start(f"--jobs 2 --output s {line}", STUB_SECONDS="0.4")
        with suppress(subprocess.TimeoutExpired):
            process.wait(DRAW.uniform(0, usual / 2))
        kill(process, orphans)
    code, out, err = sweep(f"--jobs 2 --output s {line}", STUB_SECONDS="0.4")
    assert (code, err) == (0, ""), out + err
    assert timeless("s") == timeless("undisturbed") and len(times()) >= 12


def test_an_orphan_is_waited_for_and_not_started_beside(place):
    process = start("--output s distill.py --seed 0", STUB_SECONDS="2")
    wait_for(lambda: Path("s/distill-s0/config.json").exists())
    assert len(kill(process, orphans=True)) == 1
    code, out, err = sweep("--output s distill.py --seed 0")
    assert (code, err, len(times())) == (0, "", 1) and "waiting for another process" in out and "(it was there)" in out


# The real scripts

RECIPE = ("--dataset imagefolder --data-dir images --epochs 2 --warmup-epochs 0 --batch-size 8 --opt sgd --val-size 12 "
          "--device cpu --kernels reference --policy none --random-erasing 0 --mixup 0 --cutmix 0")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with images and a teacher."""
    folder = tmp_path_factory.mktemp("sweep")
    classes = [f"class{index}" for index in range(4)]
    make_images(folder / "images" / "train", classes, 24, seed=0)
    make_images(folder / "images" / "test", classes, 6, seed=1)
    done = subprocess.run([sys.executable, str(ROOT / "train_teacher.py"), "--model", "v2_pico", *RECIPE.split(), "--lr", "0.1"],
                          cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def real(seeds, epochs=2):
    return (f"distill.py --student v2_pico {RECIPE.replace('--epochs 2', f'--epochs {epochs}')} --lr 0.1 --seed {seeds} "
            "-- --method kd -- --method dkd --beta 8 --lr 1e30 --seed 0 -- train_teacher.py --model v2_pico --seed 0")


def test_a_sweep_of_the_real_scripts(images, monkeypatch):
    monkeypatch.chdir(images)
    line = f"--jobs 2 --output s --control train_teacher.py {real('0')}"
    code, out, err = sweep(line, ROOT, OMP_NUM_THREADS="1")
    assert (code, err) == (0, ""), out + err
    rows = list(csv.DictReader(Path("s/table.csv").read_text().splitlines()))
    assert [(row["flags"], row["n"], row["diverged"], row["pairs"]) for row in rows] == [
        ("--lr 0.1 --method kd", "1", "0", "1"), ("--lr 1e30 --method dkd --beta 8", "0", "1", "0"),
        ("train_teacher.py --lr 0.1 --model v2_pico", "1", "0", "")]
    student, alone = (json.loads(Path(f"s/{name}-s0/summary.json").read_text())["test_acc1_best"]
                      for name in ("lr-0.1_method-kd", "train_teacher_lr-0.1_model-v2_pico"))
    assert float(rows[0]["mean"]) == student and float(rows[0]["difference"]) == student - alone
    logs = {path: path.read_bytes() for path in Path("s/logs").iterdir()}
    code, out, _ = sweep(line, ROOT)
    assert code == 0 and out.count("(it was there)") == 3 and {path: path.read_bytes() for path in logs} == logs


@pytest.mark.skipif("TORTURE" not in os.environ, reason="minutes; make torture")
def test_a_real_sweep_killed_ten_times(images, monkeypatch):
    monkeypatch.chdir(images)
    line, begin, number = real("0 1", epochs=4), time.monotonic(), 0
    assert sweep(f"--jobs 2 --output undisturbed {line}", ROOT, OMP_NUM_THREADS="1")[0] == 0
    usual, kills = time.monotonic() - begin, 0
    while kills < 10:
        process = start(f"--jobs 2 --output killed{number} {line}", ROOT, OMP_NUM_THREADS="1")
        with suppress(subprocess.TimeoutExpired):
            process.wait(DRAW.uniform(0, usual / 2))
        ended = process.poll()
        if ended is None:
            kill(process, orphans=DRAW.random() < 0.5)
            kills += 1
        else:
            process.communicate()
            assert ended == 0
        if ended is not None or kills == 10:
            code, out, err = sweep(f"--jobs 2 --output killed{number} {line}", ROOT, OMP_NUM_THREADS="1")
            assert (code, err) == (0, ""), out + err
            assert timeless(f"killed{number}") == timeless("undisturbed")
            for run in (path.parent.name for path in Path("undisturbed").glob("*/summary.json")):
                losses = [[row["val_loss"] for row in csv.DictReader(Path(folder, run, "log.csv").read_text().splitlines())]
                          for folder in ("undisturbed", f"killed{number}")]
                assert losses[0] == losses[1] and len(losses[0]) == 4
            number += 1
