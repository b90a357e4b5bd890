"""The store of teacher logits: with it a run leaves what it leaves without, whatever happened to the store."""
import errno
import os
import re

import pytest
import torch
from command import one_line, run, student_of, succeeds
from helpers import draw, make_images
from torture import difference

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
    def distil(name, flags="", teacher="teacher"):
        for seed, each in enumerate(("teacher", "other"), 1):
            student_of(capsys, place, each, seed)
        out = succeeds(capsys, "distill.py", f"{student_of(capsys, place, teacher)} --output {place}/{name} {flags}")
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


@pytest.mark.parametrize("flags", ["", "--method dkd --beta 2 --lr 0.1 --opt adamw", "--student resnet8 --model-ema 0.9"])
def test_other_methods_hyperparameters_and_students_read_the_logits(place, distil, store, flags, request):
    name = str(abs(hash(request.node.name)))
    plain, out = distil(name, flags)
    assert "teacher logits" not in out and share(plain) is None
    again, out = distil(f"{name}-again", f"{flags} --teacher-logits {store.parent}")
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


def test_the_run_that_stores_leaves_what_one_without_a_store_leaves(place, distil, store):
    plain, _ = distil("plain")
    assert difference(place / "first", plain) == "" and share(place / "first") == 0
    assert store.stat().st_size == 2 * STEPS * (16 + 16 * 4 * 4)


@pytest.mark.parametrize("flags, teacher", [
    ("", "other"), ("--seed 7", "teacher"), ("--policy none", "teacher"), ("--mix-prob 0.5", "teacher"),
    ("--val-size 16", "teacher"), ("--batch-size 8", "teacher"), ("--grad-accum 2", "teacher"), ("--amp bf16", "teacher"),
    ("--no-flip", "teacher"), ("--teacher-mean 0.5 0.5 0.5", "teacher"),
    ("--teacher-checkpoint {0}/teacher/best.pt {0}/other/best.pt", "teacher")])
def test_what_changes_the_logits_has_a_file_of_its_own(place, distil, store, flags, teacher, request):
    name, before = str(abs(hash(request.node.name))), store.read_bytes()
    run, _ = distil(name, f"{flags.format(place)} --epochs 1 --teacher-logits {store.parent}", teacher)
    assert share(run) == 0 and store.read_bytes() == before
    for path in set(store.parent.iterdir()) - {store}:
        path.unlink()


def test_a_changed_image_and_other_code_are_misses(place, distil, store, monkeypatch):
    path = place / "images" / "a" / "003.png"
    image = path.read_bytes()
    draw(path, (16, 16))
    assert share(distil("image", f"--epochs 1 --teacher-logits {store.parent}")[0]) == 0
    path.write_bytes(image)
    monkeypatch.setattr(teacher_logits, "SOURCES", (*teacher_logits.SOURCES, "data/*.py"))
    assert share(distil("code", f"--epochs 1 --teacher-logits {store.parent}")[0]) == 0
    monkeypatch.undo()
    assert share(distil("again", f"--epochs 1 --teacher-logits {store.parent}")[0]) == 1
    for other in set(store.parent.iterdir()) - {store}:
        other.unlink()


@pytest.mark.parametrize("damage, read", [
    (lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:], 0.9),  # a logit of the second step
    (lambda content: content[272:544] + content[:272] + content[544:], 0.8),  # two steps, exchanged
    (lambda content: content[:-100], 0.9), (lambda content: content[:272 * 7], 0.7), (lambda content: b"", 0.0),
    (lambda content: bytes(len(content)), 0.0), (lambda content: content + content, 1.0)])
def test_what_is_altered_or_cut_off_is_computed_anew(place, distil, store, damage, read, request):
    whole = store.read_bytes()
    store.write_bytes(damage(whole))
    again, _ = distil(str(abs(hash(request.node.name))), f"--teacher-logits {store.parent}")
    assert difference(again, place / "first") == "" and share(again) == pytest.approx(read)
    assert store.read_bytes()[:len(whole)] == whole, "and is whole again"


@pytest.mark.parametrize("fault, reason", [
    (lambda write, *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")), "No space left on device"),
    (lambda write, file, record, place: write(file, record[:100], place), "the disk is full")])
def test_a_full_disk_ends_the_storing_and_not_the_run(place, distil, monkeypatch, fault, reason, request):
    write, calls = os.pwrite, []

    def pwrite(*args):
        calls.append(args)
        return fault(write, *args) if len(calls) > 3 else write(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    name = str(abs(hash(request.node.name)))
    stored, out = distil(name, f"--teacher-logits {place}/full-{name}")
    assert reason in out and len(calls) == 4
    monkeypatch.undo()
    again, _ = distil(f"{name}-again", f"--teacher-logits {place}/full-{name}")
    assert difference(again, stored) == "" and share(again) == pytest.approx(0.3)


def test_a_directory_that_cannot_be_made_is_one_line(capsys, place, distil, store):
    code, _, err = run(capsys, "distill.py", f"{student_of(capsys, place)} --output {place}/no --teacher-logits {store}/below")
    assert str(store) in one_line(code, 8, err)


def made(folder, limit=1e9, epochs=3, key="k", example=None):
    return TeacherLogits(str(folder), limit, key, epochs=epochs, steps=2, rows=range(4, 8),
                         example=torch.zeros(1, 3) if example is None else example)


def test_the_limit_holds_for_all_files(tmp_path, capsys):
    one_epoch = 2 * (16 + 4 * 3 * 4)
    for key, limit, last in (("a", one_epoch * 2.5, 2), ("b", 4096 + one_epoch, 1), ("c", 4096, 0), ("d", 1e6, 3)):
        store = made(tmp_path, limit, key=key)
        for epoch in (1, 2, 3):
            store.set_epoch(epoch)
            for position in (0, 1):
                store.add(position, range(4, 8), torch.ones(4, 3))
            store.end_epoch()
        assert store.path.stat().st_size == last * one_epoch
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
