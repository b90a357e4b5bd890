"""The compiled kernels, executed: the specification's batches, losses and gradients, no race, no address outside; their cost."""
import itertools
import os
from collections import Counter
from typing import NamedTuple
from unittest import mock

import ptx
import pytest
import sass
import torch
from kernel_cases import DTYPES, differing, fused_batches, hard_logits, truth

from kernels import augment, softmax_kl
from kernels.softmax_kl import Weights

TORTURE = "TORTURE" in os.environ
ARCHITECTURES = (80, 90)
TOLERANCE = {"fp32": 2e-5, "fp16": 2**-10, "bf16": 2**-7}  # of a gradient: in 16 bits it is rounded once more
WEIGHTS = {"pair": Weights(1.0, None, 1.0, 8.0), "first": Weights(1.0, 0.2, 1.0, 8.0), "dominant": Weights(1.0, None, 1.0, 8.0),
           "reverse": Weights(ce=0.3, kl=0.7)}


class Loss(NamedTuple):
    """A call of softmax_kl.  split: or the direction.  logits: of hard_logits, or "weighted", normal ones and class weights.
    seed: of the order of warps."""
    classes: int
    dtype: str
    split: str
    logits: str = "normal"
    rows: int = 3
    seed: int | None = None

    def launched(self, sm):
        """Its launch, and what is wrong."""
        z, v, targets = hard_logits(self.classes, self.logits, self.rows)
        z, v, weights = z.to(DTYPES[self.dtype]).requires_grad_(), v.to(DTYPES[self.dtype]), WEIGHTS[self.split]
        how = {"temperature": 4.0, "label_smoothing": 0.0 if self.split == "pair" else 0.1, "reverse": self.split == "reverse",
               "split": "pair" if self.split == "reverse" else self.split,
               "class_weights": torch.arange(1, self.classes + 1) % 4 / 2.0 if self.logits == "weighted" else None}
        softmax_kl.hyperparameters(weights, 4.0, how["label_smoothing"], z.device)  # on the device before the executor watches
        with (ptx.executed(softmax_kl, sm, self.seed) as launches,
              mock.patch.object(softmax_kl, "use_triton", lambda tensor: True)):
            loss, terms = softmax_kl.softmax_kl(z, v, *targets, weights, **how)
            gradient, = torch.autograd.grad(loss, z)
        expected, expected_gradient = truth(z, v, targets, weights, **how)
        wanted = [place for place, weight in enumerate(weights) if weight is not None]
        total = sum(weights[place] * expected[place] for place in wanted)
        found = torch.stack([loss.detach(), *(terms[place] for place in wanted)])
        expected = torch.stack([total, *expected[wanted]])
        finite = expected.isfinite()
        errors = ((found - expected).abs() / expected.abs().clamp(min=1))[finite]
        error = (gradient.double() - expected_gradient).abs().max() / expected_gradient.abs().max().clamp(min=0.01)
        right = torch.equal(found.isfinite(), finite) and (errors <= 2e-5).all() and error <= TOLERANCE[self.dtype]
        return launches, "" if right else f"{found.tolist()} for {expected.tolist()}, a gradient off by {error:.2g}"


class Batch(NamedTuple):
    """A batch of so many rows.  stored: side of images of which windows are resized."""
    policy: str
    size: int
    mode: str
    dtype: str
    rows: int
    seed: int | None = None
    stored: int | None = None

    def launched(self, sm):
        """Its launches, and what is wrong."""
        batches, expected = fused_batches(self.policy, self.size, self.mode, DTYPES[self.dtype], self.rows, self.stored)
        with ptx.executed(augment, sm, self.seed) as launches:
            batch = batches.batch(1, range(self.rows))
        wrong = differing(batch, expected(1))
        return launches, f"{wrong} numbers differ" if wrong else ""


def counted_loss(classes, rows, instructions, sectors):
    """A case, and what a row may cost; instructions are those of a lane for a class, sectors those over reading both logits once
    and writing the gradient."""
    return Loss(classes, "fp32", "pair", rows=rows), {"warp instructions": instructions * classes / 32,
                                                      "sectors": sectors * 3 * classes * 4 / 32}


COUNTED_BATCH, COUNTED_LARGE = Batch("autoaugment", 32, "elem", "fp16", 64), Batch("autoaugment", 224, "elem", "fp16", 16)
COUNTED = dict([counted_loss(100, 64, 109.5, 1.68), counted_loss(1000, 16, 71, 1.1), counted_loss(2048, 4, 74, 1.1),
                counted_loss(32000, 2, 69, 1.68)] if sass.OLD else
               [counted_loss(100, 64, 102.4, 1.4), counted_loss(1000, 16, 62, 1.1), counted_loss(2048, 4, 65, 1.1),
                counted_loss(32000, 2, 60, 1.68)])
COUNTED[COUNTED_BATCH] = {"warp instructions": 6_850 if sass.OLD else 5_200, "load sectors": 410, "store sectors": 390,
                          "wavefronts per access": 1.95 if sass.OLD else 1.66}
# The loss for rows that several warps share; batches with enough images to come by every operation, in one launch and in two.
WITHOUT_BARRIERS = (Loss(5000, "fp32", "pair"), Batch("autoaugment", 32, "elem", "fp16", 16),
                    Batch("randaugment", 48, "batch", "fp32", 12))
# For sm_80 and sm_90 in turn.  Together they run every tile size, number type and split, though not each with each, and every
# instruction of each kernel.
CASES = (Loss(1000, "fp16", "reverse"),  # on sm_80, where 224 registers are too few
         Batch("autoaugment", 32, "elem", "fp16", 3, 0), COUNTED_BATCH, Batch("randaugment", 64, "batch", "fp32", 16),
         Batch("none", 32, "batch", "bf16", 4, 1, 20), WITHOUT_BARRIERS[2],
         Batch("trivialaugment", 20, "elem", "bf16", 28, None, 48), Batch("randaugment", 48, "batch", "fp32", 1, 2),
         *(case for case in COUNTED if case != COUNTED_BATCH),
         Loss(100, "bf16", "first", "weighted", 33, 8), Loss(5000, "fp32", "pair", "masked", 3, 0),
         Loss(2048, "bf16", "first", "weighted", 3, 2), Loss(200, "bf16", "dominant", "one-hot", 9),
         Loss(2, "bf16", "dominant", "weighted", 33), Loss(1, "fp32", "pair", "normal", 33, 0),
         Loss(10, "bf16", "reverse", "masked", 33), Loss(3, "fp16", "pair", "huge", 33, 4),
         Loss(5000, "fp16", "reverse", "weighted"))


def more_cases():
    """Those under torture alone."""
    kinds = itertools.product(("normal", "huge", "masked", "one-hot", "weighted"), WEIGHTS)
    for (number, (kind, split)), classes in itertools.product(enumerate(kinds), (1, 2, 3, 10, 100, 200, 1000, 2048, 5000)):
        yield Loss(classes, list(DTYPES)[number % 3], split, kind, 33 if classes <= 100 else 3, None if number % 2 else number)
    sizes = {"none": (64,), "autoaugment": (48,), "autoaugment-imagenet": (64,), "autoaugment-svhn": (20,), "randaugment": (64,),
             "trivialaugment": (48, 60)}
    modes, dtypes = itertools.cycle(("batch", "elem")), itertools.cycle(DTYPES)
    for policy, (size, *stored) in sizes.items():
        yield Batch(policy, 32, next(modes), next(dtypes), 32)
        yield Batch(policy, size, next(modes), next(dtypes), 5, None, *stored)
    for seed, (mode, dtype) in enumerate(itertools.product(("batch", "elem"), DTYPES)):
        yield Batch("autoaugment", 32, mode, dtype, 5, seed)
    yield from (COUNTED_LARGE, Batch("none", 36, "elem", "fp32", 3, 1, 44), Batch("autoaugment", 32, "elem", "fp16", 7, 0, 36),
                Batch("autoaugment-imagenet", 224, "elem", "bf16", 3, None, 256),
                Batch("randaugment", 256, "batch", "fp32", 3, None, 320), Batch("autoaugment", 8, "elem", "fp32", 5, 0),
                Batch("autoaugment", 36, "elem", "fp16", 3, 1, 44), Batch("none", 64, "elem", "fp32", 3, 1, 72))


def results():
    """Of each case what is wrong, counts per row, and machine code; of every eighth barrier what notices that it is gone."""
    cases = zip(itertools.cycle(ARCHITECTURES), CASES)
    for sm, case in itertools.product(ARCHITECTURES, (*CASES, *more_cases())) if TORTURE else cases:
        try:
            launches, wrong = case.launched(sm)
        except (ptx.Fault, NotImplementedError) as fault:
            launches, wrong = [], str(fault)
        counts = {name: count / case.rows for name, count in sum((launch.counts for launch in launches), Counter()).items()}
        look = sass.describe if case in (COUNTED_BATCH, WITHOUT_BARRIERS[2]) else sass.resources  # each kernel once
        wide = isinstance(case, Loss) and case.classes % 16 == 0 and case.classes * DTYPES[case.dtype].itemsize >= 512
        yield {"sm": sm, "case": repr(case), "wrong": wrong, "counts": counts, "kernel": type(case).__name__, "wide": wide,
               "codes": [look(launch.compiled) for launch in launches]}
    for sm, case in itertools.product(ARCHITECTURES if TORTURE else ARCHITECTURES[-1:], WITHOUT_BARRIERS):
        for number, noticed in case.launched(sm)[0][0].without_barriers(slice(None, None, 1 if TORTURE else 8)):
            yield {"sm": sm, "removed": number, "noticed": noticed, "kernel": type(case).__name__}


@pytest.fixture(scope="module")
def executed():
    return ptx.in_a_process(__file__)


def assert_none(found):
    assert not found, "\n".join(map(str, found))


def test_compiled_kernels_give_what_is_specified(executed):
    found = [result for result in executed if "case" in result]
    assert len(found) == (2 * len([*CASES, *more_cases()]) if TORTURE else len(CASES))
    assert_none([result for result in found if result["wrong"]])


def test_compiled_kernels_cost_no_more_than_counted(executed):
    for case, limits in COUNTED.items():
        counts = [result["counts"] for result in executed if result.get("case") == repr(case)]
        assert len(counts) == (2 if TORTURE else 1)
        for count in counts:
            count["sectors"] = count["load sectors"] + count["store sectors"]
            count["wavefronts per access"] = count["shared wavefronts"] / count["shared accesses"]
            assert all(count[name] <= limit for name, limit in limits.items()), (case, count)


@pytest.mark.skipif(not TORTURE, reason="takes long")
def test_a_large_image_costs_little_more_for_a_pixel(executed):
    small, large = ([result["counts"]["warp instructions"] / case.size**2
                     for result in executed if result.get("case") == repr(case)] for case in (COUNTED_BATCH, COUNTED_LARGE))
    assert all(big <= 1.5 * little for little, big in zip(small, large, strict=True)), (small, large)


def codes_of(executed, kernel):
    return [result | code for result in executed for code in result.get("codes", ()) if result["kernel"] == kernel]


def test_machine_code_of_the_loss_has_no_spills_and_128_bits_a_thread_where_rows_are_aligned(executed):
    codes = codes_of(executed, "Loss")
    assert_none([code for code in codes if code["stack"] or code["registers"] > code["limit"]])
    wide = [code for code in codes if code["wide"]]
    assert len(wide) >= 3
    assert_none([code for code in wide if code["loads128"] < 2 or not code["stores128"]])


@pytest.mark.skipif(sass.OLD, reason="Triton 3.6 takes 168 registers")
def test_machine_code_of_the_augmentation_has_no_spills_and_rounds_every_product(executed):
    codes = codes_of(executed, "Batch")
    assert sum("fused" in code for code in codes) >= 3
    assert_none([code for code in codes if code["stack"] or code["registers"] > 128 or code.get("fused")])


def test_a_barrier_that_is_taken_out_is_noticed(executed):
    removed = [result for result in executed if "removed" in result]
    assert Counter(result["kernel"] for result in removed) >= Counter(Loss=3, Batch=11)
    needless = [result for result in removed if not result["noticed"]]
    assert_none([result for result in needless if result["kernel"] == "Loss"])
    assert len(needless) <= 2, needless  # the compiler sets one with nothing behind it to meet
