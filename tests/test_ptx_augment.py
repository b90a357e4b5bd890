"""The compiled augmentation kernels, executed: bit for bit the specification's batches, no race, no address outside; its cost."""
import itertools
from collections import Counter

import ptx
import pytest
import sass
from kernel_cases import DTYPES, differing, fused_batches

from kernels import augment as op

MODES = ("batch", "elem")
POLICIES = ("none", "autoaugment", "autoaugment-imagenet", "autoaugment-svhn", "randaugment", "trivialaugment")
COUNTED = ("autoaugment", 32, "elem", "fp16", 64, None)  # whose counts are limited below
COUNTED_LARGE = ("autoaugment", 224, "elem", "fp16", 16, None)
WITHOUT_BARRIERS = ("autoaugment", 32, "elem", "fp16", 16, None)  # enough images to come by every operation
WITHOUT_BARRIERS_LARGE = ("autoaugment", 72, "batch", "fp32", 8, None)
LIMITS = {"warp instructions": 6_850 if sass.OLD else 5_200, "load sectors": 410, "store sectors": 390}  # an image
WAVEFRONTS = 1.95 if sass.OLD else 1.66  # per access to shared memory


def cases():
    """policy, size, mode, type, batch size, seed of the order, and the side of images of which windows are resized: every policy,
    mode, size and type, though not with each other; more of them under torture."""
    for number, policy in enumerate(POLICIES):
        small = policy, 32, MODES[number % 2], list(DTYPES)[number % 3], 32, None
        size, *stored = ((64,), (48,), (64,), (20,), (64,), (48, 60))[number]
        large = policy, size, MODES[(number + 1) % 2], list(DTYPES)[(number + 2) % 3], 5, None, *stored
        yield from (small, large) if ptx.TORTURE else (large,) if number % 2 else (small,)
    ways = itertools.product(MODES, DTYPES) if ptx.TORTURE else zip(MODES, DTYPES)
    for seed, (mode, kind) in enumerate(ways):
        yield "autoaugment", 32, mode, kind, 5, seed
    yield "none", 32, "batch", "bf16", 4, None, 20
    yield "none", 36, "elem", "fp32", 3, 1, 44
    yield COUNTED
    if ptx.TORTURE:
        yield COUNTED_LARGE
        yield "autoaugment", 32, "elem", "fp16", 7, 0, 36
        yield "autoaugment-imagenet", 224, "elem", "bf16", 3, None, 256
        yield "randaugment", 256, "batch", "fp32", 3, None, 320
        yield "autoaugment", 8, "elem", "fp32", 5, 0
        yield "autoaugment", 36, "elem", "fp16", 3, 1, 44
        yield "none", 64, "elem", "fp32", 3, 1, 72


def launched(sm, policy, size, mode, kind, batch_size, seed, stored=None):
    """The launches of one batch, the batch, and what it must be."""
    batches, expected = fused_batches(policy, size, mode, DTYPES[kind], batch_size, stored)
    with ptx.executed(op, sm, seed) as launches:
        batch = batches.batch(1, range(batch_size))
    return launches, batch, expected(1)


def execute(sm, *case):
    """How many numbers are wrong, the counts per image, and the machine code."""
    launches, batch, expected = launched(sm, *case)
    counts = sum((launch.counts for launch in launches), Counter())
    return {"wrong": differing(batch, expected), "counts": {name: count / case[4] for name, count in counts.items()},
            "codes": [sass.describe(launch.compiled) for launch in launches]}


def without_barriers(sm, numbers):
    """Barriers of the one launch, and of the first of two, taken out -> number, and whether that was noticed."""
    (launch,), batch, expected = launched(sm, *WITHOUT_BARRIERS)
    yield from ptx.without_barriers(launch, lambda: differing(batch, expected), numbers)
    launch = launched(sm, *WITHOUT_BARRIERS_LARGE)[0][0]
    yield from ptx.without_barriers(launch, lambda: False, numbers)  # the races are seen


@pytest.fixture(scope="module")
def executed():
    return ptx.in_a_process(__file__)


def test_ptx_of_augment_makes_the_specified_batches(executed):
    results = [result for result in executed if "case" in result]
    assert len(results) == len(list(cases())) * (2 if ptx.TORTURE else 1)
    bad = [result for result in results if result.get("fault") or result["wrong"]]
    assert not bad, "\n".join(map(str, bad))


def test_ptx_of_augment_costs_no_more_than_counted(executed):
    counts = [result["counts"] for result in executed if result.get("case") == list(COUNTED)]
    assert len(counts) == (2 if ptx.TORTURE else 1)
    for count in counts:
        assert all(count[name] <= limit for name, limit in LIMITS.items()), count
        assert count["shared wavefronts"] <= WAVEFRONTS * count["shared accesses"], count


@pytest.mark.skipif(sass.OLD, reason="Triton 3.6 takes 168 registers")
def test_sass_of_augment_has_no_spills_and_rounds_every_product(executed):
    codes = [code for result in executed for code in result.get("codes", ())]
    bad = [code for code in codes if code["spills"] or code["stack"] or code["registers"] > 128 or code["fused"]]
    assert codes and not bad, "\n".join(map(str, bad))


@pytest.mark.skipif(not ptx.TORTURE, reason="takes long")
def test_ptx_of_augment_costs_a_large_image_little_more_for_a_pixel(executed):
    small, large = ([result["counts"]["warp instructions"] / case[1]**2
                     for result in executed if result.get("case") == list(case)] for case in (COUNTED, COUNTED_LARGE))
    assert all(big <= 1.5 * little for little, big in zip(small, large, strict=True)), (small, large)


def test_a_barrier_that_is_taken_out_of_augment_is_noticed(executed):
    removed = [result for result in executed if "removed" in result]
    assert len(removed) >= 11
    needless = [result for result in removed if not result["noticed"]]  # the compiler sets one with nothing behind it to meet
    assert len(needless) <= 2, "\n".join(map(str, needless))
