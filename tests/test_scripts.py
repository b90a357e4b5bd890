"""The commands a user runs, in order, on a small image folder; and one line for everything that can be wrong with them."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from command import SMALL, run, succeeds
from helpers import make_images, table_of
from PIL import Image

import models
from data import datasets
from training import device, evaluation

CLASSES = [f"class{index}" for index in range(6)]
TEACHER = "--teacher-checkpoint runs/teacher/best.pt"
TRAIN = f"--model resnet8 {SMALL} --data-dir images --output {{}}"
DISTILL = f"--student v2_pico {SMALL} --data-dir {{}} {{}}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = tmp_path_factory.mktemp("workplace")
    make_images(place / "images" / "train", CLASSES, 30, seed=0)
    make_images(place / "images" / "test", CLASSES, 10, seed=1)
    make_images(place / "other" / "train", ["a", "b"], 30, seed=2)
    make_images(place / "other" / "test", ["a", "b"], 4, seed=3)
    return place


@pytest.fixture
def here(workplace, monkeypatch, capsys):
    """The folder of images, with a teacher in runs/teacher; what its run printed is in teacher.txt."""
    monkeypatch.chdir(workplace)
    if not Path("teacher.txt").exists():
        Path("teacher.txt").write_text(succeeds(capsys, "train_teacher.py", TRAIN.format("runs/teacher")))
    return workplace


def test_the_whole_way_from_images_to_figures(here, capsys, monkeypatch):
    out = Path("teacher.txt").read_text()
    assert "loss = CE(label smoothing 0.1)" in out and "dataset=imagefolder" in out
    assert len(re.findall(r"^epoch \d/2", out, re.M)) == 2
    teacher = json.loads(Path("runs/teacher/summary.json").read_text())
    assert teacher["test_acc1_best"] > 50, f"six plain colours were not learnt: {teacher}"

    for method, name, terms in (("--experiment v2 --seed 1", "v2-s1", {"kl"}), ("--method dkd --beta 8 --seed 1 --dkd-warmup 2",
                                                                                "dkd-beta8-T4-s1", {"tckd", "nckd"})):
        out = succeeds(capsys, "distill.py", DISTILL.format("images", method))
        folder = Path("runs") / name
        summary, log = json.loads((folder / "summary.json").read_text()), table_of(folder / "log.csv")
        assert "--beta has no effect" not in out
        assert len(log) == 2 and {key for key in ("kl", "tckd", "nckd") if log[0][f"train_loss_{key}"]} == terms
        assert all(log[1][column] for column in ("train_loss_ce", "val_acc1", "teacher_agree", "grad_norm_mean", "images_per_s"))
        assert summary["retention"] == pytest.approx(100 * summary["test_acc1_best"] / summary["teacher_test_acc1"])
        assert summary["teacher_test_acc1"] == pytest.approx(teacher["test_acc1_best"]), "a student learns from best.pt"
        assert summary["compression"] == pytest.approx(teacher["params"] / summary["params"])
        assert set("test_acc1_last test_acc1_best best_epoch selected_on params flops teacher_test_acc1 retention compression "
                   "wall_s verdict".split()) <= set(summary)
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        config = json.loads((folder / "config.json").read_text())
        assert config["script"] == "distill" and config["teacher"] == "resnet8" and config["amp"] == "off" and config["seed"] == 1
        looked = table_of(folder / "diagnostics.csv")
        assert [row["epoch"] for row in looked] == ["1", "2"] and all(float(looked[1][f"grad_{term}"]) > 0 for term in terms)
        assert looked[1]["clip_frac"] == log[1]["clip_frac"] and float(looked[1]["update_ratio"]) > 0
        assert (summary["verdict"] in ("completed", "collapsed")
                and all(f"alarm: {alarm['text']}" in out for alarm in summary["alarms"]))
        assert {".lock", "config.json", "env.json", "log.csv", "diagnostics.csv", "status.json", "summary.json", "last.pt",
                "prev.pt", "best.pt", "classes.csv", "confusion.csv", "confusion.png"} == {path.name for path in folder.iterdir()}

    # A student can be the next teacher, at another image size; and weights can be the start of another network.
    succeeds(capsys, "distill.py", DISTILL.format("images", "--teacher-checkpoint runs/v2-s1/best.pt --image-size 24 "
                                                  "--epochs 1 --allow-weak-teacher --output runs/chain"))
    assert json.loads(Path("runs/chain/config.json").read_text())["teacher"] == "v2_pico"
    succeeds(capsys, "train_teacher.py", TRAIN.format("runs/teacher-strong") + " --init runs/teacher/best.pt --image-size 20 "
                                         "--epochs 1 --amp bf16")

    assert "2 of 16 images" in succeeds(capsys, "show_batch.py", "--dataset imagefolder --data-dir images --val-size 20 -b 16 "
                                                                 f"--images 2 --output {here}/sheet.png")
    Image.open(here / "sheet.png").verify()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **flags: None)  # seconds each, see test_figures.py
    succeeds(capsys, "plots/make_figures.py", f"--runs {here}/runs --output {here}/figures")
    assert "v2" in (here / "figures" / "table1.md").read_text()


def test_classes_of_uneven_size(here, capsys, monkeypatch):
    """60, 20 and 3 images that look alike: the network answers with the largest class, and the run says so."""
    for name, each in zip("abc", (60, 20, 3)):
        make_images(Path("uneven"), [name], each, seed=each)
    flags = f"--model resnet8 {SMALL} --data-dir uneven --val-size 8"
    succeeds(capsys, "train_teacher.py", f"{flags} --output runs/uneven")
    folder = Path("runs/uneven")
    summary = json.loads((folder / "summary.json").read_text())
    wanted = {"verdict": "collapsed", "test_acc1_best": 75.0, "test_balanced_acc1": 50.0, "chance": 75.0, "val_images": 8}
    assert {name: summary[name] for name in wanted} == wanted, "8 images of the test set: 6 of a, 2 of b"
    assert [alarm["name"] for alarm in summary["alarms"]][:2] == ["chance", "concentrated"]
    assert "'a'" in summary["alarms"][1]["text"] and "--class-weights balanced" in summary["advice"]
    assert table_of(folder / "classes.csv") == [
        dict(zip(("class", "train_images", "val_images", "test_images", "val_acc1", "test_acc1"), row))
        for row in (("a", "48", "6", "6", "100.0", "100.0"), ("b", "16", "2", "2", "0.0", "0.0"), ("c", "3", "0", "0", "", ""))]
    assert table_of(folder / "confusion.csv") == [
        {"true/predicted": name, "a": count, "b": "0", "c": "0"} for name, count in zip("abc", ("6", "2", "0"))]
    Image.open(folder / "confusion.png").verify()
    last = table_of(folder / "diagnostics.csv")[-1]
    assert (last["predicted_classes"], last["effective_classes"]) == ("1", "1.0")

    assert "classes balanced" in succeeds(capsys, "train_teacher.py", f"{flags} --output runs/even --class-weights balanced")
    losses = [float(table_of(Path("runs", name, "log.csv"))[0]["train_loss_ce"]) for name in ("uneven", "even")]
    assert abs(losses[0] - losses[1]) > 0.01


def test_dkd_on_two_classes_says_that_beta_has_no_effect(here, capsys):
    succeeds(capsys, "train_teacher.py", f"--model resnet8 {SMALL} --data-dir other --output runs/two --epochs 1")
    out = succeeds(capsys, "distill.py", DISTILL.format(
        "other", "--method dkd --teacher-checkpoint runs/two/best.pt --epochs 1 --allow-weak-teacher"))
    assert out.count("--beta has no effect") == 1


def test_a_sweep_of_the_real_scripts(here, capsys):
    """One of its two runs was there before, from this process: importing PyTorch anew takes seconds.

    A package in the current directory that has the name of one of ours is not imported.
    """
    Path("training").mkdir()
    Path("training/__init__.py").write_text("raise SystemExit('not ours')")
    diverging = DISTILL.format("images", "--seed 0 --method dkd --lr 1e30 --output sweep/lr-1e30_method-dkd-s0")
    assert run(capsys, "distill.py", diverging)[0] == 6
    for _ in range(2):
        succeeds(capsys, "sweep.py", "--output sweep distill.py "
                                     + DISTILL.format("images", "--seed 0 -- --method kd -- --method dkd --lr 1e30"))
    summary = json.loads(Path("sweep/lr-0.02_method-kd-s0/summary.json").read_text())
    assert [(row["flags"], row["n"], row["diverged"], row["mean"]) for row in table_of(Path("sweep/table.csv"))] == [
        ("--lr 0.02 --method kd", "1", "0", str(summary["test_acc1_best"])), ("--lr 1e30 --method dkd", "0", "1", "")]
    assert Path("sweep/logs/lr-0.02_method-kd-s0.txt").read_text().count("$ python") == 1
    assert summary["teacher_logits_read"] == 0 and not Path("sweep/teacher-logits").exists()


def test_an_unequal_end_keeps_the_best_epoch(here, capsys):
    """A learning rate that ruins the second epoch: best.pt stays the first epoch's, and early stopping says so."""
    succeeds(capsys, "train_teacher.py", TRAIN.format("runs/wild") + " --lr 100 --sched multistep --milestones 1 --epochs 4 "
                                         "--patience 1 --overwrite")
    summary, log = json.loads(Path("runs/wild/summary.json").read_text()), table_of(Path("runs/wild/log.csv"))
    assert summary["best_epoch"] == min(range(len(log)), key=lambda i: float(log[i]["val_loss"])) + 1
    assert summary["epochs"] == len(log) and summary["stopped_early"] == (len(log) < 4)
    best, last = (torch.load(f"runs/wild/{name}.pt", weights_only=True) for name in ("best", "last"))
    assert [best["epoch"], last["epoch"]] == [summary["best_epoch"], len(log)]
    assert best["test_acc1"] == summary["test_acc1_best"]
    net = models.load("runs/wild/best.pt")
    net.load_state_dict(last["update"]["net"])
    test = datasets.load("imagefolder", "images", val_size=20)
    accuracy = evaluation.evaluate(net, test.test, test.mean, test.std, device.RunContext(torch.device("cpu"), "off"), 64).acc1
    assert accuracy == summary["test_acc1_last"]


BAD = [  # what is wrong, script, flags, exit code, words of the line
    ("no teacher", "distill", "--teacher-checkpoint nowhere.pt", 5, ["nowhere.pt", "train_teacher.py"]),
    ("no such teacher in a dry run", "distill", "--dry-run --teacher-checkpoint nowhere.pt", 5, ["nowhere.pt", "--teacher"]),
    ("Triton without a GPU", "distill", "--kernels triton", 2, ["--kernels triton"]),
    ("teacher is text", "distill", "--teacher-checkpoint text.pt", 5, ["text.pt"]),
    ("teacher is the state of a run", "distill", "--teacher-checkpoint runs/teacher/last.pt", 5, ["last.pt", "best.pt"]),
    ("teacher of other classes", "distill other", TEACHER, 2, ["best.pt: 6 classes, the data 2; number 0"]),
    ("teacher less accurate than it says", "distill", "--teacher-checkpoint lying.pt", 2, ["99.90 %"]),
    ("unknown student", "distill", "--student resnet9", 2, ["resnet9"]),
    ("no such data", "train", "--data-dir nowhere", 4, ["nowhere"]),
    ("no CIFAR and no network", "train", "--dataset cifar100 --data-dir nowhere", 4, ["cifar-100", "synthetic"]),
    ("init is missing", "train", "--init nowhere.pt", 4, ["nowhere.pt"]),
    ("init is another network", "train", "--init runs/teacher/best.pt --model resnet14", 4, ["runs/teacher/best.pt"]),
    ("student init is text", "distill", "--student-init text.pt", 4, ["text.pt"]),
    ("a network without ImageNet weights", "train", "--pretrained", 2, ["resnet8"]),
    ("run directory in use by another run", "train", "--output runs/teacher", 2, ["runs/teacher", "--overwrite"]),
    ("output is a file", "train", "--output text.pt", 2, ["text.pt"]),
    ("output below a file", "train", "--output text.pt/run", 8, ["text.pt"]),
    ("nothing to resume", "train", "--resume nowhere/last.pt", 5, ["nowhere/last.pt"]),
    ("output where nothing can be made", "train", "--output /proc/nothing/run", 8, ["/proc/nothing"]),
    ("batch larger than the data", "train", "--batch-size 5000", 2, ["5000"]),
    ("validation larger than the data", "train", "--val-size 5000", 2, ["5000"]),
    ("nothing to minimise", "distill", "--alpha 0 --ce-weight 0", 2, ["every weight", "--alpha"]),
    ("its teacher overwritten", "distill", f"{TEACHER} --output runs/teacher --overwrite", 2,
     ["--overwrite would delete", "runs/teacher/best.pt"]),
    ("its start overwritten", "train", "--init runs/teacher/best.pt --output runs/teacher --overwrite", 2, ["--overwrite would"]),
    ("images too small", "train", "--image-size 7", 2, [">= 8"]),
    ("a seed too large", "train", f"--seed {2**64}", 2, ["--seed"]),
    ("a sheet that is no PNG", "show", "--output sheet.jpg", 2, [".png"]),
    ("no such GPU", "train", "--device cuda:77", 2, ["cuda:77"]),
]


@pytest.mark.parametrize("script, flags, code, words", [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_one_line_and_an_exit_code_for_what_is_wrong(script, flags, code, words, here, capsys, monkeypatch):
    Path("text.pt").write_text("hello")
    content = torch.load("runs/teacher/best.pt", weights_only=True)
    torch.save(content | {"test_acc1": 99.9}, "lying.pt")
    shutil.rmtree("runs/bad", ignore_errors=True)

    def offline(*args, **flags):
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.socket.connect", offline)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    output = "" if "--output" in flags else "--output runs/bad"
    if script.startswith("distill"):
        teacher = "" if "--teacher-checkpoint" in flags else TEACHER
        line = DISTILL.format("other" if "other" in script else "images", f"{output} {teacher} {flags}")
        found, out, err = run(capsys, "distill.py", line)
    elif script == "show":
        found, out, err = run(capsys, "show_batch.py", flags)
    else:
        found, out, err = run(capsys, "train_teacher.py", f"{TRAIN.format('runs/bad')} {flags}")
    assert found == code, err
    assert Path("runs/teacher/best.pt").exists()
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not Path("runs/bad").exists(), "a run that could not start left a directory"


def test_a_dry_run_before_the_teacher_prints_and_touches_nothing(here, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = succeeds(capsys, "distill.py", DISTILL.format(here / "images", "--method dkd --beta 8 --dry-run --output runs/dry"))
    assert "no advice without a teacher (runs/teacher/best.pt)" in out
    assert "4^2 (1 TCKD + 8 NCKD)" in out and "beta=8.0" in out and not Path("runs/dry").exists()


def test_a_dry_run_of_several_processes_gives_advice_without_the_others(here, capsys, monkeypatch):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    out = succeeds(capsys, "distill.py", DISTILL.format("images", f"{TEACHER} --dry-run --output runs/dry"))
    assert "2 processes with --batch-size 16: 32 images a step" in out and "worth a try" in out


def test_a_dry_run_with_a_teacher_gives_advice_that_does_what_it_says(here, capsys):
    line = DISTILL.format("images", f"{TEACHER} --dry-run --output runs/dry")
    out = succeeds(capsys, "distill.py", f"{line} --method dkd --beta 8")
    assert "teacher on 128 augmented images: top-1" in out and not Path("runs/dry").exists()
    shares = [int(share) for share in re.findall(r"(?:CE|TCKD|NCKD) (\d+)%", out)]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=2)
    advice = re.search(r"--beta ([\d.e-]+): makes the gradient of (\w+) as large .*\(at 8 it is ([\d.]+) times", out)
    beta, term, times = advice.groups()
    assert term == "NCKD" and float(beta) == pytest.approx(8 / float(times), rel=0.1)
    clip, norm = re.search(r"--clip-grad ([\d.]+): twice the gradient norm of a new student, ([\d.]+)", out).groups()
    assert float(clip) == pytest.approx(2 * float(norm), rel=0.1)
    assert "already at T = 1" in out, "this teacher is not sure of anything"

    out = succeeds(capsys, "distill.py", f"{line} --method dkd --beta {beta}")
    assert "(at " in out and re.search(r"it is 1\.0 times as large|it is 0\.9 times as large", out), out
    out = succeeds(capsys, "distill.py", f"{line} --method kd --clip-grad 0")
    assert re.search(r"--alpha [\d.]+ --ce-weight 0.3: makes the gradient of KL", out) and "(now off)" in out
    code, _, err = run(capsys, "distill.py", f"{line} --method kd --data-dir other")
    assert code == 2 and "6 classes, the data 2; number 0" in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles and takes no CPU tensors")
def test_fused_kernels_and_references_train_alike(here, capsys):
    """Augmentation gives the same bytes; the loss rounds differently, which in two steps stays below 1e-3 of each logged term."""
    make_images(here / "few" / "train", CLASSES, 4, seed=4)
    make_images(here / "few" / "test", CLASSES, 1, seed=5)
    found = []
    for kernels in ("triton", "reference"):
        flags = f"--method dkd --beta 8 --kernels {kernels} --epochs 1 --batch-size 8 --val-size 8 --output runs/few-{kernels}"
        assert f"kernels={kernels}" in succeeds(capsys, "distill.py", DISTILL.format("few", f"{flags} {TEACHER}"))
        assert json.loads(Path(f"runs/few-{kernels}/config.json").read_text())["kernels"] == kernels
        row, = table_of(Path(f"runs/few-{kernels}/log.csv"))
        found.append([float(row[name]) for name in ("train_loss_ce", "train_loss_tckd", "train_loss_nckd", "grad_norm_mean")])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
