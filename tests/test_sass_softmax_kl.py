"""The loss kernel as machine code for sm_80, sm_90 and sm_120: no spills, few registers, wide loads; without a GPU."""
import pytest
import sass
import torch

from kernels import softmax_kl as op

CLASSES = (100, 128, 200, 1000, 2048, 32000)  # 100, 200 and 1000 are no multiple of a 16-byte load, the others are
VARIANTS = ((torch.float32, "pair", False), (torch.bfloat16, "pair", False), (torch.bfloat16, "dominant", False),
            (torch.float32, "pair", True))


def launches():
    """Every tile size, in both widths of logits, and what other flags compile apart."""
    for classes in CLASSES:
        for dtype, split, reverse in VARIANTS:
            logits, label, lam = torch.empty(128, classes, dtype=dtype), torch.zeros(128, dtype=torch.int64), torch.ones(128)
            hyper = op.hyperparameters(op.Weights(1.0, 1.0), 4.0, 0.1, torch.device("cpu"))
            about = {"classes": classes, "bytes": dtype.itemsize, "split": split, "reverse": reverse,
                     "limit": op.tile_for(classes, op.vector_for(logits), reverse).registers}
            yield about, op._softmax_kl_kernel, lambda: op.softmax_kl_triton(
                logits, logits, label, label, lam, hyper, terms="ce kl" if reverse else "ce tckd nckd", split=split,
                reverse=reverse)


@pytest.fixture(scope="module")
def compiled():
    return sass.inspect(__file__)


def test_sass_has_no_spills_and_stays_within_its_registers(compiled):
    assert len(compiled) == 3 * len(VARIANTS) * len(CLASSES)
    bad = [code for code in compiled if code["spills"] or code["stack"] or code["registers"] > code["limit"]]
    assert not bad, "\n".join(map(str, bad))
    assert all(code["fused"] for code in compiled), "multiply and add are one instruction, whatever Triton's default is"


def test_sass_reads_and_writes_128_bits_where_rows_are_aligned(compiled):
    """A warp of 32 threads has 128 bits a thread to read from 512 bytes of logits on."""
    wide = [code for code in compiled if code["classes"] % 16 == 0 and code["classes"] * code["bytes"] >= 512]
    assert len(wide) == 3 * (4 + 4 + 2)
    narrow = [code for code in wide if not (code["loads128"] >= 2 and code["stores128"])]
    assert not narrow, "\n".join(map(str, narrow))
