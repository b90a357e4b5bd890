"""A method is added as the README says, in a copy of the project: a file, a record, a line; then it trains, is logged and
drawn."""
import json
import shutil
import subprocess
import sys

from command import ROOT, SMALL
from helpers import make_images, table_of

FILE = '''"""The squared distance of the logits: a loss for the test."""
import torch.nn.functional as F

from losses.cross_entropy import mixed_ce


def square_loss(student_logits, teacher_logits, targets, *, strength=2.0, centred=False, label_smoothing=0.0,
                class_weights=None):
    if centred:
        student_logits, teacher_logits = (x - x.mean(1, keepdim=True) for x in (student_logits, teacher_logits))
    ce = mixed_ce(student_logits, targets, label_smoothing=label_smoothing, class_weights=class_weights)
    distance = F.mse_loss(student_logits, teacher_logits)
    return ce + strength * distance, {"ce": ce.detach(), "distance": distance.detach()}
'''
RECORD = '''SQUARE = Method(
    function="losses.square:square_loss",
    hyperparameters={"strength": Hyperparameter(2.0, "weight of the squared distance"),
                     "centred": Hyperparameter(False, "subtract each row's mean")},
    terms=("ce", "distance"), run="square-strength{strength:g}", table="SQUARE strength {strength:g}", figure="SQUARE",
    formula="{ce} + {strength:g} |z - v|^2 / C{ramp}", warmed_up=("strength",))
'''
FOLDERS = {path.parent.name for path in ROOT.glob("[!.]*/*.py")} - {"results", "tests"}
METHODS, LINE = "METHODS = {", 'METHODS = {"square": SQUARE, '


def test_a_file_a_record_and_a_line_make_a_method(tmp_path):
    copy = tmp_path / "project"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("distill.py", "train_teacher.py"):
        shutil.copy(ROOT / name, copy)
    (copy / "losses" / "square.py").write_text(FILE)
    records = (copy / "losses" / "methods.py").read_text()
    assert records.count(METHODS) == 1
    (copy / "losses" / "methods.py").write_text(records.replace(METHODS, f"{RECORD}\n\n{LINE}"))
    classes = [f"class{index}" for index in range(4)]
    make_images(tmp_path / "images" / "train", classes, 20, seed=0)
    make_images(tmp_path / "images" / "test", classes, 5, seed=1)

    small, said = f"{SMALL} --data-dir {tmp_path / 'images'}", ""
    for line in (f"train_teacher.py --model resnet8 {small}",
                 f"distill.py --method square --strength 0.5 --centred --square-warmup 2 --student resnet8 {small} "
                 "--allow-weak-teacher", "plots/make_figures.py", "distill.py --help"):
        done = subprocess.run([sys.executable, *line.split()], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        said += done.stdout
    assert "weight of the squared distance (square, default 2)" in " ".join(said.split())
    assert "loss = CE(label smoothing 0.1) + 0.5 |z - v|^2 / C * min(epoch / 2, 1)" in said and " distance 0." in said
    run = copy / "runs" / "square-strength0.5-centred-s42"
    log = table_of(run / "log.csv")
    assert len(log) == 2 and all(float(row["train_loss_distance"]) > 0 and row["train_loss_kl"] == "" for row in log)
    first = {name: float(log[0][f"train_loss{name}"]) for name in ("", "_ce", "_distance")}
    # In the first of two epochs of warm-up the half counts.
    assert abs(first[""] - first["_ce"] - 0.25 * first["_distance"]) < 1e-4
    assert json.loads((run / "config.json").read_text())["strength"] == 0.5

    rows = {row["experiment"]: row for row in table_of(copy / "figures" / "table1.csv")}
    assert rows["square-strength0.5-centred"]["method"] == "SQUARE strength 0.5 centred"
    assert rows["square-strength0.5-centred"]["test_acc1_best_mean"]
    assert (copy / "figures" / "figure4.png").stat().st_size > 10_000
