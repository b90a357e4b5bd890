"""Nothing is ever lost: killed, stopped, corrupted, poisoned and crowded runs end as the undisturbed one, or in one line.

Every run is a process of its own, forked from one that has imported torch (tests/torture.py, which does all this by the
thousand).  "The same" is bit for bit, in log.csv but for its clock columns and in every tensor and number of last.pt and best.pt.
"""
import csv
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torture

from rundir import resume

STEPS = 4  # of an epoch of these runs
KINDS = ("teacher", "student")
DRAW = random.Random(time.time_ns())  # other moments in every test run: each of them has to do


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield torture.Workplace(tmp_path_factory.mktemp("reliability"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def a_copy(place, kind, epochs=3):
    """The undisturbed run as it is, or as it was after an earlier epoch."""
    run = torture.new_run(place)
    if epochs == 3:
        shutil.copytree(place.undisturbed(kind), run, dirs_exist_ok=True)
        return run
    result = place.run(f"{torture.command(kind)} --output {run}", partial(torture.poison, "ce", range(STEPS * epochs, 100)))
    assert result.code == 6, result.err
    return run


def one_line(result, code, *words):
    assert result.code == code, f"exit {result.code}\n{result.out}\n{result.err}"
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ") and result.err.count("error: ") == 1 and "Traceback" not in result.err, result.err
    assert all(word in line for word in words), line
    return line


# --- killed and stopped


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_run_and_another_does_not(place, kind):
    run = torture.new_run(place)
    assert place.run(f"{torture.command(kind)} --output {run}").code == 0
    assert torture.difference(run, place.undisturbed(kind)) == ""
    shutil.rmtree(run)
    assert place.run(f"{torture.command(kind)} --output {run} --seed 43").code == 0
    assert torture.difference(run, place.undisturbed(kind)) == "log.csv"


def all_as_due(place, attempt, *arguments):
    """Make attempts two at a time, a process for each of two cores."""
    for kind in (*KINDS, "pair"):
        place.undisturbed(kind)
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(lambda each: attempt(place, *each), arguments)
        assert dict(zip(arguments, outcomes)) == dict.fromkeys(arguments, "")


def test_a_crash_before_any_write_loses_nothing(place):
    """Points 1 to 9 are config.json, env.json, status.json; 10 to 21 epoch 1, with diagnostics.csv from 16; from 22 epoch 2,
    with prev.pt; 45 the teacher's best.pt, told its test accuracy."""
    points = [("teacher", 2), ("student", 10), ("teacher", 13), ("student", 17), ("teacher", 23), ("student", 24),
              ("student", 46), ("teacher", 45), ("pair", 24)]
    all_as_due(place, torture.crash_point, *points)


def test_kill_9_at_any_time_loses_nothing(place):
    kills = [(kind, signal.SIGKILL, DRAW.random()) for kind in (*KINDS, "teacher", "pair")]
    all_as_due(place, torture.interruption, *kills)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_stops_at_once_with_advice_and_its_code(place, kind, number):
    place.undisturbed(kind)
    assert torture.interruption(place, kind, number, DRAW.uniform(0.3, 0.9)) == ""


def wait_for(path, text=""):
    limit = time.perf_counter() + 30
    while not (path.exists() and text in path.read_text()):
        assert time.perf_counter() < limit, f"{path} was not written"
        time.sleep(0.01)


def slow_steps(seconds):
    import losses
    plain = losses.mixed_ce

    def slow(*args, **flags):
        time.sleep(seconds)
        return plain(*args, **flags)

    losses.mixed_ce = slow


def slow_disk(seconds):
    plain = os.fsync

    def slow(number):
        if os.path.basename(os.readlink(f"/proc/self/fd/{number}")).startswith("last.pt"):
            time.sleep(seconds)
        plain(number)

    os.fsync = slow


def test_a_stopped_run_says_so_in_its_status(place):
    run = torture.new_run(place)
    process = place.start(f"{torture.command('teacher')} --output {run}", partial(slow_steps, 0.2))
    wait_for(run / "log.csv")
    os.kill(process.pid, signal.SIGTERM)
    one_line(place.finish(process), 143, "SIGTERM", "--resume auto")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["epoch"]) == ("stopped", 143, 1)
    assert torture.outcome_of_resuming(place, "teacher", run) == ""


def test_a_second_signal_ends_at_once(place):
    """The first waits for a checkpoint that takes 20 s; the second does not."""
    run = torture.new_run(place)
    process = place.start(f"{torture.command('teacher')} --output {run}", partial(slow_disk, 20))
    wait_for(run / "status.json", "running")
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    result = place.finish(process, limit=5)
    assert result.code == -signal.SIGINT and not (run / "last.pt").exists()
    assert torture.outcome_of_resuming(place, "teacher", run) == ""


def under_torchrun():
    os.environ["RANK"] = "0"


def test_under_torchrun_no_handler_delays_the_end(place):
    run = torture.new_run(place)
    process = place.start(f"{torture.command('teacher')} --output {run}", under_torchrun)
    wait_for(run / "status.json", "running")
    os.kill(process.pid, signal.SIGTERM)
    assert place.finish(process).code == -signal.SIGTERM


# --- resuming


def test_resume_auto_starts_continues_and_is_done(place):
    run, line = torture.new_run(place), torture.command("student")
    first = place.run(f"{line} --output {run} --resume auto")
    assert first.code == 0 and "nothing to continue" in first.out and not first.err
    before = contents(run)
    again = place.run(f"{line} --output {run} --resume")
    assert again.code == 0 and "already finished" in again.out and not again.err
    assert contents(run) == before, "a finished run was touched"
    one_line(place.run(f"{line} --output {run}"), 2, str(run), "--resume auto", "--overwrite")
    assert contents(run) == before


def test_more_epochs_continue_a_finished_run_and_fewer_do_not(place):
    run, line = a_copy(place, "teacher"), torture.command("teacher")
    one_line(place.run(f"{line} --output {run} --resume auto --epochs 2"), 2, "--epochs 3 -> 2")
    longer = place.run(f"{line} --output {run} --resume auto --epochs 5 --patience 7")
    assert longer.code == 0 and "warning: --epochs grows from 3 to 5" in longer.err and "continuing after epoch 3" in longer.out
    rows = torture.log_of(run)
    assert [row["epoch"] for row in rows] == list("12345") and rows[:3] == torture.log_of(place.undisturbed("teacher"))
    assert json.loads((run / "summary.json").read_text())["epochs"] == 5 and float(rows[3]["lr"]) > float(rows[2]["lr"])
    total = [float(row["total_s"]) for row in csv.DictReader((run / "log.csv").read_text().splitlines())]
    assert total == sorted(total), "the clock of a resumed run goes on"


@pytest.mark.parametrize("change", ["another class", "an image less"])
def test_other_images_are_refused(place, change):
    run, images = torture.new_run(place), torture.new_run(place)
    shutil.copytree(place.folder / "images", images, dirs_exist_ok=True)
    line = f"{torture.command('teacher')} --data-dir {images} --resume auto --output {run}"
    assert place.run(line).code == 0
    before, first = contents(run), images / "train" / "class0"
    if change == "another class":
        for tree in ("train", "test"):
            shutil.copytree(images / tree / "class0", images / tree / "class9")
    else:
        min(first.iterdir()).unlink()
    one_line(place.run(f"{line} --epochs 4"), 4, "not those that the run began with")
    assert contents(run) == before


def test_the_content_of_files_decides_and_not_their_path(place):
    """As after a move to another disk: images, teacher and start are the same, and so is all that the run leaves."""
    moved, teacher = place.folder / "moved", place.undisturbed("teacher") / "best.pt"
    shutil.copytree(place.folder / "images", moved / "images")
    shutil.copy(teacher, moved / "teacher.pt")
    for kind, flag, path in (("student", "--teacher-checkpoint", teacher), ("teacher", "--init", teacher)):
        line = f"{torture.command(kind)} {flag} {path}"
        other = f"{line.replace(str(path), str(moved / 'teacher.pt'))} --data-dir {moved}/images/ --resume auto"
        run, whole = torture.new_run(place), torture.new_run(place)
        assert place.run(f"{line} --output {whole}").code == 0
        assert place.run(f"{line} --output {run}", partial(torture.die_at, 20)).code == -signal.SIGKILL
        result = place.run(f"{other} --output {run}")
        assert result.code == 0 and "continuing after epoch" in result.out, result.err
        assert torture.difference(run, whole) == ""
        assert "already finished" in place.run(f"{other} --output {run}").out
        one_line(place.run(f"{other} --output {run} --data-dir {moved}"), 4, str(moved))
    one_line(place.run(f"{other} --output {run} --init {place.undisturbed('student') / 'best.pt'}"), 2, "--init")


def with_threads(count, fault=lambda: None):
    torch.set_num_threads(count)
    fault()


def test_a_run_keeps_its_number_of_threads(place):
    """Two threads add in another order than one, which comes to other bits."""
    run, whole, line = torture.new_run(place), torture.new_run(place), torture.command("student")
    assert place.run(f"{line} --output {whole}", partial(with_threads, 2)).code == 0
    killed = partial(with_threads, 2, partial(torture.die_at, 20))
    assert place.run(f"{line} --output {run}", killed).code == -signal.SIGKILL
    result = place.run(f"{line} --output {run} --resume auto")
    assert result.code == 0 and result.out.count("2 threads, as the run began with, and not 1") == 1
    here = json.loads((run / "env.json").read_text())
    assert (here["threads"], here["after_epoch"], here["earlier"]) == (2, 0, [])
    assert torture.difference(run, whole) == ""


def test_where_a_run_was_is_kept(place):
    run = a_copy(place, "teacher", epochs=1)
    first = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(first | {"torch": "2.0.0"}))
    assert place.run(f"{torture.command('teacher')} --output {run} --resume auto").code == 0
    here = json.loads((run / "env.json").read_text())
    assert [each["torch"] for each in here["earlier"]] == ["2.0.0"] and here["torch"] == first["torch"]
    assert (here["after_epoch"], here["earlier"][0]["after_epoch"]) == (1, 0)


def test_an_early_stop_stays_stopped_until_patience_grows(place):
    run, line = torture.new_run(place), torture.command("teacher") + " --lr 50 --epochs 6 --clip-grad 0"
    assert place.run(f"{line} --output {run} --patience 1").code == 0
    epochs = len(torture.log_of(run))
    assert epochs < 6, "the recipe was meant to get worse"
    again = place.run(f"{line} --output {run} --patience 1 --resume auto")
    assert "early stop" in again.out and len(torture.log_of(run)) == epochs
    assert place.run(f"{line} --output {run} --patience 0 --resume auto").code == 0
    assert len(torture.log_of(run)) == 6


def test_a_path_continues_in_another_directory(place):
    source, run = a_copy(place, "student", epochs=2), torture.new_run(place)
    before, line = contents(source), torture.command("student")
    for path in (source / "last.pt", source):
        shutil.rmtree(run)
        result = place.run(f"{line} --output {run} --resume {path}")
        assert result.code == 0, result.err
        assert torture.difference(run, place.undisturbed("student")) == "" and contents(source) == before
    one_line(place.run(f"{line} --output {run} --resume {source}"), 2, "not empty", str(run))
    one_line(place.run(f"{line} --output {run}-new --resume {source}/lost.pt"), 5, "lost.pt")


OTHER = {  # every flag that makes another experiment, with another value for it
    "student": ("--alpha 0.5", "--beta 3", "--temperature 2", "--ce-weight 0.5", "--mixed-target first", "--dkd-warmup 2",
                "--student resnet8", "--student-init x.pt", "--experiment v3", "--teacher-checkpoint other.pt"),
    "teacher": ("--dataset synthetic", "--val-size 10", "--image-size 12", "--policy none",
                "--random-erasing 0",
                "--mixup 0", "--cutmix 0", "--mix-prob 0.5", "--mix-mode elem", "--batch-size 8", "--opt adamw", "--lr 0.1",
                "--momentum 0",
                "--weight-decay 0", "--sched multistep", "--milestones 1", "--warmup-epochs 0", "--label-smoothing 0",
                "--clip-grad 0",
                "--model-ema 0", "--monitor val_acc1", "--amp bf16", "--seed 1", "--deterministic", "--model resnet14",
                "--pretrained", "--init x.pt"),
}
SAME = ("--epochs 3", "--patience 9", "--overwrite", "--debug", "--device cpu")


def both_kinds_of_flags(line, others, same):
    """Run the script's flags, one by one, in this process: what each comes to before any data are read."""
    import runpy
    import sys
    for flag in (*others, *same):
        argv, sys.argv = sys.argv, [*sys.argv, *flag.split()]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        sys.argv = argv
        print(f"{code}\t{flag}", file=sys.stderr, flush=True)
    os._exit(0)


@pytest.mark.parametrize("kind", KINDS)
def test_flags_that_make_another_experiment_are_refused_and_others_are_not(place, kind):
    run = a_copy(place, kind)
    content = torch.load(place.undisturbed("teacher") / "best.pt", weights_only=True)
    torch.save(content | {"seed": 43}, place.folder / "other.pt")
    before, line = contents(run), f"{torture.command(kind)} --output {run} --resume auto"
    result = place.run(line, partial(both_kinds_of_flags, line, OTHER[kind], SAME))
    said = result.err.splitlines()
    for flag in OTHER[kind]:
        at = next(i for i, text in enumerate(said) if text.endswith(f"\t{flag}"))
        name, _, value = flag.partition(" ")
        assert said[at].startswith("2\t"), f"{said[at - 1]} {said[at]}"
        line = said[at - 1]
        assert f"{name} " in line and " -> " in line and line.startswith("error: these flags"), line
    assert [text for text in said if text.startswith("0\t")] == [f"0\t{flag}" for flag in SAME], said
    assert contents(run) == before, "a refused run was touched"
    table = [text.split() for text in result.out.splitlines()]
    assert ["flag", "its", "run", "now"] in table
    assert ["--lr", "2.0", "0.1"] in table or kind == "student"


def test_another_teacher_under_the_old_name_is_refused(place):
    run = a_copy(place, "student", epochs=1)
    shutil.copytree(place.undisturbed("teacher"), place.folder / "swapped")
    line = torture.command("student").replace("undisturbed/teacher", "swapped")
    shutil.rmtree(run)
    assert place.run(f"{line} --output {run}", partial(torture.die_at, 20)).code == -signal.SIGKILL
    content = torch.load(place.folder / "swapped" / "best.pt", weights_only=True)
    torch.save(content | {"seed": 43}, place.folder / "swapped" / "best.pt")
    one_line(place.run(f"{line} --output {run} --resume auto"), 2, "teacher_sha256")


# --- damaged, foreign and evil checkpoints


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "evil", "weights"])
def test_a_damaged_last_falls_back_to_the_one_before(place, damage):
    run = a_copy(place, "student", epochs=2)
    spoil(run / "last.pt", damage, place)
    shutil.copytree(run, f"{run}-killed")
    result = place.run(f"{torture.command('student')} --output {run} --resume auto")
    assert result.code == 0 and result.err.startswith("warning: "), result.err
    assert "last.pt" in result.err and "continuing with" in result.err, result.err
    assert "continuing after epoch 1" in result.out and torture.difference(run, place.undisturbed("student")) == ""
    if damage == "flipped":  # a crash while the first checkpoint is written must not lose the good one
        for point in range(16, 22):  # last.pt, best.pt
            killed = place.folder / f"killed{point}"
            shutil.copytree(f"{run}-killed", killed)
            place.run(f"{torture.command('student')} --output {killed} --resume auto", partial(torture.die_at, point))
            assert torture.outcome_of_resuming(place, "student", killed) == "", point


@pytest.mark.parametrize("damage", ["truncated", "flipped", "evil", "weights", "bare", "text"])
def test_a_run_without_a_good_checkpoint_is_never_started_again_in_silence(place, damage):
    run = a_copy(place, "student")
    for name in ("last.pt", "prev.pt"):
        spoil(run / name, damage, place)
    before = contents(run)
    one_line(place.run(f"{torture.command('student')} --output {run} --resume auto --overwrite"), 5, "last.pt")
    assert contents(run) == before
    for name in ("last.pt", "prev.pt"):
        (run / name).unlink()
    one_line(place.run(f"{torture.command('student')} --output {run} --resume auto"), 5, "last.pt")
    assert not (place.folder / "evil-was-here").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def spoil(path, damage, place):
    good = path.read_bytes()
    middle = len(good) // 2
    path.unlink()
    if damage == "truncated":
        path.write_bytes(good[:middle])
    if damage == "flipped":
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 4]) + good[middle + 1:])
    if damage == "evil":
        torch.save({"format": 1, "kind": "run", "w": Evil()}, path)
    if damage == "weights":
        shutil.copy(place.undisturbed("teacher") / "best.pt", path)
    if damage == "bare":
        torch.save({"w": torch.ones(2)}, path)
    if damage == "text":
        path.write_text("hello")


def test_no_flipped_bit_and_no_truncation_of_a_checkpoint_passes_unseen(place):
    good = (place.undisturbed("teacher") / "last.pt").read_bytes()
    for damage in [partial(torture.flip, DRAW)] * 100 + [partial(torture.truncate, DRAW)] * 30:
        assert torture.corrupted(good, place.folder / "damaged.pt", damage) == ""


def test_checkpoints_hold_plain_data_only(place):
    content = torture.tensors_of(resume.read_run(place.undisturbed("student") / "last.pt"))
    assert {type(value) for value in content.values()} <= {torch.Tensor, int, float, str, bool, type(None), dict, list}
    weights = [value for value in content.values() if isinstance(value, torch.Tensor)]
    assert weights and all(value.untyped_storage().nbytes() == value.nbytes
                           for value in weights), "a view drags its whole storage along"


# --- the disk, and a crowded directory


def test_a_full_disk_at_any_write_costs_nothing(place):
    points = [("teacher", 2), ("student", 10), ("teacher", 13), ("student", 21), ("teacher", 24), ("student", 40), ("pair", 13)]
    all_as_due(place, torture.full_disk_point, *points)


def test_a_disk_that_fills_up_later_leaves_the_last_good_epoch(place):
    run = a_copy(place, "teacher", epochs=2)
    result = place.run(f"{torture.command('teacher')} --output {run} --resume auto", partial(torture.fill_the_disk, 500_000))
    one_line(result, 8, "last.pt", "needs 1.0 MB", "MB free", "epoch 2", "--resume auto")
    assert torture.outcome_of_resuming(place, "teacher", run) == ""


def test_the_second_run_in_a_directory_leaves_at_once(place):
    run, line = torture.new_run(place), torture.command("teacher")
    first = place.start(f"{line} --output {run}", partial(slow_steps, 0.2))
    wait_for(run / "status.json", "running")
    for extra in ("", "--overwrite", "--resume auto"):
        second = place.run(f"{line} --output {run} {extra}")
        one_line(second, 3, str(run))
        assert second.seconds < 5
    assert place.finish(first).code == 0 and torture.difference(run, place.undisturbed("teacher")) == ""
    shutil.rmtree(run)
    killed = place.start(f"{line} --output {run}", partial(slow_steps, 0.2))
    wait_for(run / "status.json", "running")
    os.kill(killed.pid, signal.SIGKILL)
    place.finish(killed)
    assert torture.outcome_of_resuming(place, "teacher", run) == "", "the kernel frees the lock of a killed run"


# --- sick steps


@pytest.mark.parametrize("spoil_step", [partial(torture.poison, "nckd"), torture.poison_images], ids=["loss", "images"])
@pytest.mark.parametrize("kind, precision", [("teacher", "off"), ("teacher", "bf16"), ("student", "fp16")])
def test_one_poisoned_batch_is_skipped(place, kind, precision, spoil_step):
    run = torture.new_run(place)
    result = place.run(f"{torture.command(kind)} --amp {precision} --output {run}", partial(spoil_step, calls=[6]))
    assert result.code == 0, result.err
    last, rows = resume.read_run(run / "last.pt"), torture.log_of(run)
    assert all(value.isfinite().all() for value in last["update"]["net"].values())
    assert int(rows[1]["skipped_steps"]) >= 1 and (precision == "fp16" or [row["skipped_steps"] for row in rows]
                                                   == ["0", "1", "0"])
    assert all(float(row["train_loss"]) < 100 for row in rows)


@pytest.mark.parametrize("kind, precision, term, named", [
    ("teacher", "off", "ce", "train_loss"), ("student", "fp16", "nckd", "train_loss_nckd"),
    ("student", "off", "ce", "train_loss_ce")])
def test_a_run_that_only_skips_stops_with_the_last_healthy_checkpoint(place, kind, precision, term, named):
    run = torture.new_run(place)
    line = f"{torture.command(kind)} --amp {precision} --output {run}"
    one_line(place.run(line, partial(torture.poison, term, range(7, 1000))), 6, named, "not finite", "--lr")
    last = resume.read_run(run / "last.pt")
    assert last["epoch"] >= 1 and all(value.isfinite().all() for value in last["update"]["net"].values())
    assert json.loads((run / "status.json").read_text())["exit_code"] == 6
    healthy = place.run(f"{line} --resume auto")
    assert healthy.code == 0, healthy.err


def test_a_loss_that_becomes_infinite_by_itself(place):
    result = place.run(f"{torture.command('teacher')} --lr 1e30 --clip-grad 0 --output {torture.new_run(place)}")
    one_line(result, 6, "not finite")


# --- several processes on one run

TEACHER_PAIR = torture.command("teacher").replace("train_teacher", "torchrun --nproc-per-node 2 train_teacher")


def test_a_pair_is_repeatable_prints_once_and_is_one_identity(place):
    place.undisturbed("teacher")
    run, line = torture.new_run(place), torture.command("pair")
    result = place.run(f"{line} --output {run}")
    assert result.code == 0 and result.err == "" and torture.difference(run, place.undisturbed("pair")) == ""
    assert result.out.count("epoch 1/3") == 1 and "2 processes with --batch-size 8: 16 images a step" in result.out
    before = contents(run)
    assert "already finished" in place.run(f"{line} --output {run} --resume auto").out and contents(run) == before
    alone = line.replace("torchrun --nproc-per-node 2 ", "")
    one_line(place.run(f"{alone} --output {run} --resume auto --batch-size 8"), 2, "processes 2 -> 1")
    one_line(place.run(f"{line} --output {run}"), 2, "not empty")
    assert contents(run) == before


def test_a_stopped_pair_loses_nothing(place):
    place.undisturbed("pair")
    assert torture.interruption(place, "pair", signal.SIGTERM, DRAW.random()) == ""


def test_a_pair_that_lost_one_is_continued_by_the_other(place):
    run, pair = torture.new_run(place), torture.command("pair")
    assert place.run(f"{pair} --output {run}", partial(torture.on_rank, 0, partial(torture.die_at, 30))).code != 0
    left, single = torture.log_of(run), pair.replace("torchrun --nproc-per-node 2 ", "") + f" --output {run} --resume auto"
    one_line(place.run(single), 2, "processes 2 -> 1")
    alone = place.run(f"{single} --batch-size 16")
    assert alone.code == 0 and alone.err.count("warning: each process takes 16 images of a step and not 8") == 1, alone.err
    rows = torture.log_of(run)
    assert len(rows) == 3 and rows[:len(left)] == left and len(left) > 0
    assert len({row["steps"] for row in rows}) == 1


def test_three_processes_add_up_to_the_same_bits_when_resumed(place, monkeypatch):
    """Three numbers may round to another sum in another order; this network's gradients travel in two groups."""
    line = torture.COMMANDS["pair"].replace("node 2", "node 3").replace("forgetful_pico", "v2_tiny").replace("--amp fp16",
                                                                                                             "--amp off")
    monkeypatch.setitem(torture.COMMANDS, "trio", line)
    place.undisturbed("trio")
    assert torture.crash_point(place, "trio", 21) == ""


def run_out_of_memory():
    import augment

    def call(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    augment.BatchAugmenter.__call__ = call


def hang():
    import augment
    from training import distributed
    distributed.TIMEOUT = timedelta(seconds=2)
    if os.environ["RANK"] == "1":
        augment.BatchAugmenter.__call__ = lambda *args: time.sleep(60)


def drift():
    from training import optimization
    agree = optimization.Update.agree

    def call(self):
        with torch.no_grad():
            self.parameters[0].add_(1e-3)
        agree(self)

    optimization.Update.agree = call


def connect_slowly():
    import torch.distributed as dist
    connect = dist.new_group

    def call(**flags):
        group = connect(**flags)
        time.sleep(0.5)
        Path("connected").touch()
        return group

    dist.new_group = call


def test_no_process_of_a_pair_ends_before_all_are_connected(place):
    """Else the C++ of PyTorch writes to stderr, beside the line that says why."""
    place.undisturbed("teacher")
    run = torture.new_run(place)
    (run / "notes.txt").touch()
    result = place.run(f"{torture.command('pair')} --output {run}", partial(torture.on_rank, 1, connect_slowly))
    one_line(result, 2, "not empty")
    assert (place.folder / "connected").exists()


@pytest.mark.parametrize("flags, fault, code, words", [
    ("", partial(torture.on_rank, 1, run_out_of_memory), 7, ["out of GPU memory", "--batch-size 4"]),
    ("", partial(torture.on_rank, 1, drift), 1, ["ranks diverged", "2 processes", "--resume auto"]),
    ("", partial(torture.on_rank, 1, partial(torture.poison, "kl", range(1000))), 6, ["train_loss_kl is not finite"]),
    ("", hang, 1, ["another process of this run stopped responding", "--resume auto"]),
    ("--batch-size 7", None, 2, ["odd --batch-size", "7"]),
    ("--batch-size 40", None, 2, ["2 times 40 of 76 images"]),
    ("--device cuda:1", None, 2, ["every process needs a GPU of its own"]),
    ("--lr -1", None, 2, ["--lr"]),
], ids=["memory", "drift", "loss", "hang", "odd", "large", "device", "flag"])
def test_whatever_ends_a_pair_says_so_in_one_line(place, flags, fault, code, words):
    place.undisturbed("teacher")
    run = torture.new_run(place)
    result = place.run(f"{torture.command('pair')} {flags} --epochs 20 --output {run}", fault)
    one_line(result, code, *words)
    assert result.err.count("\n") == 1 and result.seconds < 15


def test_a_batch_that_is_sick_on_one_of_a_pair_is_skipped_by_both(place):
    place.undisturbed("teacher")
    run = torture.new_run(place)
    result = place.run(f"{torture.command('pair')} --amp off --output {run}", partial(torture.on_rank, 1,
                                                                                      partial(torture.poison, "kl", [5])))
    assert result.code == 0 and [row["skipped_steps"] for row in torture.log_of(run)] == ["0", "1", "0"]


def test_two_pairs_cannot_share_a_directory(place):
    run, line = torture.new_run(place), TEACHER_PAIR
    first = place.start(f"{line} --output {run}", partial(slow_steps, 0.2))
    wait_for(run / "status.json", "running")
    one_line(place.run(f"{line} --output {run} --overwrite"), 3, str(run))
    assert place.finish(first).code == 0


def test_torchrun_itself_stops_within_ten_seconds_and_the_run_goes_on(place):
    """With one of its processes in the middle of a step; what it leaves is continued, and is the undisturbed run."""
    line, whole, run = TEACHER_PAIR, torture.new_run(place), torture.new_run(place)
    assert place.run(f"{line} --output {whole}").code == 0
    command = line.replace("train_teacher.py", str(torture.ROOT / "train_teacher.py")).replace("torchrun",
        f"{sys.executable} -m torch.distributed.run --standalone")
    with open(place.folder / "torchrun.log", "w") as log:
        launcher = subprocess.Popen([*shlex.split(command), "--output", run], cwd=place.folder, stdout=log, stderr=log,
                                    env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})
    wait_for(run / "log.csv")
    sent = time.perf_counter()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(10) != 0 and time.perf_counter() - sent < 10
    assert len(torture.log_of(run)) < 3, "it was to be stopped before its end"
    result = place.run(f"{line} --output {run} --resume auto")  # the lock is free: all its processes have ended
    assert result.code == 0 and torture.difference(run, whole) == "", result.err


def test_a_reader_that_goes_is_one_line():
    """As `head` does."""
    code = """if 1:
        from types import SimpleNamespace
        from rundir import errors
        errors.run(lambda args: [print("line") for _ in range(10**6)], SimpleNamespace(debug=False))"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == "error: nobody reads what is printed (broken pipe). send it to a file\n"
    assert process.wait() == 141
