"""The store of teacher logits: with it a run leaves what it leaves without, whatever happened to the store."""
import errno
import os
import re

import pytest
import torch
from command import one_line, run, student_of, succeeds
from helpers import draw, make_images
from torture import difference

from rundir.errors import Failure
from rundir.files import read_json
from training import evaluation, teacher_logits
from training import run as training_run
from training.teacher_logits import TeacherLogits

STEPS = 5  # of an epoch of these runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, to which the tests add two teachers and a store."""
    place = tmp_path_factory.mktemp("teacher_logits")
    make_images(place / "images", ["a", "b", "c", "d"], 30, seed=0)
    return place


@pytest.fixture
def distil(capsys, place):
    """Distil into a new run directory -> it, and what the run printed."""
    def distil(name, flags=""):
        out = succeeds(capsys, "distill.py", f"{student_of(capsys, place)} --output {place}/{name} {flags}")
        return place / name, out
    return distil


@pytest.fixture
def store(place, distil):
    """A filled store; its only file."""
    folder = place / "store"
    if not folder.exists():
        distil("first", f"--teacher-logits {folder}")
    (path,) = folder.glob("*.logits")
    return path


def share(folder):
    return read_json(folder / "summary.json")["teacher_logits_read"]


def test_other_methods_hyperparameters_and_students_read_the_logits(distil, store):
    flags = "--method dkd --beta 2 --lr 0.1 --opt adamw --student resnet8 --model-ema 0.9"
    plain, out = distil("dkd", flags)
    assert "teacher logits" not in out and share(plain) is None
    again, out = distil("dkd-again", f"{flags} --teacher-logits {store.parent}")
    assert difference(again, plain) == "" and share(again) == 1
    assert f"teacher logits: 0.00 GB in {store}" in out, "its size is said before"


def test_the_teacher_is_evaluated_by_the_run_that_stores_alone(place, distil, store, monkeypatch):
    nets, evaluate = [], evaluation.evaluate
    for module in (evaluation, training_run):
        monkeypatch.setattr(module, "evaluate", lambda net, *args: (nets.append(net.info["model"]), evaluate(net, *args))[1])
    kept = sorted(store.parent.glob("*.pt"))
    again, out = distil("evaluated", f"--epochs 1 --teacher-logits {store.parent}")
    assert len(kept) == 2 and set(nets) == {"v2_pico"} and "teacher resnet8: 0.08 M parameters" in out
    kept[0].write_bytes(kept[1].read_bytes())  # of other images
    kept[1].write_bytes(kept[1].read_bytes()[:-300])
    once_more, _ = distil("evaluated-again", f"--epochs 1 --teacher-logits {store.parent}")
    assert nets.count("resnet8") == 2 and difference(once_more, again) == "" and sorted(store.parent.glob("*.pt")) == kept


def test_a_run_that_stores_or_computes_anew_leaves_what_one_without_a_store_leaves(place, distil, store):
    plain, _ = distil("plain")
    assert difference(place / "first", plain) == "" and share(place / "first") == 0
    whole = store.read_bytes()
    assert len(whole) == 2 * STEPS * (16 + 16 * 4 * 4)
    store.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])  # a logit of the second step
    again, _ = distil("altered", f"--teacher-logits {store.parent}")
    assert difference(again, plain) == "" and share(again) == pytest.approx(0.9)
    assert store.read_bytes() == whole, "and is whole again"


CHANGES = ("--seed 7", "--policy none", "--mix-prob 0.5", "--val-size 16", "--batch-size 8", "--grad-accum 2", "--amp bf16",
           "--no-flip", "--teacher-mean 0.5 0.5 0.5", "--teacher-checkpoint {0}/other/best.pt",
           "--teacher-checkpoint {0}/teacher/best.pt {0}/other/best.pt")


def test_what_changes_the_logits_has_a_file_of_its_own(capsys, place, store, monkeypatch):
    def file_of(flags=""):
        """The file of a run, which ends when it has chosen it."""
        line = f"{student_of(capsys, place)} --output {place}/run --teacher-logits {place}/files {flags.format(place)}"
        code, out, _ = run(capsys, "distill.py", line)
        assert code == 6
        return re.search(r"teacher logits: .* in .*/files/(\S+)", out)[1]

    def end(*args):
        raise Failure(6, "enough", "stop")

    student_of(capsys, place, "other", 2)
    monkeypatch.setattr(evaluation, "check_teacher", end)
    files = [file_of(), *map(file_of, CHANGES)]
    assert file_of("--method dkd --lr 0.1 --epochs 1") == files[0] == store.name
    path = place / "images" / "a" / "003.png"
    image = path.read_bytes()
    draw(path, (16, 16))
    files.append(file_of())
    path.write_bytes(image)
    monkeypatch.setattr(teacher_logits, "SOURCES", (*teacher_logits.SOURCES, "data/*.py"))
    files.append(file_of())
    assert len(set(files)) == len(CHANGES) + 3, "of other images, and of other code, too"


def test_a_directory_that_cannot_be_made_is_one_line(capsys, place, distil, store):
    code, _, err = run(capsys, "distill.py", f"{student_of(capsys, place)} --output {place}/no --teacher-logits {store}/below")
    assert str(store) in one_line(code, 8, err)


ONE = 16 + 4 * 3 * 4  # bytes of a step in these stores


def made(folder, limit=1e9, epochs=3, key="k", example=None):
    return TeacherLogits(str(folder), limit, key, epochs=epochs, steps=2, rows=range(4, 8),
                         example=torch.zeros(1, 3) if example is None else example)


def fill(store):
    """Go through the epochs -> which steps were found."""
    found = []
    for epoch in (1, 2, 3):
        store.set_epoch(epoch)
        found += store.found
        for position in (0, 1):
            store.add(position, range(4, 8), torch.full((4, 3), 2.0 * epoch + position))
        store.end_epoch()
    return found


@pytest.mark.parametrize("damage, missing", [
    (lambda content: content[:70] + bytes([content[70] ^ 1]) + content[71:], {1}),
    (lambda content: content[ONE:2 * ONE] + content[:ONE] + content[2 * ONE:], {0, 1}),  # exchanged
    (lambda content: content[:-10], {5}), (lambda content: content[:4 * ONE], {4, 5}), (lambda content: b"", set(range(6))),
    (lambda content: bytes(len(content)), set(range(6))), (lambda content: content + content, set())])
def test_what_is_altered_or_cut_off_is_not_found(tmp_path, damage, missing):
    store = made(tmp_path)
    assert fill(store) == [False] * 6
    whole = store.path.read_bytes()
    store.path.write_bytes(damage(whole))
    assert fill(made(tmp_path)) == [step not in missing for step in range(6)]
    assert store.path.read_bytes()[:len(whole)] == whole, "and is whole again"


@pytest.mark.parametrize("short, reason", [(None, "No space left on device"), (10, "the disk is full")])
def test_a_full_disk_ends_the_storing_and_not_the_run(tmp_path, capsys, monkeypatch, short, reason):
    write, calls = os.pwrite, []

    def pwrite(file, record, place):
        calls.append(place)
        if len(calls) > 3 and short is None:
            raise OSError(errno.ENOSPC, reason)
        return write(file, record[:short] if len(calls) > 3 else record, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    fill(made(tmp_path))
    assert reason in capsys.readouterr().out and len(calls) == 4
    assert fill(made(tmp_path)) == [True] * 3 + [False] * 3


def test_the_limit_holds_for_all_files(tmp_path, capsys):
    for key, limit, last in (("a", ONE * 5, 2), ("b", 4096 + 2 * ONE, 1), ("c", 4096, 0), ("d", 1e6, 3)):
        store = made(tmp_path, limit, key=key)
        fill(store)
        assert store.path.stat().st_size == last * 2 * ONE
        assert bool(re.search(f"room for {last} of 3 epochs", capsys.readouterr().out)) == (last < 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_runs_at_once_read_what_the_other_has_written(tmp_path, dtype):
    """Also parts of a batch, and positions that a CUDA graph reads from a tensor."""
    logits = torch.randn(3, 2, 4, 3).to(dtype)
    ahead, behind, late = (made(tmp_path, example=logits[0, 0]) for _ in range(3))
    for epoch in (1, 2, 3):
        for store in (ahead, behind)[:2 if epoch == 2 else 1]:  # the second epoch by both at once
            store.set_epoch(epoch)
            assert store.found == [False, False]
        for store in (ahead, behind)[:2 if epoch == 2 else 1]:
            for position in (0, torch.tensor(1)):
                for rows in (range(4, 6), range(6, 8)):
                    store.add(position, rows, logits[epoch - 1, int(position), rows.start - 4:rows.stop - 4])
            store.end_epoch()
        late.set_epoch(epoch)
        assert late.found == [True, True]
        for position in (torch.tensor(0), 1):
            assert torch.equal(late.read(position, range(6, 8)), logits[epoch - 1, int(position), 2:])
