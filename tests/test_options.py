"""Flags: defaults, presets, ranges, and one line with exit code 2 for each that does not fit."""
import json
import subprocess
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import make_images

from cli import method_flags, options, sweep_grid
from rundir.identity import same_flag

ROOT = Path(__file__).parent.parent


def distill(*argv):
    return options.parse_distill("", "", argv)


def teacher(*argv):
    return options.parse_teacher("", "", argv)


def test_defaults_are_the_study_recipe():
    for args in (distill(), teacher()):
        recipe = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "sched": "cosine", "warmup_epochs": 5, "label_smoothing": 0.1,
                  "clip_grad": 1.0, "patience": 30, "monitor": "val_loss", "policy": "autoaugment", "random_erasing": 0.25,
                  "mixup": 0.8, "cutmix": 1.0, "batch_size": 128, "epochs": 200, "dataset": "cifar100", "mix_mode": "batch",
                  "mix_prob": 1.0, "seed": 42}
        assert recipe == {name: getattr(args, name) for name in recipe}
    assert teacher().model == "efficientnet_v2_l" and teacher().output == "runs/teacher"
    args = distill()
    assert (args.method, args.alpha, args.temperature, args.student, args.student_init) == ("kd", 0.7, 4.0, "efficientnet_v2_s",
                                                                                            "none")
    assert args.teacher_checkpoint == "runs/teacher/best.pt" and args.output == "runs/kd-alpha0.7-T4-s42"
    assert distill("--method", "dkd", "--beta", "2", "--temperature", "1.5").output == "runs/dkd-beta2-T1.5-s42"


@pytest.mark.parametrize("experiment, expected", [
    ("v1", {"method": "kd", "policy": "none", "random_erasing": 0.0, "mixup": 0.8, "cutmix": 1.0}),
    ("v2", {"method": "kd", "policy": "autoaugment", "random_erasing": 0.25}),
    ("v3", {"method": "dkd", "beta": 8.0, "policy": "autoaugment"}),
    ("v3.1", {"method": "dkd", "beta": 2.0, "alpha": 1.0, "ce_weight": 1.0}),
    ("v4", {"method": "kd", "teacher_checkpoint": "runs/teacher-strong/best.pt"}),
])
def test_presets_set_defaults_and_flags_win(experiment, expected):
    args = distill("--experiment", experiment)
    assert expected == {name: getattr(args, name) for name in expected}
    assert args.output == f"runs/{experiment}-s42"
    args = distill(f"--experiment={experiment}", "--random-erasing", "0.5", "--teacher-checkpoint", "x.pt", "--seed", "3")
    assert (args.random_erasing, args.teacher_checkpoint, args.output) == (0.5, "x.pt", f"runs/{experiment}-s3")


def test_a_preset_of_one_method_can_be_run_with_the_other():
    args = distill("--experiment", "v3", "--method", "kd")
    assert (args.method, args.beta, args.alpha, args.mixed_target) == ("kd", None, 0.7, None)
    assert method_flags.chosen(args).arguments == {"alpha": 0.7, "temperature": 4.0, "ce_weight": None, "kl": "forward",
                                                   "standardize": False, "label_smoothing": 0.1, "class_weights": None}


def test_a_warmup_raises_the_numbers_of_its_method():
    method = method_flags.chosen(distill("--method", "dkd", "--dkd-warmup", "20"))
    numbers = method.criterion("cpu").keywords
    assert (numbers["alpha"], numbers["beta"], numbers["temperature"]) == (1.0, 8.0, 4.0)
    for epoch, share in ((5, 0.25), (20, 1.0), (40, 1.0)):
        method.set_epoch(epoch)
        assert (numbers["alpha"], numbers["beta"]) == (share, 8 * share)
    method = method_flags.chosen(distill("--method", "dkd"))
    method.set_epoch(1)
    assert method.criterion("cpu").keywords["beta"] == 8.0, "no warm-up"


def test_choices_are_those_of_the_code():
    import kernels
    from augment import POLICIES, BatchAugmenter
    from augment.augmenter import CROPS
    from data import datasets
    from kernels import softmax_kl
    from losses import kd
    from losses.methods import METHODS

    assert options.POLICIES == tuple(POLICIES) and options.CROPS == CROPS
    assert options.parse_teacher("", "", ["--image-size", str(datasets.MIN_SIDE)]).image_size == datasets.MIN_SIDE
    for side in (datasets.MIN_SIDE, datasets.MIN_SIDE - 1):
        images, labels = torch.zeros(4, side, side, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
        with nullcontext() if side == datasets.MIN_SIDE else pytest.raises(ValueError, match="size >= 8"):
            BatchAugmenter(images, labels, batch_size=2, seed=0, mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.raises(SystemExit):
        options.parse_teacher("", "", ["--image-size", str(datasets.MIN_SIDE - 1)])
    assert METHODS["dkd"].hyperparameters["mixed_target"].choices == softmax_kl.SPLITS
    assert METHODS["kd"].hyperparameters["kl"].choices == kd.DIRECTIONS
    assert [options.parse_teacher("", "", ["--kernels", name]).kernels for name in kernels.CHOICES] == list(kernels.CHOICES)


def test_objective_is_printed_with_its_numbers():
    assert method_flags.chosen(distill()).objective == (
        "loss = 0.3 CE(label smoothing 0.1) + 0.7 * 4^2 KL(teacher || student; T = 4)")
    assert method_flags.chosen(distill("--kl", "reverse", "--ce-weight", "1")).objective == (
        "loss = 1 CE(label smoothing 0.1) + 0.7 * 4^2 KL(student || teacher; T = 4)")
    assert method_flags.chosen(distill("--experiment", "v3", "--dkd-warmup", "20", "--label-smoothing", "0")).objective == (
        "loss = 1 CE(label smoothing 0) + 4^2 (1 TCKD + 8 NCKD) * min(epoch / 20, 1); T = 4, targets of mixed images: pair")
    assert method_flags.chosen(teacher()).objective == "loss = CE(label smoothing 0.1)"


BAD = {  # flag: values that are out of range or of the wrong kind
    "--dataset": ["mnist"], "--data-dir": [""], "--val-size": ["-1", "0.1"], "--image-size": ["0", "x"], "--policy": ["cutout"],
    "--crop": ["random"], "--crop-scale": ["0.5", "0"], "--crop-ratio": ["x"],
    "--random-erasing": ["-0.1", "1.1", "nan"], "--mixup": ["-1", "inf"], "--cutmix": ["-1", "nan"], "--mix-prob": ["2"],
    "--mix-mode": ["row"],
    "--epochs": ["0", "1.5"], "--batch-size": ["0", "1"], "-b": ["-4"], "--opt": ["lion"], "--lr": ["0", "-1", "nan", "inf"],
    "--momentum": ["1"], "--weight-decay": ["-1"], "--sched": ["step"], "--milestones": ["0"], "--warmup-epochs": ["-1", "200"],
    "--label-smoothing": ["1", "-0.1"], "--clip-grad": ["-1", "nan"], "--model-ema": ["1"], "--patience": ["-1"],
    "--monitor": ["loss"],
    "--amp": ["fp8"], "--kernels": ["cuda"], "--device": ["tpu", "cuda:x"], "--seed": ["-1", "x"], "--output": [""],
}
BAD_DISTILL = {
    "--experiment": ["v5"], "--method": ["fitnet"], "--alpha": ["-1", "nan", "1.5"], "--beta": ["-1", "8"],
    "--temperature": ["0", "inf"],
    "--ce-weight": ["-1"],  "--kl": ["both"], "--mixed-target": ["all", "pair"], "--dkd-warmup": ["-1", "20"],
    "--teacher-checkpoint": [""],
    "--student": [""], "--student-init": [""], "--loss-scale": ["0", "-1", "nan", "inf"], "--match-norm": ["fitnet", ""],
    "--temp": ["4"], "--no-such-flag": ["1"],
}


@pytest.mark.parametrize("parse, flag, value", [
    *((parse, flag, value) for parse in (distill, teacher) for flag, values in BAD.items() for value in values),
    *((distill, flag, value) for flag, values in BAD_DISTILL.items() for value in values),
    (teacher, "--model", ""), (teacher, "--beta", "8"), (teacher, "--init", ""),
    (teacher, "--loss-scale", "1"), (teacher, "--match-norm", "none"),
])
def test_a_bad_value_is_one_line_and_exit_code_2(parse, flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flag, value)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "--help" in err, err
    assert flag.lstrip("-") in err, f"the line does not name {flag}: {err}"


@pytest.mark.parametrize("experiment, runs", [("study", 29), ("published", 72), ("ablation", 237), ("ablation-small", 209)])
def test_every_command_of_the_study_is_accepted(experiment, runs):
    """experiments.sh run with a `python` that only prints what it is given; a sweep is expanded into its runs."""
    script = (ROOT / "experiments.sh").read_text().replace('cd "$(dirname "$0")"', "")
    done = subprocess.run(["bash", "-c", 'python() { printf "%s\\n" "$*"; }\n' + script, "experiments.sh", experiment],
                          capture_output=True, text=True, check=True)
    parsed = []
    for name, *flags in map(str.split, done.stdout.splitlines()):
        if name == "sweep.py":
            args = sweep_grid.parse_sweep("", "", flags)
            parsed += [Namespace(**vars(run) | {"output": f"{args.output}/{sweep}/{cell.name}-s{run.seed}"})
                       for sweep, words in sweep_grid.named(args.flags).items()
                       for cell in sweep_grid.expand(args.script, words) for run in cell.runs.values()]
        elif not name.startswith(("plots/", "results/")):
            parsed.append({"train_teacher.py": teacher, "distill.py": distill}[name](*flags))
    outputs = [args.output for args in parsed]
    assert len(outputs) == len(set(outputs)) >= runs, "two runs of the study would write to one directory"
    made = {f"{args.output}/best.pt" for args in parsed if "model" in args}
    assert {args.teacher_checkpoint for args in parsed if "method" in args} <= made


def test_runs_from_before_a_flag_are_those_with_its_default():
    changed = "--no-flip --crop resized --crop-scale 0.2 1 --crop-ratio 1 1"
    for args, same in ((distill(), True), (distill(*changed.split()), False)):
        assert [same_flag(name, {}, vars(args), None) for name in ("flip", "crop", "crop_scale", "crop_ratio")] == [same] * 4
        assert options.augmentation(args)["flip"] == same
    for argv, same in (((), True), (("--loss-scale", "2"), False), (("--match-norm", "kd"), False)):
        assert all(same_flag(name, {}, vars(distill(*argv)), None) for name in ("loss_scale", "match_norm")) == same


@pytest.mark.parametrize("argv, side, crop, policy, line", [
    ((), 96, "pad", "autoaugment", []),
    (("--dataset", "imagefolder"), 64, "pad", "autoaugment", ["crop=pad, policy=autoaugment: imagefolder up to 64 pixels"]),
    (("--dataset", "imagefolder"), 65, "resized", "autoaugment-imagenet",
     ["crop=resized, policy=autoaugment-imagenet: imagefolder above 64 pixels"]),
    (("--dataset", "imagefolder", "--image-size", "224", "--policy", "none"), 16, "resized", "none",
     ["crop=resized: imagefolder above 64 pixels"]),
    (("--dataset", "imagefolder", "--image-size", "32", "--crop", "resized"), 96, "resized", "autoaugment",
     ["policy=autoaugment: imagefolder up to 64 pixels"]),
    (("--crop", "resized", "--image-size", "64"), 32, "resized", "autoaugment", []),
    (("--dataset", "imagefolder"), None, "pad", "autoaugment", ["crop=pad, policy=autoaugment: imagefolder up to 64 pixels"])])
def test_large_images_of_folders_are_augmented_as_photographs(tmp_path, argv, side, crop, policy, line):
    """side: of the images there, which decides where no --image-size is given; None: no folder, which reading then reports."""
    if side:
        make_images(tmp_path / "train", ["a"], 1, seed=0, size=side)
    args = teacher("--data-dir", str(tmp_path if side else tmp_path / "none"), *argv)
    assert (args.crop, args.policy, options.chosen_defaults(args)) == (crop, policy, line)
    assert options.augmentation(args)["image_size"] == (args.image_size if crop == "resized" else None)
    assert options.data(args)["crop"] == crop


def test_flags_that_exclude_each_other(capsys):
    for parse, argv in ((teacher, "--init x --pretrained"), (teacher, "--compile yes"), (distill, "--milestones 5 3"),
                        (distill, "--epochs 5 --warmup-epochs 5"), (distill, "file"), (distill, "--compile --grad-checkpoint"),
                        (distill, "--match-norm kd --loss-scale 2"), (distill, "--match-norm kd --compile"),
                        (teacher, "--crop-scale 0.5 1"), (teacher, "--crop resized --crop-scale 0.5 1.5"),
                        (teacher, "--crop resized --crop-ratio 2 1")):
        with pytest.raises(SystemExit) as stop:
            parse(*argv.split())
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert distill("--alpha", "1.5", "--ce-weight", "1").alpha == 1.5


def test_the_warm_up_of_a_short_run_leaves_an_epoch():
    assert [teacher("--epochs", str(epochs)).warmup_epochs for epochs in (1, 2, 5, 6, 200)] == [0, 1, 4, 5, 5]


def test_flags_of_another_run_are_defaults(tmp_path, capsys):
    args = distill("--method", "dkd", "--beta", "2", "--lr", "0.1", "--seed", "7", "--output", "runs/x", "--epochs", "9")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(vars(args) | {"script": "distill", "data_sha256": "0", "device": "cuda:3", "teacher": "resnet8"}))
    same, other = distill("--config", str(file)), distill("--config", str(file), "--lr", "0.2", "--method", "kd")
    assert (same.beta, same.lr, same.seed, same.epochs, same.device) == (2.0, 0.1, 7, 9, "auto")
    assert same.output == "runs/dkd-beta2-T4-s7" and same.teacher == "resnet8"
    assert (other.lr, other.alpha, other.beta, other.seed) == (0.2, 0.7, None, 7), "hyperparameters are those of the method"
    assert distill("--config", str(file), "--teacher-checkpoint", "x.pt").teacher is None, "the network of another file"
    warm = tmp_path / "warm.json"
    warm.write_text(json.dumps(vars(distill("--method", "dkd", "--dkd-warmup", "2")) | {"script": "distill"}))
    assert [distill("--config", str(warm), *flags.split()).dkd_warmup for flags in ("", "--method kd", "--experiment v2")] == [
        2, 0, 0]
    shown = options.parse_show("", "", ["--config", str(file), "--epoch", "3"])
    assert (shown.seed, shown.batch_size, shown.epoch, shown.crop, shown.output) == (7, 128, 3, "pad", "batch.png")
    for parse, path, words in ((teacher, file, "train_teacher"), (distill, tmp_path / "nothing.json", "no such file"),
                               (distill, tmp_path, "directory")):
        with pytest.raises(SystemExit) as stop:
            parse("--config", str(path))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and str(path) in err and words in err
    assert distill("--config", str(file), "--teacher-checkpoint", args.teacher_checkpoint).teacher == "resnet8"
    for name, value, words in (("opt", "lamb", "--opt"), ("method", "crd", "--method"), ("lr", -1, "--lr"), ("beta", -8, "--be"),
                               ("milestones", [0], "--milestones"), ("lr", None, "--lr"), ("crop_scale", [0.5], "--crop-scale"),
                               ("seed", [1, 2], "bad.json"), ("flip", "yes", "--flip"), ("method", None, "--method")):
        (tmp_path / "bad.json").write_text(json.dumps(vars(args) | {"script": "distill", name: value}))
        with pytest.raises(SystemExit) as stop:
            distill("--config", str(tmp_path / "bad.json"))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and words in err, err
