"""The augmentation kernel as machine code for sm_80, sm_90 and sm_120: no spills, wide stores, no fused multiply-adds; without a
GPU."""
import pytest
import sass
import torch

from augment.fused import FusedBatches
from augment.policy import build_tables
from augment.sampling import Sampler
from kernels import augment as op

# The result in each width, at both sizes; without a policy; with one operation.
VARIANTS = ((32, torch.float32, "autoaugment"), (32, torch.float16, "autoaugment"), (32, torch.bfloat16, "autoaugment"),
            (64, torch.float32, "autoaugment"), (64, torch.float16, "autoaugment"), (32, torch.float16, "none"))


def launches():
    for size, dtype, policy in VARIANTS:
        sampler = Sampler(size, build_tables(policy, size), seed=0, crop_pad=4, flip=True, random_erasing=0.25, mixup=0.8,
                          cutmix=1.0, mix_prob=1.0)
        images, labels = torch.empty(64, size, size, 3, dtype=torch.uint8), torch.empty(64, dtype=torch.int64)
        ours = FusedBatches(images, labels, sampler, batch_size=32, mix_each=False, mean=(0.5,) * 3, std=(0.25,) * 3, dtype=dtype)
        yield ({"size": size, "dtype": str(dtype), "policy": policy}, op._augment_kernel, lambda: ours.batch(1, range(32)))


@pytest.fixture(scope="module")
def compiled():
    if sass.OLD:
        pytest.skip("Triton 3.6 takes 168 registers at 32 pixels; for sm_120 it spills 2 at 64 and fuses 64 products")
    codes = sass.inspect(__file__)
    assert len(codes) == 3 * len(VARIANTS)
    return codes


def test_sass_of_augment_has_no_spills(compiled):
    bad = [code for code in compiled if code["spills"] or code["stack"] or code["registers"] > 128]
    assert not bad, "\n".join(map(str, bad))


def test_sass_of_augment_stores_128_bits(compiled):
    narrow = [code for code in compiled if code["stores128"] < (4 if "32" in code["dtype"] else 2)]
    assert not narrow, "\n".join(map(str, narrow))


def test_sass_of_augment_rounds_every_product(compiled):
    """The equality with PyTorch's separate products and sums hangs on it."""
    fused = [code for code in compiled if code["fused"]]
    assert not fused, "\n".join(map(str, fused))
