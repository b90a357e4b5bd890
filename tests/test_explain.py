"""plots/explain.py, on run directories with invented numbers that test the words and the drawing and mean nothing else."""
import itertools
import json
import os
import subprocess
import sys
from functools import partial

import command
import made_runs
import matplotlib.image
import matplotlib.style
import matplotlib.transforms
import numpy as np
import pytest

from plots import explain

COMMON = {"dataset": "cifar100", "epochs": 8, "seed": 3, "val_size": 5000, "image_size": 32, "clip_grad": 0.0}
METHODS = {  # config, and the terms of the loss with their shares of the logit gradient
    "kd": ({"method": "kd", "method_in_tables": "KD alpha 0.7 T 4", "method_in_figures": "KD"}, {"ce": 0.7, "kl": 0.3}),
    "dkd": ({"method": "dkd", "method_in_tables": "DKD alpha 1 beta 8 T 4", "method_in_figures": "DKD"},
            {"ce": 0.1, "tckd": 0.05, "nckd": 0.85}),
    "teacher": ({}, {"ce": 1.0}),
}
CURVE = [10.0, 20.0, 30.0, 40.0, 45.0, 50.0, 55.0, 54.0]
FALLING = [10.0, 30.0, 50.0, 60.0, 48.0, 30.0, 28.0, 20.0]  # most in epoch 6: 18 points
HEALTHY = {"verdict": "completed", "health": "healthy", "alarms": [], "advice": None}
MOVE = "large updates: in epoch 2 a step changes the weights by 4.5% of their norm"
COLLAPSED = {
    "verdict": "collapsed", "health": "3 alarms", "advice": "move: halve --lr or --beta", "alarms": [
        {"name": "collapse", "value": 40.0, "limit": 5.0, "epoch": 8, "text": "validation accuracy fell from 60.0 % to 20.0 %"},
        {"name": "move", "value": 1.5, "limit": 1.45, "epoch": 2, "text": MOVE},
        {"name": "teacher", "value": 30.0, "limit": 50.0, "epoch": None, "text": "the teacher is right about 30 % of images"}]}
TITLES = {title for title, *_ in explain.PANELS}


def looked_at(shares, epoch, taught):
    """A row of diagnostics.csv."""
    row = {"epoch": epoch, "grad_norm_mean": 2.0 / epoch, "clip_frac": 0.25, "update_ratio": 0.01 * epoch,
           "train_acc1_clean": 5.0 * epoch}
    for suffix, images in (("", 100), ("_clean", 0), ("_mixup", 50 * epoch)):
        row |= {f"images{suffix}": images, f"student_scale{suffix}": 1.0, f"student_entropy{suffix}": 3.0}
        if taught:
            row |= {f"teacher_scale{suffix}": 2.0, f"teacher_entropy{suffix}": 1.0,
                    f"teacher_acc1{suffix}": 10.0 * epoch if images else "",
                    f"teacher_either{suffix}": 10.0 * epoch + 5 if images else ""}
        row |= {f"share_{term}{suffix}": share for term, share in shares.items()}
        row |= {f"cos_{term}{suffix}": 0.5 for term in (*shares, "whole") if term != "ce"}
        row |= {f"{pull}_{term}{suffix}": 0.2 for pull in ("pull", "pull_minor") for term in (*shares, "whole")}
    return row


def write_run(path, kind, *, curve=CURVE, summary=HEALTHY, status=None, change=lambda rows: None, **flags):
    """change: what is done to the rows of diagnostics.csv."""
    special, shares = METHODS[kind]
    networks = {"script": "train_teacher", "model": "large"} if kind == "teacher" else {
        "script": "distill", "teacher": "large", "student": "small"}
    rows = [looked_at(shares, epoch, kind != "teacher") for epoch in range(1, len(curve) + 1)]
    change(rows)
    return made_runs.write_run(path, COMMON | networks | special | flags, curve, summary, status, rows)


run_main, refused = (partial(call, explain.main) for call in (command.run_main, command.refused))


def words(*runs):
    return "\n\n".join("\n".join(lines) for _, lines in explain.words(explain.read_cases(runs)))


def page(*runs):
    with matplotlib.style.context(["default", explain.STYLE]):
        return explain.page(explain.read_cases(runs))


def said(figure):
    """The words at the top of the page, as one line."""
    return " ".join(text.get_text() for text in figure.texts)


def panels(figure):
    """Panel by title."""
    return {axis.get_legend().get_title().get_text(): axis for axis in figure.axes}


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def check_layout(figure):
    """Nothing leaves the page, and neither words nor panels cover each other; takes seconds."""
    with matplotlib.style.context(["default", explain.STYLE]):
        figure.draw_without_rendering()
    page, boxes = figure.bbox, [text.get_window_extent() for text in figure.texts]
    boxes += [axis.get_tightbbox() for axis in figure.axes]
    for box in boxes:
        assert page.x0 <= box.x0 and page.y0 <= box.y0 and box.x1 <= page.x1 and box.y1 <= page.y1, box
    for one, other in itertools.combinations(boxes, 2):
        shared = matplotlib.transforms.Bbox.intersection(one, other)
        assert shared is None or min(shared.width, shared.height) < 1, (one, other)  # less than a pixel
    for axis in panels(figure).values():
        assert axis.get_legend().get_window_extent().y0 >= axis.bbox.y1, "the legend lies above the curves"
        assert axis.bbox.height / explain.DPI >= 1, "curves need an inch"
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels]
            assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:])), labels


def test_words_on_a_healthy_and_on_a_collapsed_run(tmp_path):
    assert words(write_run(tmp_path / "dkd-s3", "dkd")).splitlines() == [
        "dkd-s3", "DKD alpha 1 beta 8 T 4; CIFAR-100; large → small; seed 3", "",
        "completed, healthy",
        "  Validation accuracy: at most 55.0 % (epoch 7), 54.0 % in the last epoch (8)",
        "  Largest term beside cross-entropy: NCKD, on average 85 % of the logit gradient, at most 85 % (epoch 1)"]
    said = words(write_run(tmp_path / "run", "dkd", curve=FALLING, summary=COLLAPSED)).splitlines()[3:]
    assert said[0] == "collapsed, 3 alarms" and said[-1] == "  Advice: move: halve --lr or --beta"
    assert [line.split(": ")[1] for line in said if line.startswith("  Alarm")] == [
        "collapse 40, limit 5", "move 1.5, limit 1.45", "teacher 30, limit 50"]


@pytest.mark.parametrize(("status", "expected"), [
    ({"state": "running", "reason": "", "exit_code": None, "epoch": 8}, "unfinished after epoch 8 of 20, status running"),
    ({"state": "failed", "reason": "out of\nmemory", "exit_code": 7}, "failed after epoch 8 of 20: out of memory (exit code 7)"),
    ({"state": "stopped", "reason": "SIGTERM", "exit_code": 75}, "stopped after epoch 8 of 20: SIGTERM (exit code 75)"),
    (None, "unfinished after epoch 8 of 20, without status.json"),
])
def test_words_on_a_run_without_a_result(tmp_path, status, expected):
    assert words(write_run(tmp_path / "run", "kd", epochs=20, summary=None, status=status)).splitlines()[3] == expected


def test_words_on_a_teacher_from_before_alarms_name_no_term(tmp_path):
    text = words(write_run(tmp_path / "run", "teacher", val_size=0, summary={"verdict": "completed", "selected_on": "test set"}))
    assert text.splitlines()[1] == "labels only; CIFAR-100; large; seed 3"
    assert text.splitlines()[3] == "completed, made before alarms were recorded"
    assert "  Test accuracy: at most 55.0 %" in text and "term" not in text


def test_runs_are_compared_with_plain_kd(tmp_path):
    control = write_run(tmp_path / "kd", "kd")
    lower = write_run(tmp_path / "lower", "dkd", curve=[10.0, 60.0, 48.9])
    within = write_run(tmp_path / "within", "dkd", curve=[10.0, 49.0])
    few = write_run(tmp_path / "few", "dkd", curve=[45.0], summary=HEALTHY | {"val_images": 20})
    other = write_run(tmp_path / "data", "dkd", dataset="cifar10")
    weighted = write_run(tmp_path / "weighted", "dkd", class_weights="balanced")
    assert "  Against the control kd: last validation accuracy 45.0 %, 9.0 points below" in words(few, control), "20 images"
    text = words(lower, control, within, other, weighted, write_run(tmp_path / "teacher", "teacher"))
    assert text.startswith("lower, kd, within, data, weighted, teacher\nCIFAR-100, CIFAR-10; large → small, large\n")
    assert ("\nlower (DKD alpha 1 beta 8 T 4, seed 3): completed, healthy\n  Collapsed against the control kd: last validation "
            "accuracy 48.9 %, 5.1 points below; best 60.0 %, 5.0 points above\n") in text
    assert "  Against the control kd: last validation accuracy 49.0 %, 5.0 points below; best 49.0 %, 6.0 points below\n" in text
    assert "\nkd (control: KD alpha 0.7 T 4, seed 3): completed, healthy\n" in text
    assert text.count("control") == 3, "no other data, class weights or network are compared"
    assert "control" not in words(control) and "control" not in words(lower, within)
    namesake = write_run(tmp_path / "other" / "kd", "kd")
    assert words(control, namesake).startswith(f"{control}, {namesake}\n"), "runs of one name are told apart"


def test_the_page_of_one_run(tmp_path):
    figure = page(write_run(tmp_path / "run", "dkd", curve=FALLING[:6], summary=COLLAPSED, clip_grad=1.5))
    check_layout(figure)
    drawn = panels(figure)
    assert set(drawn) == TITLES
    assert all(alarm["text"] in said(figure) for alarm in COLLAPSED["alarms"]) and COLLAPSED["advice"] in said(figure)
    assert legend(drawn["Accuracy"]) == ["validation", "clean training", "best epoch", "early stop"]
    assert list(drawn["Accuracy"].lines[0].get_ydata()) == FALLING[:6]
    assert legend(drawn["Share of the logit gradient"]) == ["CE", "TCKD", "NCKD", "limit 80 %"]
    shares = [line.get_ydata()[0] for line in drawn["Share of the logit gradient"].lines]
    np.testing.assert_allclose(shares, [10, 5, 85, 80])
    assert set(drawn["Clipped steps"].lines[0].get_ydata()) == {25.0}
    assert legend(drawn["Clipped steps"]) == ["limit 90 %"]
    assert legend(drawn["Cosine with cross-entropy"]) == ["TCKD", "NCKD", "whole loss"]
    axis = panels(page(write_run(tmp_path / "short", "kd", curve=CURVE[:2])))["Teacher on the student's images"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["all", "mixup"], "no image was clean"
    # 10 and 20 % of 100 images an epoch; with mixup of 50 and of 100; either label is 5 points more
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], [15, 50 / 3, 20, 50 / 3 + 5])


def test_the_page_of_two_runs_and_of_as_many_as_fit(tmp_path):
    summary = COLLAPSED | {"advice": 20 * "raise --clip-grad, "}
    figure = page(write_run(tmp_path / "_dkd $x$", "dkd", curve=FALLING, summary=summary), write_run(tmp_path / "kd", "kd"))
    assert said(figure).count("--clip-grad") == 20, "a flag is not broken"
    drawn = panels(figure)
    assert set(drawn) == TITLES
    assert not any(text.get_parse_math() for text in figure.texts), "a name is not mathematics"
    assert "_dkd $x$ (DKD alpha 1 beta 8 T 4, seed 3): collapsed, 3 alarms" in said(figure)
    assert "Collapsed against the control kd: last validation accuracy 20.0 %, 34.0 points below" in said(figure)
    assert legend(drawn["Share of the logit gradient"]) == ["NCKD", "KL", "limit 80 %"]
    curves = drawn["Share of the logit gradient"].lines
    np.testing.assert_allclose([line.get_ydata()[0] for line in curves[:2]], [85, 30])
    assert len({line.get_color() for line in curves[:2]}) == len({line.get_marker() for line in curves[:2]}) == 2
    long = COLLAPSED | {"alarms": 2 * [*COLLAPSED["alarms"], COLLAPSED["alarms"][2] | {"text": "words " * 60 + "x" * 100}]}
    figure = page(*(write_run(tmp_path / f"{'long-' * 40}{number}", "dkd", summary=long) for number in range(len(explain.LOOKS))))
    check_layout(figure)
    assert said(figure).count("teacher 30, limit 50") == 4 * len(explain.LOOKS)


def test_panels_without_numbers_are_left_out_and_leave_no_hole(tmp_path):
    def without(*starts):
        def change(rows):
            for row in rows:
                row |= {name: "" for name in row if name.startswith(starts)}
        return change

    unweighted, about_teaching = {"Share of the logit gradient", "Cosine with cross-entropy"}, "Teacher on the student's images"
    figure = page(write_run(tmp_path / "method", "kd", change=without("share_", "cos_")))
    assert set(panels(figure)) == TITLES - unweighted
    figure = page(write_run(tmp_path / "teacher", "teacher"))
    assert set(panels(figure)) == TITLES - unweighted - {about_teaching} and legend(panels(figure)["Logit scale"]) == ["student"]
    figure = page(write_run(tmp_path / "five", "teacher", change=without("pull", "clip"), curve=CURVE[:1], epochs=1))
    check_layout(figure)
    widths = [axis.bbox.width for axis in panels(figure).values()]
    assert len(widths) == 5 and widths[0] > 2 * widths[1], "the first panel fills the row"


def test_empty_cells_are_gaps_and_one_epoch_has_markers(tmp_path):
    def empty(rows):
        for row in rows[2], rows[4]:
            row.update(dict.fromkeys((name for name in row if name != "epoch"), ""))
        rows[6]["grad_norm_mean"] = "inf"
        del rows[5]

    figure = page(write_run(tmp_path / "run", "dkd", change=empty))
    norm = panels(figure)["Gradient before clipping"].lines[0]
    np.testing.assert_allclose(norm.get_ydata(), [2, 1, np.nan, 0.5, np.nan, np.nan, np.nan, 0.25])
    assert {3, 7} <= set(norm.get_markevery()), "a value between gaps has a marker"
    largest = panels(figure)["Share of the logit gradient"].lines[-2].get_ydata()
    np.testing.assert_allclose(largest, [85, 85, np.nan, 85, np.nan, np.nan, 85, 85])
    figure = page(write_run(tmp_path / "one", "dkd", curve=CURVE[:1], epochs=1))
    single = [line for axis in panels(figure).values() for line in axis.lines if len(line.get_xdata()) == 1]
    assert all(line.get_marker() not in ("", "None") and line.get_markevery() in (None, [0]) for line in single)
    assert panels(figure)["Accuracy"].get_xlim() == (0.5, 1.5)


def test_the_script_runs_from_anywhere_prints_the_words_and_draws_the_same_bytes_again(tmp_path):
    run = write_run(tmp_path / "run", "teacher", curve=FALLING, summary=COLLAPSED)
    done = subprocess.run([sys.executable, explain.__file__, run], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": "", "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.endswith(f"\n{run / 'explain.png'}\n")
    assert run_main(run, "--output", tmp_path / "page.png") == (0, f"{words(run)}\n\n{tmp_path / 'page.png'}\n", "")
    assert (run / "explain.png").read_bytes() == (tmp_path / "page.png").read_bytes()
    image = matplotlib.image.imread(run / "explain.png")
    assert image.shape[1] == 1245
    thirds = [part.mean() for part in np.array_split(image[..., :3].mean(axis=2) < 0.5, 3)]
    assert min(thirds) > 0.005, "neither the words nor a row of panels is blank"


def test_errors_of_usage(tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "page", lambda cases: explain.Figure())  # the real one takes seconds
    run = write_run(tmp_path / "run", "kd")
    nine = [tmp_path / str(number) for number in range(9)]
    for arguments, words in (([run, "--output", "page.svg"], "must end in .png or .pdf"), ([run, run], "named twice"),
                             (nine, "too many for a page"), ([], ""), ([run, "--out", "page.png"], "")):
        assert words in refused(2, *arguments)
    assert "cannot write" in refused(8, run, "--output", run / "log.csv" / "page.png")


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("diagnostics.csv", None, "no diagnostics.csv"), ("diagnostics.csv", "images\n5\n", "no column epoch"),
    ("diagnostics.csv", "epoch,images\n1,many\n", "could not convert"), ("diagnostics.csv", "epoch,images\n1\n", "(1,2)"),
    ("diagnostics.csv", "epoch,images\n999999999,5\n", "of at most 8"), ("diagnostics.csv", "epoch,images\n", "0 epochs"),
    ("log.csv", "epoch,val_acc1\n", "0 epochs"), ("log.csv", "epoch,val_loss\n1,2.0\n", "no column val_acc1"),
    ("log.csv", "epoch,val_acc1\n1,50.0\n2,\n", "percentage"), ("log.csv", "epoch,val_acc1\n1,500\n", "percentage"),
    ("log.csv", "epoch,val_acc1\n2,50.0\n1,51.0\n", "do not rise"), ("log.csv", b"epoch,val_acc1\n1,\xff\n", "utf-8"),
    ("log.csv", "epoch,val_acc1\n1,50.0\n", "no row of epoch 7"), ("config.json", None, "no such file"),
    ("config.json", '{"script": ', "line 1"), ("config.json", "[1]", "not an object"),
    ("status.json", '{"state": 3}', "state is 3"), ("summary.json", '{"test_acc1_last": NaN}', "test_acc1_last is nan"),
    ("summary.json", {"alarms": [3]}, "name is None"),
    ("summary.json", {"alarms": [{"name": "move", "value": 1, "text": "large"}]}, "limit is None"),
    ("summary.json", {"advice": 3}, "advice is 3"), ("config.json", {"clip_grad": "1"}, "clip_grad is '1'"),
])
def test_damaged_files(tmp_path, name, content, expected):
    """content: None for no file, or what replaces values of it."""
    run = write_run(tmp_path / "run", "kd")
    if expected == "0 epochs":
        (run / "summary.json").unlink()
    if isinstance(content, dict):
        content = json.dumps(json.loads((run / name).read_text()) | content)
    (run / name).unlink(missing_ok=True)
    if content is not None:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(4, run)
    assert expected in message and str(run / name) in message, message
    assert not (run / "explain.png").exists()
