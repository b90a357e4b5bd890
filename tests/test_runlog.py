"""The run directory: columns, atomic files, exit codes, and what env.json does not hold."""
import csv
import errno
import getpass
import json
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import ROOT

from rundir import errors, files, run_directory

COLUMNS = """epoch lr train_loss train_loss_ce train_loss_kl train_loss_tckd train_loss_nckd train_loss_inter
train_loss_intra train_loss_target train_loss_nontarget train_loss_batch train_loss_class train_loss_direction
train_acc1 val_loss val_acc1 val_acc5 val_ece
teacher_agree best_val_loss best_epoch bad_epochs grad_norm_mean grad_norm_max clip_frac amp_scale skipped_steps steps samples
images_per_s epoch_s val_s total_s peak_mem_mb""".split()


def row(epoch=1, **values):
    whole = {"epoch": epoch, "best_epoch": 1, "bad_epochs": 0, "skipped_steps": 0, "steps": 3, "samples": 192}
    required = {name: 0.1 + 0.2 for name in COLUMNS if name not in ("teacher_agree", "amp_scale", "peak_mem_mb")
                and (name == "train_loss_ce" or not name.startswith("train_loss_"))}
    return run_directory.EpochRow(**required | whole | values)


@contextmanager
def opened(path, **flags):
    with run_directory.RunDirectory(path, **{"overwrite": False} | flags) as run:
        run.open({"seed": 1})
        yield run


def test_log_has_the_columns_in_order_and_floats_round_trip(tmp_path):
    assert [field.name for field in fields(run_directory.EpochRow)] == COLUMNS
    with opened(tmp_path / "a" / "run") as run:
        run.rows = [row(epoch, train_loss_kl=1 / 3) for epoch in (1, 2)]
        text = run.tables()["log.csv"].decode()
    assert text.splitlines()[0].split(",") == COLUMNS and text.count("epoch,lr") == 1
    first, second = csv.DictReader(text.splitlines())
    assert (first["epoch"], second["epoch"]) == ("1", "2")
    assert float(first["train_loss_kl"]) == 1 / 3 and float(first["lr"]) == 0.1 + 0.2
    assert first["train_loss_tckd"] == "" and first["amp_scale"] == ""


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    for name in ("log.csv", "notes.txt"):
        (tmp_path / name).write_text("before")
    with opened(tmp_path, resume="auto"):
        assert (tmp_path / "log.csv").exists()
    with opened(tmp_path, overwrite=True):
        assert not (tmp_path / "log.csv").exists() and (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("failure, code, words", [
    (errors.Failure(4, "no data (x)", "get it"), 4, "no data (x). get it"),
    (errors.Failure(5, "two\nlines", "one"), 5, "two lines. one"), (MemoryError(), 7, "(--batch-size 64)"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 7, "(--batch-size 64)"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/x/last.pt"), 8, "runs/x/last.pt"),
    (errors.Unwritable(errno.ENOENT, "No such file or directory", "/proc/x"), 8, "/proc/x"),
    (PermissionError(errno.EACCES, "Permission denied", "x.pt"), 8, "x.pt (Permission denied)"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB\nmore"), 7,
     "(--batch-size 64). try --grad-checkpoint, --grad-accum 2, --batch-size 32,"),
    (RuntimeError("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but"), 2, "--deterministic"),
    (errors.Stopped(signal.SIGINT), 130, "--resume auto"),
    (errors.Stopped(signal.SIGTERM), 143, "SIGTERM"),
])
def test_expected_errors_are_one_line_and_a_code(failure, code, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # where there is a GPU, its memory is told, too

    def main(args):
        raise failure

    with pytest.raises(SystemExit) as stop:
        errors.run(main, SimpleNamespace(debug=False, batch_size=64, resume=None))
    err = capsys.readouterr().err
    assert stop.value.code == code
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_an_error_of_gpu_memory_names_the_batch_and_the_peak(monkeypatch):
    for name, answer in (("is_available", True), ("max_memory_allocated", 7.6 * 2**30), ("mem_get_info", (0, 7.9 * 2**30))):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    code, line = errors.expected(torch.OutOfMemoryError("CUDA out of memory."), 512)
    assert code == 7 and "(--batch-size 512, 7.6 of 7.9 GiB at the peak)" in line and "--batch-size 256" in line


def test_a_bug_keeps_its_traceback():
    def main(args):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        errors.run(main, SimpleNamespace(debug=False))
    with pytest.raises(FileNotFoundError):
        errors.run(lambda args: open("/no/such/file"), SimpleNamespace(debug=False))


def test_a_failed_write_leaves_the_old_file_and_no_partial(tmp_path, monkeypatch):
    files.write_atomic(tmp_path / "file", b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(errors.Unwritable) as failure:
        files.write_atomic(tmp_path / "file", b"new" * 10**6, previous=tmp_path / "before")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"
    failure.value.saved = 41
    code, line = errors.expected(failure.value)
    free = shutil.disk_usage(tmp_path).free / 1e6
    assert code == 8 and "epoch 41" in line and f"{tmp_path / 'file'} (No space left on device; needs 3.0 MB, " in line
    assert abs(float(line.split(", ")[1].split()[0]) - free) < 0.1 * free


def test_a_run_does_not_start_without_room_for_three_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    with pytest.raises(errors.Unwritable) as failure, run_directory.RunDirectory(tmp_path / "run", overwrite=False) as run:
        run.open({}, checkpoint_bytes=1_000_001)
    assert errors.expected(failure.value)[0] == 8 and "needs 3.0 MB, 3.0 MB free" in errors.expected(failure.value)[1]
    assert not (tmp_path / "run").exists()
    with run_directory.RunDirectory(tmp_path / "run", overwrite=False) as run:
        run.open({}, checkpoint_bytes=1_000_000)
    (tmp_path / "run" / "last.pt").write_bytes(bytes(1000))
    with run_directory.RunDirectory(tmp_path / "run", overwrite=False, resume="auto") as run:
        run.open({}, checkpoint_bytes=1_000_333)  # what is there already need not be free


def test_the_previous_file_is_kept(tmp_path):
    for content in (b"one", b"two", b"three"):
        files.write_atomic(tmp_path / "file", content, previous=tmp_path / "before")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"three", "before": b"two"}
    (tmp_path / "before").unlink()
    (tmp_path / "before").hardlink_to(tmp_path / "file")  # what a crash between the two replacements leaves
    files.write_atomic(tmp_path / "file", b"four", previous=tmp_path / "before")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"four", "before": b"three"}


def test_environment_is_enough_to_repeat_and_holds_nothing_private():
    environment = run_directory.environment()
    assert environment["torch"] == torch.__version__ and {"git_commit", "gpu", "driver", "python"} <= set(environment)
    text = json.dumps(environment)
    assert socket.gethostname() not in text and str(Path.home()) not in text and getpass.getuser() not in text


def test_a_reader_that_goes_is_one_line():
    """As `head` does."""
    code = """if 1:
        from types import SimpleNamespace
        from rundir import errors
        errors.run(lambda args: [print("line") for _ in range(10**6)], SimpleNamespace(debug=False))"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    err = process.stderr.read()
    assert err.startswith("error: ") and err.count("\n") == 1 and process.wait() == 141
