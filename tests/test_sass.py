"""All kernels as machine code for sm_80, sm_90 and sm_120, without a GPU: no spills, few registers, wide loads and stores.

Under torture alone, as it takes minutes; test_ptx.py looks at the machine code of the kernels that they execute.
"""
import os
from unittest import mock

import pytest
import sass
import torch
from kernel_cases import fused_batches

from kernels import augment, softmax_kl
from kernels.augment_constants import WARPS

pytestmark = pytest.mark.skipif("TORTURE" not in os.environ, reason="takes long")
CLASSES = (100, 128, 200, 1000, 2048, 32000)  # 100, 200 and 1000 are no multiple of a 16-byte load, the others are
OBJECTIVES = ((torch.float32, "pair", False, False), (torch.bfloat16, "pair", False, False),
              (torch.bfloat16, "dominant", False, False), (torch.float32, "pair", True, False),
              (torch.float32, "pair", True, True))
# The result in each width, at both sizes; without a policy; with a fourth, of windows of images of that side; in two launches.
BATCHES = ((32, torch.float32, "autoaugment"), (32, torch.float16, "autoaugment"), (32, torch.bfloat16, "autoaugment"),
           (64, torch.float32, "autoaugment"), (64, torch.float16, "autoaugment"), (32, torch.float16, "none"),
           (32, torch.float16, "autoaugment", 36), (64, torch.float32, "autoaugment", 72),
           (224, torch.float16, "autoaugment", 256), (8, torch.bfloat16, "none"), (20, torch.bfloat16, "autoaugment", 48),
           (72, torch.float32, "autoaugment"), (96, torch.float16, "trivialaugment", 112), (224, torch.float32, "autoaugment"),
           (256, torch.float32, "autoaugment", 320))
ONE_LAUNCH, TWO_LAUNCHES = ("_augment_kernel",), ("_augment_policy_kernel", "_augment_mix_kernel")


def losses():
    """Each tile size, in both widths of logits, and what other flags compile apart."""
    for classes in CLASSES:
        for dtype, split, reverse, weighted in OBJECTIVES:
            logits, label, lam = torch.empty(128, classes, dtype=dtype), torch.zeros(128, dtype=torch.int64), torch.ones(128)
            hyper = softmax_kl.hyperparameters(softmax_kl.Weights(1.0, 1.0), 4.0, 0.1, torch.device("cpu"))
            about = {"classes": classes, "bytes": dtype.itemsize, "split": split, "reverse": reverse, "weighted": weighted}
            yield about, softmax_kl._softmax_kl_kernel, lambda: softmax_kl.softmax_kl_triton(
                logits, logits, label, label, lam, hyper, terms="ce kl" if reverse else "ce tckd nckd", split=split,
                reverse=reverse, class_weights=torch.ones(classes) if weighted else None)


def batches():
    for size, dtype, policy, *stored in BATCHES:
        made, _ = fused_batches(policy, size, "batch", dtype, 32, *stored)
        for name in ONE_LAUNCH if size in WARPS else TWO_LAUNCHES:
            about = {"size": size, "dtype": str(dtype), "policy": policy, "stored": stored, "kernel": name}
            others = {other: mock.MagicMock() for other in ONE_LAUNCH + TWO_LAUNCHES if other != name}

            def call():
                with mock.patch.multiple(augment, **others):
                    made.batch(1, range(32))
            yield about, getattr(augment, name), call


def launches():
    yield from losses()
    yield from batches()


@pytest.fixture(scope="module")
def compiled():
    codes = sass.inspect(__file__)
    assert len(codes) == len(list(launches())) * len(sass.ARCHITECTURES)
    return [code for code in codes if "classes" in code], [code for code in codes if "size" in code]


def assert_none(codes):
    assert not codes, "\n".join(map(str, codes))


def test_sass_of_softmax_kl_has_no_spills_and_stays_within_its_registers(compiled):
    assert_none([code for code in compiled[0] if code["spills"] or code["stack"] or code["registers"] > code["limit"]])
    assert all(code["fused"] for code in compiled[0]), "multiply and add are one instruction, whatever Triton's default is"


def test_sass_of_softmax_kl_reads_and_writes_128_bits_where_rows_are_aligned(compiled):
    """A warp of 32 threads has 128 bits a thread to read from 512 bytes of logits on."""
    wide = [code for code in compiled[0] if code["classes"] % 16 == 0 and code["classes"] * code["bytes"] >= 512]
    assert len(wide) >= len(sass.ARCHITECTURES) * 2 * len(OBJECTIVES)  # of 2048 and 32000
    assert_none([code for code in wide if not (code["loads128"] >= 2 and code["stores128"])])


@pytest.mark.skipif(sass.OLD, reason="Triton 3.6 takes 168 registers; for sm_120 it spills 2 and fuses 64 products")
def test_sass_of_augment_has_no_spills_stores_128_bits_and_rounds_every_product(compiled):
    """The equality with PyTorch's separate products and sums hangs on the last."""
    assert_none([code for code in compiled[1] if code["spills"] or code["stack"] or code["registers"] > 128])
    writing = [code for code in compiled[1] if code["kernel"] != "_augment_policy_kernel"]
    assert_none([code for code in writing if code["stores128"] < (4 if "32" in code["dtype"] else 2)])
    assert_none([code for code in compiled[1] if code["fused"]])
