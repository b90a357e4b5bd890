"""Killed, stopped, damaged, poisoned and crowded runs end as the uninterrupted one, bit for bit, or in one line.

Every run is a process of its own, forked from one that has imported torch (tests/torture.py, which does all this by the
hundred).  Its clock columns aside, log.csv must be the same, and every tensor and number of last.pt and best.pt.
"""
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import faults
import pytest
import torch
import torture
from helpers import Touch, random_moments, table_of, wait_for

from rundir import resume

STEPS = 4  # of an epoch of these runs
TEACHER_PAIR = torture.command("teacher").replace("train_teacher", "torchrun --nproc-per-node 2 train_teacher")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield torture.Workplace(tmp_path_factory.mktemp("reliability"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def a_copy(place, kind, epochs=3):
    """The uninterrupted run as it is, or as it was after an earlier epoch."""
    run, source = torture.new_run(place), place.undisturbed(kind)
    if epochs < 3:
        source = source.with_name(f"{kind}-{epochs}")
    if not source.exists():
        result = place.run(f"{torture.command(kind)} --output {source}", partial(faults.poison, "ce", range(STEPS * epochs, 100)))
        assert result.code == 6, result.err
    return shutil.copytree(source, run, dirs_exist_ok=True)


def one_line(result, code, *words):
    assert result.code == code, f"exit {result.code}\n{result.out}\n{result.err}"
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ") and result.err.count("error: ") == 1 and "Traceback" not in result.err, result.err
    assert all(word in line for word in words), line


def all_pass(place, attempt, *arguments):
    """Make attempts two at a time, a process for each of two cores."""
    for kind in torture.COMMANDS:
        place.undisturbed(kind)
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(lambda each: attempt(place, *each), arguments)
        assert dict(zip(arguments, outcomes)) == dict.fromkeys(arguments, "")


# --- killed and stopped


def test_another_seed_gives_another_run(place):
    """The same seed gives the same run below: killed before its first write, it is repeated as a whole."""
    run, whole = torture.new_run(place), place.undisturbed("student")
    assert place.run(f"{torture.command('student')} --output {run} --seed 43 --epochs 2").code == 0
    assert torture.log_of(run)[0]["train_loss"] != torture.log_of(whole)[0]["train_loss"]


def test_a_crash_before_any_write_loses_nothing(place):
    """Points 1 to 9 are config.json, env.json, status.json; 10 to 21 epoch 1, with diagnostics.csv from 16; from 22 epoch 2,
    with prev.pt; 45 the teacher's best.pt with its test accuracy."""
    all_pass(place, torture.crash_point, ("student", 2), ("teacher", 45), ("pair", 24))


def test_a_kill_at_any_time_loses_nothing(place):
    draw = random_moments()
    all_pass(place, torture.interruption, (draw.choice(list(torture.COMMANDS)), signal.SIGKILL, draw.random()))


def test_a_signal_stops_at_once_with_advice_and_its_code(place):
    all_pass(place, torture.interruption, ("pair", signal.SIGTERM, random_moments().uniform(0.3, 0.9)))


def test_a_stopped_run_has_its_reason_in_its_status(place):
    run = torture.new_run(place)
    process = place.start(f"{torture.command('teacher')} --output {run}", partial(faults.slow_steps, 0.2))
    wait_for(run / "log.csv")
    os.kill(process.pid, signal.SIGTERM)
    one_line(place.finish(process), 143, "SIGTERM", "--resume auto")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["epoch"]) == ("stopped", 143, 1)


def test_a_second_signal_ends_at_once(place):
    """The first waits for a checkpoint that takes 20 s; the second does not."""
    run = torture.new_run(place)
    process = place.start(f"{torture.command('teacher')} --output {run}", partial(faults.slow_disk, 20))
    wait_for(run / "last.pt.tmp")
    sent = time.perf_counter()
    while process.processes[0].is_alive():  # those that arrive before the first is handled count as one
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.1)
    took, result = time.perf_counter() - sent, place.finish(process)
    assert result.code == -signal.SIGINT and took < 10 and not (run / "last.pt").exists()


def test_what_is_written_is_what_was_handed_over(place):
    """Training goes on, and changes the weights in place, while the epoch before is still being written."""
    run, whole = torture.new_run(place), place.undisturbed("teacher")
    assert place.run(f"{torture.command('teacher')} --output {run}", partial(faults.slow_disk, 0.4)).code == 0
    assert torture.difference(run, whole) == torture.difference(run, whole, "prev.pt") == ""


# --- resuming


def test_resume_auto_starts_continues_and_is_done(place):
    run, line = torture.new_run(place), f"{torture.command('teacher')} --epochs 2"
    first = place.run(f"{line} --output {run} --resume auto")
    assert first.code == 0 and "nothing to continue" in first.out and not first.err
    before = contents(run)
    again = place.run(f"{line} --output {run} --resume")
    assert again.code == 0 and "already finished" in again.out and not again.err
    one_line(place.run(f"{line} --output {run}"), 2, str(run), "--resume auto", "--overwrite")
    assert contents(run) == before, "a finished run was touched"
    for run in (run, place.undisturbed("student")):  # --config gives what a run found out, such as the image size, as flags
        script = json.loads((run / "config.json").read_text())["script"]
        again = place.run(f"{script}.py --config {run}/config.json --device cpu --output {run} --resume auto")
        assert again.code == 0 and "already finished" in again.out, again.err
    run = a_copy(place, "teacher")
    for command in (f"train_teacher.py --config {run}/config.json --device cpu --epochs 4", f"{line} --epochs 5"):
        again = place.run(f"{command} --output {run} --resume auto")
        assert again.code == 0 and "continuing after epoch" in again.out, again.err


def test_more_epochs_continue_a_finished_run_and_fewer_do_not(place):
    run, line = a_copy(place, "teacher"), torture.command("teacher")
    one_line(place.run(f"{line} --output {run} --resume auto --epochs 2"), 2, "--epochs 3 -> 2")
    first = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(first | {"torch": "2.0.0"}))
    longer = place.run(f"{line} --output {run} --resume auto --epochs 5 --patience 7")
    assert longer.code == 0 and "warning: --epochs grows from 3 to 5" in longer.err and "continuing after epoch 3" in longer.out
    rows = torture.log_of(run)
    assert [row["epoch"] for row in rows] == list("12345") and rows[:3] == torture.log_of(place.undisturbed("teacher"))
    assert json.loads((run / "summary.json").read_text())["epochs"] == 5 and float(rows[3]["lr"]) > float(rows[2]["lr"])
    total = [float(row["total_s"]) for row in table_of(run / "log.csv")]
    assert total == sorted(total), "the clock of a resumed run goes on"
    here = json.loads((run / "env.json").read_text())
    assert [each["torch"] for each in here["earlier"]] == ["2.0.0"] and here["torch"] == first["torch"]
    assert (here["after_epoch"], here["earlier"][0]["after_epoch"]) == (3, 0)


def test_the_content_of_files_decides_and_not_their_path(place):
    """As after a move to another disk."""
    moved, run, teacher = place.folder / "moved", torture.new_run(place), place.undisturbed("teacher") / "best.pt"
    shutil.copytree(place.folder / "images", moved / "images")
    shutil.copy(teacher, moved / "teacher.pt")
    line = f"{torture.command('student')} --student resnet8 --student-init {teacher} --teacher-checkpoint {teacher} --epochs 2"
    other = f"{line.replace(str(teacher), str(moved / 'teacher.pt'))} --data-dir {moved}/images/ --resume auto"
    assert place.run(f"{line} --output {run}", partial(faults.die_at, 20)).code == -signal.SIGKILL
    result = place.run(f"{other} --output {run}")
    assert result.code == 0 and "continuing after epoch 1" in result.out, result.err
    assert "already finished" in place.run(f"{other} --output {run}").out
    another = place.undisturbed("student") / "best.pt"
    for flag, named in (("--teacher-checkpoint", "teacher_sha256"), ("--student-init", "--student-init")):
        one_line(place.run(f"{other} --output {run} {flag} {another}"), 2, named)
    before = contents(run)
    min((moved / "images" / "train" / "class0").iterdir()).unlink()
    one_line(place.run(f"{other} --output {run} --epochs 3"), 4, "differ from those at the start of the run")
    assert contents(run) == before


def test_a_run_keeps_its_number_of_threads(place):
    """Two threads add in another order than one, which comes to other bits."""
    run, whole, line = torture.new_run(place), torture.new_run(place), torture.command("teacher")
    assert place.run(f"{line} --output {whole}", partial(faults.with_threads, 2)).code == 0
    killed = partial(faults.with_threads, 2, partial(faults.die_at, 20))
    assert place.run(f"{line} --output {run}", killed).code == -signal.SIGKILL
    result = place.run(f"{line} --output {run} --resume auto")
    assert result.code == 0 and result.out.count("using 2 threads, as the run began with, instead of 1") == 1
    here = json.loads((run / "env.json").read_text())
    assert (here["threads"], here["after_epoch"], here["earlier"]) == (2, 0, [])
    assert torture.difference(run, whole) == ""


def test_an_early_stop_stays_stopped_until_patience_grows(place):
    run, line = torture.new_run(place), torture.command("teacher")
    assert place.run(f"{line} --output {run} --patience 1").code == 0
    assert len(torture.log_of(run)) == 2, "val_loss was meant to grow at such a learning rate"
    again = place.run(f"{line} --output {run} --patience 1 --resume auto")
    assert "early stop" in again.out and len(torture.log_of(run)) == 2
    assert place.run(f"{line} --output {run} --patience 0 --resume auto").code == 0
    assert len(torture.log_of(run)) == 3


def test_a_path_continues_in_another_directory(place):
    source, run = a_copy(place, "teacher", epochs=2), torture.new_run(place)
    before, line = contents(source), torture.command("teacher")
    for path in (source / "last.pt", source):
        shutil.rmtree(run)
        result = place.run(f"{line} --output {run} --resume {path}")
        assert result.code == 0, result.err
        assert torture.difference(run, place.undisturbed("teacher")) == "" and contents(source) == before
    one_line(place.run(f"{line} --output {run} --resume {source}"), 2, "not empty", str(run))
    one_line(place.run(f"{line} --output {run}-new --resume {source}/lost.pt"), 5, "lost.pt")


# Flags that make another experiment, with another value: of every type, and those that name files.
OTHER = ("--lr 0.1", "--seed 1", "--image-size 12", "--milestones 1", "--policy none", "--deterministic", "--experiment v3",
         "--student resnet8", "--student-init x.pt", "--teacher-checkpoint other.pt")
SAME = ("--epochs 3", "--patience 9", "--overwrite", "--debug", "--device cpu")


def with_each_flag(flags):
    """Run the script with one more flag after another, in this process; print how each ends before any data are read."""
    for flag in flags:
        argv, sys.argv = sys.argv, [*sys.argv, *flag.split()]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        sys.argv = argv
        print(f"{code}\t{flag}", file=sys.stderr, flush=True)
    os._exit(0)


def test_flags_that_make_another_experiment_are_refused_and_others_are_not(place):
    run, teacher = a_copy(place, "student"), place.undisturbed("teacher") / "best.pt"
    content, good = torch.load(teacher, weights_only=True), teacher.read_bytes()
    torch.save(content | {"seed": 43}, place.folder / "other.pt")
    before, line = contents(run), f"{torture.command('student')} --output {run} --resume auto"
    lines = place.run(line, partial(with_each_flag, (*OTHER, *SAME))).err.splitlines()
    for flag in OTHER:
        at, name = lines.index(f"2\t{flag}"), flag.partition(" ")[0]
        assert lines[at - 1].startswith("error: these flags") and f"{name} " in lines[at - 1] and " -> " in lines[at - 1]
    assert [text for text in lines if text.startswith("0\t")] == [f"0\t{flag}" for flag in SAME], lines
    teacher.write_bytes((place.folder / "other.pt").read_bytes())  # another one under the old name
    result = place.run(line)
    teacher.write_bytes(good)
    one_line(result, 2, "teacher_sha256")
    assert contents(run) == before, "a refused run was touched"


# --- damaged checkpoints


def flip(path):
    good = path.read_bytes()
    middle = len(good) // 2
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 4]) + good[middle + 1:])


@pytest.mark.parametrize("damage", [flip, os.unlink])
def test_a_damaged_last_falls_back_to_the_one_before(place, damage):
    run, line = a_copy(place, "teacher", epochs=2), f"{torture.command('teacher')} --resume auto"
    damage(run / "last.pt")
    killed = shutil.copytree(run, run.with_name(f"{run.name}-killed"))
    result = place.run(f"{line} --output {run}")
    assert result.code == 0 and result.err.startswith("warning: "), result.err
    assert "last.pt" in result.err and "continuing with" in result.err, result.err
    assert "continuing after epoch 1" in result.out and torture.difference(run, place.undisturbed("teacher")) == ""
    if damage is flip:  # a crash after the first checkpoint was written, at which the damaged one would have become prev.pt
        assert place.run(f"{line} --output {killed}", partial(faults.die_at, 22)).code == -signal.SIGKILL
        assert torture.outcome_of_resuming(place, "teacher", killed) == ""


def test_a_run_without_a_good_checkpoint_is_never_started_again(place):
    run, line = a_copy(place, "teacher"), f"{torture.command('teacher')} --resume auto"
    shutil.copy(place.undisturbed("teacher") / "best.pt", run / "last.pt")  # weights, not the state of a run
    torch.save({"format": 1, "kind": "run", "w": Touch(place.folder / "evil-was-here")}, run / "prev.pt")
    before = contents(run)
    one_line(place.run(f"{line} --output {run} --overwrite"), 5, "last.pt")
    assert contents(run) == before and not (place.folder / "evil-was-here").exists()
    for name in ("last.pt", "prev.pt"):
        (run / name).unlink()
    one_line(place.run(f"{line} --output {run}"), 5, "last.pt")


def test_checkpoints_hold_plain_data_only(place):
    content = torture.tensors_of(resume.read_run(place.undisturbed("student") / "last.pt"))
    assert {type(value) for value in content.values()} <= {torch.Tensor, int, float, str, bool, type(None), dict, list}
    weights = [value for value in content.values() if isinstance(value, torch.Tensor)]
    assert weights and all(value.untyped_storage().nbytes() == value.nbytes for value in weights), "a view saves all its storage"


# --- the disk, and a crowded directory


def test_a_full_disk_at_any_write_costs_nothing(place):
    all_pass(place, torture.full_disk_point, ("pair", 13))


def test_a_disk_that_fills_up_later_leaves_the_last_good_epoch(place):
    run = a_copy(place, "teacher", epochs=2)
    result = place.run(f"{torture.command('teacher')} --output {run} --resume auto", partial(faults.fill_the_disk, 500_000))
    one_line(result, 8, "last.pt", "needs 0.9 MB", "MB free", "epoch 2", "--resume auto")
    assert torture.outcome_of_resuming(place, "teacher", run) == ""


@pytest.mark.parametrize("line, extra", [(torture.command("teacher"), "--overwrite"), (TEACHER_PAIR, "--resume auto")])
def test_the_second_run_in_a_directory_leaves_at_once(place, line, extra):
    run = torture.new_run(place)
    first = place.start(f"{line} --output {run}", partial(faults.slow_steps, 3))
    wait_for(run / "status.json", "running")
    second = place.run(f"{line} --output {run} {extra}")
    os.kill(first.pid, signal.SIGKILL)
    place.finish(first)
    one_line(second, 3, str(run))
    assert second.seconds < 5


# --- non-finite steps


@pytest.mark.parametrize("kind, precision, fault", [
    ("teacher", "off", partial(faults.poison_images, [6])), ("student", "fp16", partial(faults.poison, "nckd", [6])),
    ("pair", "off", partial(faults.on_rank, 1, partial(faults.poison, "kl", [6])))])
def test_one_poisoned_batch_is_skipped(place, kind, precision, fault):
    """By both processes of a pair, whichever had it."""
    place.undisturbed("teacher")
    run = torture.new_run(place)
    result = place.run(f"{torture.command(kind)} --epochs 2 --amp {precision} --output {run}", fault)
    assert result.code == 0, result.err
    last, rows = resume.read_run(run / "last.pt"), torture.log_of(run)
    assert all(value.isfinite().all() for value in last["update"]["net"].values())
    skipped = [int(row["skipped_steps"]) for row in rows]
    assert skipped[1] >= 1 if precision == "fp16" else skipped == [0, 1]
    assert all(float(row["train_loss"]) < 100 for row in rows)


def test_a_run_that_only_skips_stops_with_the_last_finite_checkpoint(place):
    run = torture.new_run(place)
    result = place.run(f"{torture.command('student')} --output {run}", partial(faults.poison, "nckd", range(7, 1000)))
    one_line(result, 6, "train_loss_nckd", "not finite", "--lr")
    last = resume.read_run(run / "last.pt")
    assert last["epoch"] >= 1 and all(value.isfinite().all() for value in last["update"]["net"].values())
    assert json.loads((run / "status.json").read_text())["exit_code"] == 6


# --- several processes on one run


def test_a_pair_prints_once_and_is_one_identity(place):
    run, line = a_copy(place, "pair"), torture.command("pair")
    before = contents(run)
    assert place.run(f"{line} --output {run} --resume auto").out.count("already finished") == 1
    alone = line.replace("torchrun --nproc-per-node 2 ", "")
    one_line(place.run(f"{alone} --output {run} --resume auto --batch-size 8"), 2, "processes 2 -> 1")
    one_line(place.run(f"{line} --output {run}"), 2, "not empty")
    assert contents(run) == before


def test_a_pair_that_lost_one_is_continued_by_the_other(place):
    run, pair = torture.new_run(place), torture.command("pair")
    place.undisturbed("teacher")
    first = place.run(f"{pair} --output {run}", partial(faults.on_rank, 0, partial(faults.die_at, 30)))
    assert first.code != 0 and first.out.count("epoch 1/3") == 1
    assert "2 processes with --batch-size 8: 16 images a step" in first.out
    left, single = torture.log_of(run), pair.replace("torchrun --nproc-per-node 2 ", "") + f" --output {run} --resume auto"
    alone = place.run(f"{single} --batch-size 16")
    assert alone.code == 0 and alone.err.count("warning: --batch-size per process changes from 8 to 16") == 1, alone.err
    rows = torture.log_of(run)
    assert len(rows) == 3 and rows[:len(left)] == left and len(left) > 0
    assert len({row["steps"] for row in rows}) == 1


def test_three_processes_add_up_to_the_same_bits_when_resumed(place, monkeypatch):
    """Three numbers may round to another sum in another order; this network's gradients travel in two groups."""
    line = torture.COMMANDS["pair"].replace("node 2", "node 3").replace("forgetful", "v2_tiny")
    monkeypatch.setitem(torture.COMMANDS, "trio", f"{line} --amp off --epochs 2")
    place.undisturbed("trio")
    assert torture.crash_point(place, "trio", 21) == ""


@pytest.mark.parametrize("flags, fault, code, words", [
    ("", partial(faults.on_rank, 1, faults.run_out_of_memory), 7, ["out of GPU memory", "--batch-size 4"]),
    ("", partial(faults.on_rank, 1, partial(faults.poison, "kl", range(1000))), 6, ["train_loss_kl is not finite"]),
    ("", faults.hang, 1, ["another process of this run stopped responding", "--resume auto"]),
    ("--device cuda:1", None, 2, ["every process needs its own GPU"]),
    ("--lr -1", partial(faults.on_rank, 0, partial(time.sleep, 2)), 2, ["--lr"]),  # rank 1 ends first
    ("--output undisturbed/teacher", partial(faults.on_rank, 1, faults.connect_slowly), 2, ["not empty"]),
], ids=["memory", "loss", "hang", "device", "flag", "directory"])
def test_whatever_ends_a_pair_is_one_line(place, flags, fault, code, words):
    """Without what the C++ of PyTorch prints in a process that ends before all are connected."""
    place.undisturbed("teacher")
    result = place.run(f"{torture.command('pair')} --epochs 20 --output {torture.new_run(place)} {flags}", fault)
    one_line(result, code, *words)
    assert result.err.count("\n") == 1 and result.seconds < 15


def test_torture_starts(place):
    """Without its attempts."""
    result = place.run("tests/torture.py --help")
    assert result.code == 0 and "--kills" in result.out, result.err


@pytest.mark.skipif("TORTURE" not in os.environ, reason="takes long: three processes import torch")
def test_torchrun_itself_stops_within_ten_seconds_and_the_run_goes_on(place):
    """With one of its processes in the middle of a step."""
    whole, run = torture.new_run(place), torture.new_run(place)
    assert place.run(f"{TEACHER_PAIR} --output {whole}").code == 0
    command = TEACHER_PAIR.replace("train_teacher.py", str(torture.ROOT / "train_teacher.py")).replace(
        "torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
    with open(place.folder / "torchrun.log", "w") as log:
        launcher = subprocess.Popen([*shlex.split(command), "--output", run], cwd=place.folder, stdout=log, stderr=log,
                                    env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})
    wait_for(run / "log.csv")
    sent = time.perf_counter()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(10) != 0 and time.perf_counter() - sent < 10
    assert len(torture.log_of(run)) < 3, "it was to be stopped before its end"
    result = place.run(f"{TEACHER_PAIR} --output {run} --resume auto")  # the lock is free: all its processes have ended
    assert result.code == 0 and torture.difference(run, whole) == "", result.err
