"""plots/ablation_figures.py, on sweeps with invented numbers that test the drawing and mean nothing else."""
import csv
import json
import math
import os
import re
import subprocess
import sys
from itertools import product

import matplotlib.style
import pytest

from plots import ablation_figures, make_figures

SMALL = {
    "script": "distill", "dataset": "synthetic", "teacher": "v2_tiny", "student": "v2_pico", "method": "kd", "alpha": 0.7,
    "ce_weight": None, "kl": "forward", "temperature": 4.0, "beta": None, "mixed_target": None, "dkd_warmup": 0,
    "standardize": False, "policy": "autoaugment", "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0,
    "epochs": 3, "opt": "sgd", "lr": 0.2, "clip_grad": 0.0, "patience": 0, "monitor": "val_loss", "amp": "off", "val_size": None,
    "milestones": [150, 180], "device": "cpu", "teacher_sha256": "00",
}
DKD = {"method": "dkd", "alpha": 1.0, "ce_weight": 1.0, "kl": None, "beta": 8.0, "mixed_target": "pair"}
LOUD = {"alpha": 8.0, "ce_weight": 1.0}
HIGH = {"lr": 1.6}
NONE, ALL = {"policy": "none", "random_erasing": 0.0, "mix_prob": 0.0}, {}
MIXED = {"policy": "none", "random_erasing": 0.0}
T = {2: 12.706204736, 3: 4.302652730}  # the 97.5 % point of Student's t, of n - 1 degrees of freedom


def write_run(sweep, seed, accuracy, verdict="completed", **flags):
    """A run directory as the training scripts leave it; `accuracy` None: it diverged in the second epoch."""
    config = SMALL | flags | {"seed": seed, "output": str(sweep)}
    if config["script"] == "train_teacher":
        config = {key: value for key, value in config.items() if key not in ablation_figures.OF_THE_METHOD | {"method"}}
        config["model"] = config.pop("student")
    path = sweep / f"{len(list(sweep.glob('*')))}-s{seed}"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if accuracy is None:
        (path / "status.json").write_text(json.dumps({"state": "failed", "exit_code": 6}))
    else:
        (path / "summary.json").write_text(json.dumps({"test_acc1_best": accuracy, "verdict": verdict}))
    epochs = range(1, 2 if accuracy is None else 4)
    lines = ["epoch,val_loss,val_acc1", *(f"{epoch},1.5,{(accuracy or 30) * epoch / 3}" for epoch in epochs)]
    (path / "log.csv").write_text("\n".join(lines) + "\n")
    shares = {"share_ce": 0.1, "share_tckd": 0.2, "share_nckd": 0.7} if config.get("method") == "dkd" else (
        {"share_ce": 0.4, "share_kl": 0.6})
    lines = [",".join(("epoch", "grad_ce", *shares)), *(",".join(map(str, (epoch, 1, *shares.values()))) for epoch in epochs)]
    (path / "diagnostics.csv").write_text("\n".join(lines) + "\n")
    return path


def write_cell(sweep, accuracies, verdict="completed", **flags):
    """A run per seed from 0 on."""
    return [write_run(sweep, seed, accuracy, verdict, **flags) for seed, accuracy in enumerate(accuracies)]


def write_ablation(top):
    """Three seeds: at the high learning rate DKD with beta 8 collapses, and less of it does not."""
    for name, lr, base in (("usual", 0.2, 55), ("high", 1.6, 20)):
        write_cell(top / name, (base, base + 1, base + 3), "collapsed" if base == 20 else "completed", lr=lr, **DKD)
        write_cell(top / name, (50, 51, 52), lr=lr)
        write_cell(top / name, (51, 51, 55), lr=lr, **LOUD)
        write_cell(top / name, (54, 54.5, 52), lr=lr, **DKD | {"beta": 2.0})
        write_cell(top / name, (base + 2, base + 5, base + 6), lr=lr, **DKD | {"clip_grad": 1.0})
        write_cell(top / name, (33, None, None), lr=lr, **DKD | {"dkd_warmup": 3})
        write_cell(top / name, (33, 34, 35), lr=lr, script="train_teacher")
        write_cell(top / name, (40, 42, 41), lr=lr, mix_prob=0.0)  # KD without mixing: two changes from the base
        write_cell(top / name, (40, 42, 41), lr=lr, **DKD | {"patience": 2, "monitor": "val_acc1"})
    for index, level in enumerate((NONE, MIXED, {"mix_prob": 0.0}, ALL)):
        write_cell(top / "phase", (50 - index, 52), **HIGH | level)
        for beta in (1.0, 2.0, 8.0):
            write_cell(top / "phase", (50 - beta * index, 52 + beta), **HIGH | level | DKD | {"beta": beta})
    write_cell(top / "findings", (50,), opt="adamw", lr=0.004)
    return top


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    return write_ablation(tmp_path_factory.mktemp("ablation"))


def draw(capsys, runs, output):
    """Exit code, stdout and stderr of main() in this process."""
    try:
        ablation_figures.main(["--runs", str(runs), "--output", str(output)])
        code = 0
    except SystemExit as end:
        code = end.code
    return (code, *capsys.readouterr())


@pytest.fixture
def quick(monkeypatch):
    """Figures are laid out and not written, which takes longest."""
    monkeypatch.setattr(make_figures, "write_figure", lambda figure, path: figure.draw_without_rendering())


def table(path):
    with open(path, newline="") as file:
        return [{key: float(value) if re.fullmatch(r"-?[\d.]+", value) else value for key, value in row.items()}
                for row in csv.DictReader(file)]


def sweeps_of(top):
    return {name: ablation_figures.read_sweep(top / name)[0] for name in ablation_figures.SWEEPS if (top / name).exists()}


def texts(artist):
    return [text.get_text() for text in artist.findobj(lambda part: hasattr(part, "get_text")) if text.get_text()]


@pytest.fixture(scope="module")
def figures(ablation):
    """The three, laid out."""
    sweeps = sweeps_of(ablation)
    two = {name: sweeps[name] for name in ("high", "usual")}
    with matplotlib.style.context(["default", ablation_figures.STYLE]):
        drawn = (ablation_figures.draw_phase(sweeps["phase"][0].config, ablation_figures.phase_rows(sweeps["phase"])),
                 ablation_figures.draw_shares(two),
                 ablation_figures.draw_causes(two, {name: ablation_figures.cause_rows(name, two) for name in two}))
        for figure in drawn:
            figure.draw_without_rendering()
    return drawn


# Numbers

def test_phase_numbers_are_paired_by_seed(tmp_path, capsys, quick):
    """KD has 50 and 52; of DKD's three seeds two have a partner, and the third counts in its mean alone."""
    write_cell(tmp_path / "phase", (50, 52), **HIGH)
    write_cell(tmp_path / "phase", (51, 56, 70), **HIGH | DKD)
    write_cell(tmp_path / "phase", (48,), **HIGH | NONE)
    write_cell(tmp_path / "phase", (46.5,), **HIGH | NONE | DKD)
    assert draw(capsys, tmp_path, tmp_path / "out")[0] == 0
    assert table(tmp_path / "out" / "figure7.csv") == [
        {"augmentation": "none", "beta": 8, "n": 1, "difference": -1.5, "accuracy": 46.5, "kd_accuracy": 48, "runs": 1,
         "collapsed": 0, "diverged": 0},
        {"augmentation": "AutoAugment + Random Erasing + Mixup/CutMix", "beta": 8, "n": 2, "difference": 2.5, "accuracy": 59,
         "kd_accuracy": 51, "runs": 3, "collapsed": 0, "diverged": 0}]


def test_levels_of_augmentation_are_in_the_order_of_strength(ablation):
    rows = ablation_figures.phase_rows(sweeps_of(ablation)["phase"])
    assert [(row["augmentation"], row["beta"]) for row in rows] == list(product(
        ("none", "Mixup/CutMix", "AutoAugment + Random Erasing", "AutoAugment + Random Erasing + Mixup/CutMix"), (1, 2, 8)))


@pytest.mark.parametrize("accuracies, collapsed, diverged", [
    ((45, 47), 0, 0),  # five points below KD are not yet more than five
    ((44.9, 47), 1, 0), ((None, 52), 0, 1), ((None, None), 0, 2),
])
def test_a_collapse_is_marked(tmp_path, accuracies, collapsed, diverged):
    write_cell(tmp_path / "phase", (50, 52), **HIGH)
    write_cell(tmp_path / "phase", accuracies, **HIGH | DKD)
    cells = ablation_figures.read_sweep(tmp_path / "phase")[0]
    row, = rows = ablation_figures.phase_rows(cells)
    assert (row["collapsed"], row["diverged"]) == (collapsed, diverged)
    figure = ablation_figures.draw_phase(SMALL, rows)
    bad = collapsed + diverged
    assert [patch.get_hatch() for patch in figure.axes[0].patches] == ["////"] * bool(bad)
    shown, = [text for text in texts(figure.axes[0]) if re.match("[+−]|diverged", text)]
    assert shown.endswith(f"{bad} of 2") == bool(bad) and shown.startswith("diverged") == (diverged == 2)


def test_causes_have_the_intervals_of_students_t(tmp_path, capsys, quick):
    """Differences 30, 33, 39 of three pairs; -1, 2 of two; one of one; and equal ones."""
    write_cell(tmp_path / "high", (20, 21, 22), "collapsed", **HIGH | DKD)
    write_cell(tmp_path / "high", (50, 54, 61), **HIGH)
    write_cell(tmp_path / "high", (19, 23), **HIGH | DKD | {"clip_grad": 1.0})
    write_cell(tmp_path / "high", (None, 31, None), **HIGH | DKD | {"beta": 2.0})
    write_cell(tmp_path / "high", (21, 22, 23), **HIGH | DKD | {"standardize": True})
    write_cell(tmp_path / "usual", (None,), **DKD)
    assert draw(capsys, tmp_path, tmp_path / "out")[0] == 0
    rows = {row["change"]: row for row in table(tmp_path / "out" / "figure9.csv") if row["base"] == "high"}
    assert list(rows) == ["method: KD, alpha 0.7", "beta 8 to 2", "logits z-scored", "gradient clipped at 1",
                          "learning rate 1.6 to 0.2"]
    three, two, one, equal, none = (rows[name] for name in (
        "method: KD, alpha 0.7", "gradient clipped at 1", "beta 8 to 2", "logits z-scored", "learning rate 1.6 to 0.2"))
    half = T[3] * math.sqrt((16 + 1 + 25) / 2 / 3)
    assert (three["n"], three["difference"], three["accuracy"], three["base_accuracy"]) == (3, 34, 55, 21)
    assert (three["ci_low"], three["ci_high"]) == pytest.approx((34 - half, 34 + half), abs=1e-4)
    half = T[2] * math.sqrt(4.5 / 2)
    assert (two["n"], two["difference"]) == (2, 0.5)
    assert (two["ci_low"], two["ci_high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    assert (one["n"], one["difference"], one["ci_low"], one["diverged"], one["runs"]) == (1, 10, "", 2, 3)
    assert (equal["difference"], equal["ci_low"]) == (1, "")
    assert (none["n"], none["difference"], none["diverged"]) == (0, "", 1)


def test_only_single_changes_are_causes(ablation):
    """KD without mixing, and cells that change another thing beside the learning rate, are left out."""
    rows = ablation_figures.cause_rows("high", {name: sweeps_of(ablation)[name] for name in ("high", "usual")})
    assert [(row["change"], row["n"]) for row in rows] == [
        ("learning rate 1.6 to 0.2", 3), ("beta 8 to 2", 3), ("method: KD, alpha 8, CE weight 1", 3),
        ("method: KD, alpha 0.7", 3), ("early stopping on val_acc1, patience 2", 3), ("warm-up of DKD over 3 epochs", 1),
        ("no teacher: labels alone", 3), ("gradient clipped at 1", 3)]
    assert {row["change"]: row["collapsed"] for row in rows if row["collapsed"]} == {
        "early stopping on val_acc1, patience 2": 3, "warm-up of DKD over 3 epochs": 1, "gradient clipped at 1": 3}


@pytest.mark.parametrize("flags, words", [
    ({"mix_prob": 0.0}, "Mixup/CutMix off"), ({"mix_prob": 0.5}, "Mixup/CutMix on 50% of the images"),
    ({"mixed_target": "dominant"}, "targets of mixed images: dominant"), ({"amp": "bf16"}, "precision: BF16"),
    ({"opt": "adamw"}, "optimiser: adamw"), ({"weight_decay": 0.1}, "weight decay 0 to 0.1"),
    ({"method": "dist", "alpha": None, "beta": 1.0, "mixed_target": None}, "method: DIST, CE weight 1"),
    ({"monitor": "val_acc1"}, "best epoch by val_acc1"), ({"device": "cuda", "seed": 3, "experiment": "v3"}, None),
    ({"beta": 2.0, "clip_grad": 1.0}, None), ({"method": "kd", "standardize": True}, None),
])
def test_a_change_is_said_in_words(flags, words):
    base, other = (ablation_figures.Cell(ablation_figures.settings(SMALL | DKD | more), {}) for more in ({}, flags))
    assert ablation_figures.in_words(base, other) == words


def test_the_base_is_the_cell_with_the_most_neighbours(tmp_path):
    """On a GPU the precision that the sweep uses is not fixed beforehand, and one cell changes it."""
    write_cell(tmp_path, (50,), **DKD)
    for flags in (DKD, {}, DKD | {"beta": 2.0}):
        write_cell(tmp_path, (50,), **flags | {"amp": "fp16"})
    assert ablation_figures.find_base(ablation_figures.read_sweep(tmp_path)[0]).get("amp") == "fp16"


# Figures

def test_figures_say_what_was_measured(figures):
    found = [" | ".join(texts(figure)) for figure in figures]
    phase = ("v2_tiny → v2_pico", "SGD, learning rate 1.6", "n = 2 seeds", "KD: 51.0 %", "beta, the weight of NCKD",
             "−6.5\n1 of 2", "DKD minus KD", "synthetic images", "more than 5 points below KD")
    shares = ("SGD, learning rate 0.2", "SGD, learning rate 1.6", "DKD, beta 8\ntest 21.3 %, 3 of 3 collapsed", "NCKD 70 %",
              "KL 60 %", "KD, alpha 8, CE weight 1\ntest 52.3 %", "validation\naccuracy (%)", "KL or NCKD above 80 %",
              "n = 3 seeds", "epoch")
    causes = ("base: DKD, beta 8: 21.3 %, 3 of 3 collapsed; KD: 51.0 %", "base: DKD, beta 8: 56.3 %; KD: 51.0 %",
              "SGD, learning rate 1.6", "gradient clipped at 1", "learning rate 1.6 to 0.2", "learning rate 0.2 to 1.6",
              "−35.0, n = 3, 3 collapsed", "95 % interval", "n = 1, 1 collapsed, 2 diverged")
    for text, needed in zip(found, (phase, shares, causes), strict=True):
        assert [part for part in needed if part not in text] == []


def test_texts_are_legible_and_inside_the_figure(figures):
    for figure in figures:
        assert min(text.get_fontsize() for text in figure.findobj(lambda part: hasattr(part, "get_fontsize"))) >= 7
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height


@pytest.mark.parametrize("accuracy, said, colour", [
    (45, "test 45.0 %", "black"), (44.9, "test 44.9 %, collapsed", ablation_figures.RED)])
def test_panels_say_which_runs_fell(tmp_path, accuracy, said, colour):
    write_run(tmp_path / "high", 0, 50, **HIGH)
    write_run(tmp_path / "high", 0, accuracy, **HIGH | DKD)
    figure = ablation_figures.draw_shares(sweeps_of(tmp_path))
    title, = figure.findobj(lambda part: hasattr(part, "get_text") and part.get_text().startswith("DKD, beta 8"))
    assert (title.get_text(), title.get_color()) == (f"DKD, beta 8\n{said}", colour)


def test_shares_are_means_over_the_seeds_that_are_left():
    """One run has three epochs, one diverged after the first, and one was not looked at in the second."""
    epochs, mean = ablation_figures.by_epoch([
        ((1, 2, 3), (0.2, 0.4, 0.6)), ((1,), (0.4,)), ((1, 2, 3), (0.6, math.nan, 0.8))])
    assert epochs.tolist() == [1, 2, 3] and mean.tolist() == pytest.approx([0.4, 0.4, 0.7])


def test_runs_that_diverged_are_drawn_as_far_as_they_came(tmp_path, capsys, quick):
    """One has an epoch, the other has neither log nor diagnostics."""
    first, second = write_cell(tmp_path / "high", (None, None), **HIGH | DKD)
    for name in ("log.csv", "diagnostics.csv"):
        (second / name).unlink()
    write_cell(tmp_path / "high", (50, 51), **HIGH)
    code, out, _ = draw(capsys, tmp_path, tmp_path / "out")
    assert code == 0 and "figure8.png" in out and "figure9.png" in out
    assert "DKD, beta 8\n2 of 2 diverged" in texts(ablation_figures.draw_shares(sweeps_of(tmp_path)))
    for name in ("log.csv", "diagnostics.csv"):
        (first / name).unlink()
    assert draw(capsys, tmp_path, tmp_path / "out")[0] == 0


# Output

def test_the_same_runs_give_the_same_bytes(tmp_path, capsys):
    """As a script, started elsewhere, and in this process."""
    for name in ("usual", "phase"):
        write_cell(tmp_path / name, (50, 52))
        write_cell(tmp_path / name, (44, 52), **DKD)
    script = make_figures.ROOT / "plots" / "ablation_figures.py"
    result = subprocess.run([sys.executable, script, "--runs", tmp_path, "--output", tmp_path / "one"], capture_output=True,
                            text=True, cwd="/", env=os.environ | {"PYTHONPATH": ""})
    assert (result.returncode, result.stderr) == (0, "")
    assert draw(capsys, tmp_path, tmp_path / "two") == (0, result.stdout.replace("one", "two"), "")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["figure7.csv", "figure7.pdf", "figure7.png", "figure8.pdf", "figure8.png", "figure9.csv", "figure9.pdf",
                     "figure9.png"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_what_is_missing_is_named(tmp_path, capsys):
    write_cell(tmp_path / "usual", (50,))
    running = write_run(tmp_path / "usual", 0, 50, **DKD)
    (running / "summary.json").unlink()
    code, out, _ = draw(capsys, tmp_path, tmp_path / "out")
    assert code == 0 and not (tmp_path / "out").exists()
    assert f"usual: 1 runs of 1 cells; not ended, left out: {running.name}" in out and "not found: high, findings, phase" in out
    assert re.findall(r"(figure\d): not drawn", out) == ["figure7", "figure8", "figure9"]


def test_an_unknown_flag_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as end:
        ablation_figures.main(["--rusn", "runs"])
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1


def damage(name, content):
    return lambda top: (top / "usual" / "0-s0" / name).write_text(content)


@pytest.mark.parametrize("break_it, code, said", [
    (damage("summary.json", "{"), 4, "cannot read summary.json"),
    (damage("summary.json", '{"test_acc1_best": NaN, "verdict": "completed"}'), 4, "test_acc1_best is nan"),
    (damage("config.json", '{"script": "distill"}'), 4, "cannot read config.json"),
    (damage("config.json", json.dumps(SMALL | DKD | {"seed": 0, "beta": "8"})), 4, "beta is '8'"),
    (damage("diagnostics.csv", "epoch,share_ce\n1,oops\n"), 4, "cannot read diagnostics.csv"),
    (damage("diagnostics.csv", "epoch,share_ce\n1,1.5\n"), 4, "not in [0, 1]"),
    (damage("diagnostics.csv", "epoch\n"), 4, "no rows with shares"),
    (damage("log.csv", "epoch\n1\n"), 4, "no column val_acc1"),
    (lambda top: (top / "usual" / "0-s0" / "diagnostics.csv").unlink(), 4, "cannot read diagnostics.csv: No such file"),
    (lambda top: write_run(top / "usual", 0, 50, **DKD), 2, "two runs of one cell have seed 0"),
    (lambda top: [write_run(top / "phase", 0, 50, lr=lr, **flags) for lr in (1, 2) for flags in ({}, DKD)], 2,
     "but its runs differ in lr"),
    (lambda top: [write_run(top / "phase", 0, 50, mix_prob=mixed, **flags) for mixed in (1, 0.5) for flags in ({}, DKD)], 2,
     "but its runs differ in mix_prob"),
    (lambda top: (top / "out").write_text("a file"), 8, "cannot write"),
    (lambda top: (top / "usual").rename(top / "elsewhere"), 4, "no runs of an ablation"),
])
def test_errors_are_one_line_and_a_code(tmp_path, capsys, break_it, code, said):
    write_run(tmp_path / "usual", 0, 50, **DKD)
    write_run(tmp_path / "usual", 0, 50)
    break_it(tmp_path)
    ended, _, stderr = draw(capsys, tmp_path, tmp_path / "out")
    assert ended == code and said in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1
