"""The compiled augmentation kernel, executed: byte for byte the reference's batches, no race, no address outside; and what it
costs."""
import itertools
import json
import os

import pytest
import sass
import torch

MODES = ("batch", "elem")
POLICIES = ("none", "autoaugment", "autoaugment-imagenet", "autoaugment-svhn", "randaugment", "trivialaugment")
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COUNTED = ("autoaugment", 32, "elem", "fp16", 64, None)  # whose counts are limited below
LIMITS = {"warp instructions": 6_850 if sass.OLD else 5_200, "load sectors": 410, "store sectors": 390}  # an image
WAVEFRONTS = 1.94 if sass.OLD else 1.66  # per access to shared memory


def cases():
    """policy, size, mode, type, batch size, seed of the order: every policy, mode, size and type, though not with each other."""
    for number, policy in enumerate(POLICIES):
        mode, kind = MODES[number % 2], list(TYPES)[number % 3]
        yield policy, 32, mode, kind, 32, None
        yield policy, 64, MODES[(number + 1) % 2], list(TYPES)[(number + 2) % 3], 6, None
    for seed, (mode, kind) in enumerate(itertools.product(MODES, TYPES)):
        yield "autoaugment", 32, mode, kind, 7, seed
    yield COUNTED


def make(policy, size, mode, kind, batch_size):
    """The kernel's and the reference's makers of the same batches."""
    from augment.cpu import CpuBatches
    from augment.fused import FusedBatches
    from augment.policy import build_tables
    from augment.sampling import Sampler
    g = torch.Generator().manual_seed(size)
    sampler = Sampler(size, build_tables(policy, size), seed=3, crop_pad=4, flip=True, random_erasing=0.5, mixup=0.8, cutmix=1.0,
                      mix_prob=0.8)
    count = 2 * batch_size + 3
    coarse = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4, generator=g), (size, size), mode="bilinear")
    images = (200 * coarse + 55 * torch.rand(count, 3, size, size, generator=g)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    labels, order = torch.randint(100, (count,), generator=g), torch.randperm(count, generator=g)
    options = {"batch_size": batch_size, "mix_each": mode == "elem", "mean": (0.5, 0.48, 0.44),
               "std": (0.2, 0.25, 0.27), "dtype": TYPES[kind]}
    makers = [maker(images, labels, sampler, **options) for maker in (FusedBatches, CpuBatches)]
    for maker in makers:
        maker.set_epoch(5, order)
    return makers


def differing(batch, expected) -> int:
    """The values that are not the same in the batch and its targets."""
    (images, targets), (expected_images, expected_targets) = batch, expected
    return sum((one != two).sum().item() for one, two in zip((images, *targets), (expected_images, *expected_targets)))


def execute(sm, *case):
    """One batch by the compiled kernel -> how many values are wrong, or the fault; and the counts per image."""
    import ptx

    from kernels import augment as op
    *what, batch_size, seed = case
    ours, reference = make(*what, batch_size)
    try:
        with ptx.executed(op, "_augment_kernel", sm, seed) as launches:
            batch = ours.batch(1, range(batch_size))
    except (ptx.Fault, NotImplementedError) as fault:
        return {"sm": sm, "case": case, "fault": str(fault)}
    counts = launches[0].counts
    return {"sm": sm, "case": case, "wrong": differing(batch, reference.batch(1, range(batch_size))), "counts": {
        name: count / batch_size for name, count in counts.items()}, "barriers": len(launches[0].program.barriers)}


def without_barriers(sm):
    """The counted case with every ninth barrier taken out, under torture every one -> number, and whether that was noticed."""
    import ptx

    from kernels import augment as op
    *what, batch_size, _ = COUNTED
    ours, reference = make(*what, batch_size)
    with ptx.executed(op, "_augment_kernel", sm) as launches:
        batch, expected = ours.batch(1, range(batch_size)), reference.batch(1, range(batch_size))
    (launch,) = launches
    numbers = range(0, len(launch.program.barriers)) if "TORTURE" in os.environ else range(3, len(launch.program.barriers), 9)
    for number, noticed in ptx.without_barriers(launch, lambda: differing(batch, expected), numbers):
        yield {"sm": sm, "removed": number, "noticed": noticed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for sm in (80, 90):
        for result in itertools.chain((execute(sm, *case) for case in cases()), without_barriers(sm)):
            print(json.dumps(result), flush=True)


@pytest.fixture(scope="module")
def executed():
    return sass.in_a_process(__file__)


def test_ptx_of_augment_makes_the_batches_of_the_reference(executed):
    results = [result for result in executed if "case" in result]
    assert len(results) == 2 * len(list(cases()))
    bad = [result for result in results if result.get("fault") or result["wrong"]]
    assert not bad, "\n".join(map(str, bad))


def test_ptx_of_augment_costs_no_more_than_counted(executed):
    counts = [result["counts"] for result in executed if result.get("case") == list(COUNTED)]
    assert len(counts) == 2
    for count in counts:
        assert all(count[name] <= limit for name, limit in LIMITS.items()), count
        assert count["shared wavefronts"] <= WAVEFRONTS * count["shared accesses"], count


def test_a_barrier_that_is_taken_out_of_augment_is_noticed(executed):
    removed = [result for result in executed if "removed" in result]
    assert len(removed) >= 6
    needless = [result for result in removed if not result["noticed"]]  # the compiler sets one with nothing behind it to meet
    assert len(needless) <= 2 * ("TORTURE" in os.environ), "\n".join(map(str, needless))
