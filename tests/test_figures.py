"""plots/make_figures.py, on run directories with invented numbers that test the drawing and mean nothing else."""
import math
import os
import re
import statistics
import subprocess
import sys
from functools import partial

import command
import made_runs
import matplotlib.image
import matplotlib.style
import numpy as np
import pytest
from helpers import table_of

from losses.chosen_method import ChosenMethod
from losses.methods import METHODS
from plots import make_figures
from rundir import files

LARGE, SMALL = "efficientnet_v2_l", "efficientnet_v2_s"
TRAINING = {
    "dataset": "cifar100", "epochs": 200, "image_size": 32, "val_size": 5000, "device": "cpu", "batch_size": 128, "lr": 1e-3,
    "policy": "autoaugment", "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0,
}
GROUPS = {  # the flags that make each experiment, and the plateau of its invented curve
    "teacher": ({"model": LARGE}, 77),
    "teacher-strong": ({"model": LARGE, "image_size": 64}, 80),
    "alone": ({"model": SMALL}, 71),
    "v1": ({"method": "kd", "alpha": 0.7, "policy": "none", "random_erasing": 0.0}, 75),
    "v2": ({"method": "kd", "alpha": 0.7}, 76),
    "v3": ({"method": "dkd", "alpha": 1.0, "beta": 8.0}, 67),
    "v3.1": ({"method": "dkd", "alpha": 1.0, "beta": 2.0}, 74),
    "v4": ({"method": "kd", "alpha": 0.7}, 76.3),
}
TEACHER_TEST = 80.0
TEST_BEST = {1: 60.0, 2: 62.0, 3: 67.0}  # by seed: mean 63, sample deviation sqrt((9 + 1 + 16) / 2)


def curve(plateau, ran, planned, seed):
    """An invented validation accuracy per epoch, in percent, with a wiggle that depends on the seed."""
    return [round(plateau * (1 - math.exp(-6 * epoch / planned)) + 0.6 * math.sin(1.7 * epoch + seed) + 0.4 * seed, 3)
            for epoch in range(1, ran + 1)]


def write_run(path, name, *, seed=1, ran=None, finished=True, summary=(), **flags):
    """A run of `seed`; one that `finished` after `ran` < planned epochs stopped early."""
    special, plateau = GROUPS[name]
    distilled = "method" in special
    config = TRAINING | {"script": "distill" if distilled else "train_teacher", "seed": seed, "beta": None}
    if distilled:
        config |= {"experiment": name, "temperature": 4.0, "teacher": LARGE, "student": SMALL}
    config |= special | flags
    if distilled:
        numbers = {each: config.get(each) for each in METHODS[config["method"]].hyperparameters}
        config |= ChosenMethod(METHODS[config["method"]], numbers, 0.1).labels | flags
    best = {"test_acc1_last": TEST_BEST[seed] - 1, "test_acc1_best": TEST_BEST[seed]}
    best |= {"retention": 100 * TEST_BEST[seed] / TEACHER_TEST} if distilled else {}
    return made_runs.write_run(path, config, curve(plateau, ran or config["epochs"], config["epochs"], seed),
                               best | dict(summary) if finished else None)


def write_study(top, seeds=(1,), names=tuple(GROUPS), stop_v3=84, **flags):
    """Every experiment for every seed; the seeds of v3 stop early, 5 epochs apart."""
    for name in names:
        for index, seed in enumerate(seeds):
            ran = stop_v3 + 5 * index if name == "v3" else None
            write_run(top / (f"{name}-s{seed}" if len(seeds) > 1 else name), name, seed=seed, ran=ran, **flags)
    return top


run_main, refused = (partial(call, make_figures.main) for call in (command.run_main, command.refused))


def draw(top, name):
    """The Figure called `name`, of the runs below `top`."""
    function, wanted, needs_summary = make_figures.FIGURES[name]
    study = make_figures.selected(make_figures.read_study([top])[0], lambda run: run.summary or not needs_summary)
    with matplotlib.style.context(["default", make_figures.STYLE]):
        figure = make_figures.legend(function(study, [key for key in wanted if key in study]))
        figure.draw_without_rendering()
    return figure


def line(figure, start):
    """The one line of the figure whose label begins with `start`."""
    found = [line for line in figure.axes[0].lines if line.get_label().startswith(start)]
    assert len(found) == 1, (start, [line.get_label() for line in figure.axes[0].lines])
    return found[0]


def legend_texts(figure):
    return [text.get_text().replace("\u00a0", " ") for text in figure.legends[0].get_texts()]


def table(path):
    return {row["experiment"]: row for row in table_of(path)}


def run_study(top, expected=0):
    """The outputs of the runs in top/runs, what main() prints, and Table 1; figures are built but not rendered."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(make_figures, "write_figure", lambda figure, path: files.write_atomic(f"{path}.png", b""))
        code, stdout, errors = run_main("--runs", top / "runs", "--output", top / "out")
    assert code == expected and errors.count("\n") == bool(expected), errors
    return top / "out", stdout + errors, table(top / "out" / "table1.csv")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Three seeds of 200 epochs, and the outputs of main()."""
    top = tmp_path_factory.mktemp("seeds")
    return write_study(top / "runs", seeds=(1, 2, 3)), *run_study(top)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One seed of 8 epochs, and the outputs of main()."""
    top = tmp_path_factory.mktemp("demo")
    return write_study(top / "runs", epochs=8, stop_v3=5, dataset="synthetic"), *run_study(top)


def test_every_output_is_written_and_named(seeds):
    _, output, stdout, _ = seeds
    expected = {f"figure{n}.png" for n in range(1, 7)} | {f"table{n}.{suffix}" for n in (1, 2) for suffix in ("md", "csv", "tex")}
    assert {path.name for path in output.iterdir()} == expected
    assert all(f"{output / name}, .pdf\n" in stdout for name in expected if name.startswith("figure")), stdout
    assert stdout.endswith((output / "table1.md").read_text()), "Table 1 ends what is printed"


def test_the_script_runs_from_anywhere_and_draws_the_same_bytes_again(tmp_path):
    runs = write_study(tmp_path / "runs", names=("v1",), epochs=8)  # which only half of the figures show
    done = subprocess.run([sys.executable, make_figures.__file__, "--runs", runs, "--output", tmp_path / "a"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": "", "PYTHONIOENCODING": "ascii"}, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    with matplotlib.style.context(["default", make_figures.STYLE]):
        make_figures.write_figure(draw(runs, "figure4"), tmp_path / "b")
    assert matplotlib.image.imread(tmp_path / "b.png").shape[1] == 3.5 * 300
    for suffix in ("png", "pdf"):
        assert (tmp_path / f"b.{suffix}").read_bytes() == (tmp_path / "a" / f"figure4.{suffix}").read_bytes()


@pytest.mark.parametrize("name", make_figures.FIGURES)
def test_no_text_is_clipped_or_covered(seeds, demo, name):
    for top in (seeds[0], demo[0]):
        figure = draw(top, name)
        axis, used = figure.axes[0], figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert min(used.x0, used.y0) >= 0 and used.x1 <= width and used.y1 <= height, (used, width, height)
        assert not figure.legends[0].get_window_extent().overlaps(axis.bbox), "the legend lies below the curves"
        boxes = [text.get_window_extent() for text in axis.get_xticklabels()]
        assert not any(left.overlaps(right) for left, right in zip(boxes, boxes[1:])), axis.get_xticklabels()


def test_curves_are_mean_and_deviation_of_the_logs(seeds):
    figure = draw(seeds[0], "figure1")
    axis, drawn = figure.axes[0], line(figure, "v2")
    logs = [curve(76, 200, 200, seed) for seed in (1, 2, 3)]
    assert list(drawn.get_xdata()) == list(range(1, 201))
    np.testing.assert_allclose(drawn.get_ydata(), [statistics.mean(at) for at in zip(*logs)], rtol=1e-12)
    band = axis.collections[0].get_paths()[0].vertices
    mean, deviation = (function([log[99] for log in logs]) for function in (statistics.mean, statistics.stdev))
    np.testing.assert_allclose(sorted(y for x, y in band if x == 100), [mean - deviation, mean + deviation], rtol=1e-9)
    assert axis.get_title(loc="left") == f"CIFAR-100, n = 3 seeds, band = ± 1 SD\n{LARGE} → {SMALL}"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("epoch", "validation accuracy (%)")


def test_early_stops_are_crossed_and_labelled_and_the_mean_is_of_the_rest(seeds):
    figure = draw(seeds[0], "figure1")
    logs = [curve(67, 84 + 5 * index, 200, seed) for index, seed in enumerate((1, 2, 3))]
    crosses = [line.get_xydata() for line in figure.axes[0].lines if line.get_marker() == "X"]
    np.testing.assert_allclose(np.concatenate(crosses), [(len(log), log[-1]) for log in logs])
    drawn = line(figure, "v3: DKD β\xa0=\xa08, stopped at 84–94").get_xydata()
    np.testing.assert_allclose(drawn[86], (87, statistics.mean(log[86] for log in logs[1:])))
    np.testing.assert_allclose(drawn[-1], (94, logs[2][-1]))
    assert legend_texts(figure)[-1] == "early stop"
    figure = draw(seeds[0], "figure6")
    assert line(figure, "v2").get_xdata()[[0, -1]].tolist() == [151, 200], "the last 50 epochs"
    assert len(line(figure, "v3: DKD β\xa0=\xa08, stopped at 84–94").get_xdata()) == 0


def test_figure_2_shows_both_teachers_on_the_scale_of_its_curves(seeds):
    figure = draw(seeds[0], "figure2")
    for name, label in (("teacher", "teacher: "), ("teacher-strong", "stronger teacher: ")):
        best = statistics.mean(max(curve(GROUPS[name][1], 200, 200, seed)) for seed in (1, 2, 3))
        np.testing.assert_allclose(line(figure, label).get_ydata(), best, err_msg="validation accuracy of the best epochs")
        assert line(figure, label).get_label() == f"{label}{best:.1f} %"


def test_figure_5_shows_retention_with_its_deviation(seeds):
    figure, deviation = draw(seeds[0], "figure5"), 100 / TEACHER_TEST * 13 ** 0.5
    axis = figure.axes[0]
    # alone: accuracies of mean 63 over those of the runs called teacher, of mean 63 too
    np.testing.assert_allclose([bar.get_height() for bar in axis.patches], [100 * 63 / TEACHER_TEST] * 5 + [100 * 63 / 63])
    assert axis.texts[0].get_text() == f"78.8\n± {deviation:.1f}"
    segment = axis.collections[0].get_segments()[0]
    np.testing.assert_allclose(segment[:, 1], [78.75 - deviation, 78.75 + deviation])
    assert set(line(figure, "teacher").get_ydata()) == {100}


def test_figures_say_what_they_compare(demo, tmp_path):
    """The methods, seeds that differ in number, and selection on the test set."""
    figure = draw(demo[0], "figure4")
    assert figure.axes[0].get_title(loc="left").startswith("synthetic images, 1 seed\n")
    assert legend_texts(figure) == ["v1: KD, mixing only", "v2: KD", "v3: DKD β = 8, stopped at 5", "v3.1: DKD β = 2",
                                    "v4: KD, stronger teacher", "student alone", "early stop"]
    for name, seed in (("v2", 1), ("v2", 2), ("v4", 1)):
        write_run(tmp_path / f"{name}-s{seed}", name, seed=seed, epochs=8, summary={"selected_on": "test set"})
    figure = draw(tmp_path, "figure2")
    assert legend_texts(figure) == ["v2: KD (n = 2)", "v4: KD, stronger teacher (n = 1)"]
    assert "n = 1–2 seeds" in figure.axes[0].get_title(loc="left")
    assert figure.axes[0].get_ylabel() == "test accuracy (%),\nused for selection"
    assert line(draw(tmp_path, "figure6"), "v2").get_xdata().tolist() == [5, 6, 7, 8], "the last half"


def test_table_1_holds_hand_computed_numbers(seeds, demo):
    rows = seeds[3]
    assert list(rows) == list(GROUPS)
    assert (rows["v2"]["method"], rows["v3"]["method"]) == ("KD alpha 0.7 T 4", "DKD alpha 1 beta 8 T 4")
    assert (rows["v2"]["augmentation"], rows["v1"]["augmentation"]) == ("AA+RE+MC", "MC")
    expected = {  # of 60, 62, 67; the last epoch's are one lower; the teacher's is 80
        "test_acc1_best_mean": 63, "test_acc1_best_sd": 13 ** 0.5, "test_acc1_last_mean": 62, "test_acc1_last_sd": 13 ** 0.5,
        "retention_mean": 78.75, "retention_sd": 1.25 * 13 ** 0.5, "teacher_test_acc1": 80, "n": 3,
        "epochs_min": 200, "epochs_max": 200, "report_acc1": 76.19, "report_retention": 99.40,
    }
    assert {column: float(rows["v2"][column]) for column in expected} == pytest.approx(expected, abs=5e-5)
    assert (rows["v3"]["epochs_min"], rows["v3"]["epochs_max"], rows["v3"]["verdict"]) == ("84", "94", "collapsed")
    assert float(rows["alone"]["retention_mean"]) == 100
    assert rows["teacher"]["retention_mean"] == rows["teacher"]["teacher_test_acc1"] == rows["alone"]["report_acc1"] == ""
    text = (seeds[1] / "table1.md").read_text()
    for part in ("| 63.00 ± 3.61 |", "| 84–94 / ", "| 66.85 / 87.21 |", "student initialisation: none (v1, v2, v3, v3.1, v4)",
                 "validation split of 5000 training images", "n = 3 seeds, mean ± sample SD"):
        assert part in text, part
    assert "report_acc1" not in demo[3]["v2"], "of another setting"
    text = (demo[1] / "table1.md").read_text()
    assert "76.19" not in text and "not a reproduction of the report" in text and "; 1 seed." in text


def test_table_2_holds_the_cost_of_each_network(seeds):
    rows, expected = table(seeds[1] / "table2.csv"), {"params_m": 20, "size_mb": 80, "gflop": 0.12, "image_size": 32,
                                                      "compression": 5.85, "wall_min": 1.5, "test_acc1_best_mean": 63}
    assert {column: float(rows["v2"][column]) for column in expected} == expected
    assert [rows[name]["network"] for name in ("teacher", "alone", "v2")] == [LARGE, SMALL, SMALL]
    assert rows["teacher"]["compression"] == ""


def test_latex_is_well_formed(seeds):
    row = {"exp.": "a|b", "acc. (%)": make_figures.shown(make_figures.spread([1.0, 2.0]))}
    latex = make_figures.as_latex([({}, row)], "a_b & {c} #1 $2 ~ ^ \\ < 3")
    assert r"a|b & 1.50 $\pm$ 0.71 \\" in latex
    assert r"a\_b \& \{c\} \#1 \$2 \textasciitilde{} \textasciicircum{} \textbackslash{} $<$ 3" in latex
    for text in (latex, (seeds[1] / "table1.tex").read_text()):
        bare = re.sub(r"\\[\\{}%&#_$]", lambda escape: r"\\" if escape[0] == r"\\" else "", text)
        depths = np.cumsum([(character == "{") - (character == "}") for character in bare])
        assert depths.min() == 0 == depths[-1], text
        assert bare.isascii() and bare.count("$") % 2 == 0 and not re.search(r"[#_~^]|%(?!\n)", bare), text
        columns = len(re.search(r"\{tabular\}\{([lr]+)\}", text)[1])
        assert {line.count("&") for line in bare.splitlines() if line.endswith(r"\\")} == {columns - 1}, text


def test_missing_and_unfinished_runs_are_named_and_the_rest_is_drawn(tmp_path):
    write_study(tmp_path / "runs", seeds=(1, 2), names=("v2",), epochs=8)
    running = write_run(tmp_path / "runs" / "v2-s3", "v2", seed=3, epochs=8, ran=3, finished=False)
    waiting = write_run(tmp_path / "runs" / "v3", "v3", epochs=8, finished=False)
    (waiting / "log.csv").write_text("epoch,val_acc1\n")
    _, output, rows = run_study(tmp_path)
    for said in ("not found: teacher, teacher-strong, alone, v1, v3.1, v4", "figure1.png, .pdf: drawn without v3",
                 "figure3: not drawn, without v3 and v3.1", f"unfinished, in curves only: {running} (epoch 3 of 8)",
                 f"unfinished, in curves only: {waiting} (epoch 0 of 8)"):
        assert f"{said}\n" in output
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [f"figure{number}.png" for number in (1, 2, 4, 5, 6)]
    assert list(rows) == ["v2"] and (rows["v2"]["n"], float(rows["v2"]["test_acc1_best_mean"])) == ("2", 61)
    assert line(draw(tmp_path / "runs", "figure2"), "v2").get_label() == "v2: KD, unfinished"
    (running / "status.json").write_text('{"exit_code": 6}')
    _, output, rows = run_study(tmp_path)
    assert f"diverged, in curves only: {running} (epoch 3 of 8)\n" in output and rows["v2"]["n"] == "2"
    assert "Diverged, and not counted: v2 seed 3." in (tmp_path / "out" / "table1.md").read_text()
    assert line(draw(tmp_path / "runs", "figure2"), "v2").get_label() == "v2: KD, diverged"
    study, *_ = make_figures.read_study([running, tmp_path / "runs" / "v2-s1", tmp_path / "runs"])
    assert [run.config["seed"] for run in study["v2"]] == [1, 2, 3], "each run counts once"


def test_runs_outside_the_study_join_where_data_networks_and_teacher_are_the_studys(tmp_path):
    runs = tmp_path / "runs"
    for path, name in (("teacher", "teacher"), ("second-try", "v3"), ("v4-s7", "v4")):
        write_run(runs / path, name, epochs=8, **{"experiment": None} if name == "v4" else {})
    write_run(runs / "demo" / "v4", "v4", epochs=3, dataset="synthetic")  # deeper: another study
    labels = {"experiment": None, "method_in_tables": "NEW strength 2", "method_in_figures": "NEW"}
    for seed in (1, 2):
        write_run(runs / f"new-strength2-s{seed}", "v2", epochs=8, seed=seed, **labels)
    left = [write_run(runs / f"other-{key}", "v2", epochs=8, **labels | {key: value})
            for key, value in (("teacher", "resnet20"), ("student", "resnet20"), ("image_size", 64), ("dataset", "cifar10"))]
    _, output, rows = run_study(tmp_path)
    assert f"left out, not of the study: {', '.join(map(str, sorted(left)))}\n" in output
    assert list(rows) == ["teacher", "v3", "v4", "new-strength2"], "by --experiment, or else by directory"
    assert (rows["new-strength2"]["method"], rows["new-strength2"]["n"]) == ("NEW strength 2", "2")
    study, *_ = make_figures.read_study([runs])
    curve = line(make_figures.draw_curves(study, ["v3", "new-strength2"]).figure, "new-strength2: NEW")
    assert curve.get_color() == make_figures.OTHERS[0].colour and len(curve.get_xdata()) == 8


def test_nothing_to_draw_and_unknown_flags_are_errors(tmp_path):
    out = tmp_path / "out"
    write_run(tmp_path / "others" / "kd-s1", "v2", epochs=8, experiment=None)
    write_run(tmp_path / "early" / "teacher", "teacher", epochs=8, finished=False)
    (damaged := write_run(tmp_path / "damaged" / "v2", "v2", epochs=8) / "config.json").write_text("[1]")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent", "others", "early", "damaged"):
        message = refused(4, "--runs", tmp_path / name, "--output", out)
        assert str(damaged if name == "damaged" else tmp_path / name) in message
    for arguments in (["--run", "x"], ["x"], ["--runs"]):
        refused(2, *arguments)
    assert not out.exists()


def test_a_run_that_cannot_be_read_leaves_the_others(tmp_path):
    for name in ("v1", "v2", "v3"):
        write_run(tmp_path / "runs" / name, name, epochs=8)
    write_run(tmp_path / "runs" / "v3-s2", "v3", seed=2, epochs=8, loss_scale=1.0)  # of a version that has this flag
    (tmp_path / "runs" / "v1" / "summary.json").write_text('{"test_acc1_la')
    _, said, rows = run_study(tmp_path, expected=4)
    assert "left out: cannot read summary.json" in said and str(tmp_path / "runs" / "v1") in said
    assert "\nerror: runs that cannot be read were left out (1, " in said and list(rows) == ["v2", "v3"]


def test_a_run_far_below_kd_of_its_seed_collapsed(tmp_path):
    """By 5 points and three images; KD with other images is no control, and a student alone has none."""
    def end_at(accuracy, name, seed, flags={}, **images):
        path = write_run(tmp_path / "runs" / f"{name}{'-alpha8' * bool(flags)}-s{seed}", name, epochs=8, seed=seed,
                         summary={"best_epoch": 8, **images}, **flags)
        (path / "log.csv").write_text("epoch,val_acc1\n" + "".join(f"{epoch},{accuracy}\n" for epoch in range(1, 9)))

    for accuracy, name, seed in ((50, "v2", 1), (45, "v3", 1), (60, "v2", 2), (54.9, "v3", 2), (20, "v1", 1), (20, "alone", 1)):
        end_at(accuracy, name, seed)
    end_at(35.0, "v3", 3, val_images=20)  # 15 points below the first v2
    end_at(90, "v2", 3, flags={"experiment": None, "alpha": 8.0, "ce_weight": 1.0})  # of the same seed, and no control
    verdicts = {name: row["verdict"] for name, row in run_study(tmp_path)[2].items()}
    assert verdicts.pop("v2-alpha8") == "completed"
    assert verdicts == {"v2": "completed", "v3": "2 completed, 1 collapsed", "v1": "completed", "alone": "completed"}


@pytest.mark.parametrize(("first", "second", "what"), [
    (("v3", {}), ("v3", {"seed": 2, "beta": 4.0}), "beta of v3, 8.0 and 4.0"),
    (("v2", {}), ("v2", {}), "seed 1"),
    (("v2", {}), ("v3", {"dataset": "cifar10"}), "dataset, cifar100 and cifar10"),
    (("v3", {"student": "resnet20"}), ("alone", {}), f"student, resnet20 and {SMALL}"),
    (("v1", {}), ("v2", {"teacher": "resnet20"}), f"teacher, {LARGE} and resnet20"),
    (("teacher-strong", {}), ("v4", {"teacher": "resnet20"}), f"stronger teacher, {LARGE} and resnet20"),
    (("v1", {}), ("v2", {"summary": {"selected_on": "test set"}}), "a validation split and the test set"),
])
def test_mixtures_are_refused(tmp_path, first, second, what):
    paths = [write_run(tmp_path / top / name, name, **{"epochs": 8} | flags)
             for top, (name, flags) in (("one", first), ("two", second))]
    message = refused(2, "--runs", tmp_path, "--output", tmp_path / "out")
    assert what in message and f"({paths[0]} and {paths[1]})" in message and "--runs" in message, message
