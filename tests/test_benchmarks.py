"""The benchmarks without a test file of their own do what their commands say; what they measure is not judged."""
import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from helpers import table_of

from benchmarks import augmentation, augmentation_rivals, decoding, figure, loss, table

ROOT = Path(__file__).parent.parent
A_KERNEL_AND_A_STEP = """
import instructions
for row in (next(instructions.losses(80, {10: 8})), next(instructions.batches(80, ("none",)))):
    print(row.kernel, row.warp_instructions, row.sectors_over_ideal)
code = next(instructions.assembled(quick=True))
print(code.kernel, code.registers, code.spills, code.instructions)
instructions.launches_per_step("resnet8", "resnet8")
"""


def test_decoding_has_a_row_of_each_contender(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding, "SIZES", ((960, 720),))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    decoding.main(table.parser("", "quick").parse_args(["--quick", "--output", str(tmp_path)]))
    rows = {row["contender"]: row for row in table_of(tmp_path / "decoding-cpu.csv")}
    assert list(rows) == ["whole image", "ours", "torchvision.io"] and rows["whole image"]["difference"] == "0.0"
    assert 0 < float(rows["ours"]["difference"]) < 1 and float(rows["ours"]["ms"]) > 0


def test_photographs_are_augmented_by_every_contender():
    images, labels = torch.randint(0, 256, (4, 256, 256, 3), dtype=torch.uint8), torch.arange(4)
    calls = augmentation.one_by_one(augmentation.tensor_pipelines(photographs=True), images.permute(0, 3, 1, 2), labels,
                                    augmentation_rivals.mixing())
    calls |= augmentation.ours(images, labels, 4, **augmentation.STAGES[augmentation.PHOTOGRAPHS])
    assert [call() for call in calls.values()] == [4] * 3


def test_the_picture_is_drawn_from_the_committed_files(tmp_path):
    figure.main(argparse.Namespace(where="cpu", output=tmp_path / "performance.png"))
    assert matplotlib.image.imread(tmp_path / "performance.png").shape[1] == 1290


def test_published_code_without_enough_memory_leaves_the_others(monkeypatch, tmp_path, capsys):
    def out_of_memory(student, teacher, label):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB")

    monkeypatch.setattr(loss, "published_dkd", out_of_memory)
    flags = f"--quick --device cpu --case 128x100 --output {tmp_path}"
    loss.main(table.parser("", "quick", loss.CPU_SIZES).parse_args(flags.split()))
    assert re.search(r"rows 128, classes 100, float32, dkd, eager, reference, us [\d.]+", capsys.readouterr().out)
    rows = table_of(tmp_path / "loss-cpu.csv")
    assert [(row["loss"], row["contender"]) for row in rows] == [("kd", "reference"), ("kd", "published"), ("dkd", "reference")]
    assert float(rows[0]["times_base"]) > 0 and float(rows[2]["us"]) > 0
    assert rows[2]["times_base"] == rows[2]["memory_times_base"] == ""


def test_each_row_is_written_as_it_comes_but_none_of_a_quick_run(tmp_path):
    assert table.Rows(table.parser("", "quick").parse_args(["--quick"]), "what", "cpu").path is None
    args = table.parser("", "quick").parse_args(["--output", str(tmp_path / "new")])
    path = tmp_path / "new" / "what-gpu-of-1.csv"
    for content in ("first", "second"):
        rows = table.Rows(args, "what", "GPU (of 1)")
        rows.add(table.Row(name=content, number=1.5))
        assert path.read_text() == f"name,number\n{content},1.5\n", "the first row begins anew"
        rows.add(table.Row(name=content, number=None))
        assert path.read_text() == f"name,number\n{content},1.5\n{content},\n"


@pytest.mark.parametrize("device", ["cuda:77", "cuda:128", "cuda:07", "bogus"])
def test_a_device_that_is_not_there_is_one_line(device, capsys):
    """All benchmarks have this parser."""
    with pytest.raises(SystemExit) as leave:
        table.parser("", "quick").parse_args(["--device", device])
    error = capsys.readouterr().err
    assert leave.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and device in error, error


def test_timm_is_a_contender_where_it_is_installed(monkeypatch, capsys):
    images, labels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.arange(4)
    if importlib.util.find_spec("timm"):
        assert [call() for call in augmentation_rivals.timm_mixing(images, labels).values()] == [4]
    monkeypatch.setitem(sys.modules, "timm.data.mixup", None)
    assert augmentation_rivals.timm_mixing(images, labels) == {} and "timm is not installed" in capsys.readouterr().out


@pytest.mark.skipif("TORTURE" not in os.environ, reason="takes long")
def test_instructions_and_launches_are_counted():
    done = subprocess.run([sys.executable, "-c", A_KERNEL_AND_A_STEP], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": "tests"})
    assert done.returncode == 0, done.stderr
    softmax_kl, augment, assembled, step = done.stdout.splitlines()
    for name, line in (("softmax_kl", softmax_kl), ("augment", augment)):
        assert line.split()[0] == name and all(float(number) > 1 for number in line.split()[1:])
    name, registers, spills, instructions = assembled.split()
    assert name == "softmax_kl" and 64 < int(registers) < 256 and spills == "0" and int(instructions) > 1000
    assert re.match(r"resnet8 -> resnet8, FP16, AdamW: at least \d{3} launches a step: augmentation 1, .* every 40 steps$", step)
