"""The compiled loss kernel, executed: the reference's losses and gradients, no race, no address outside; and what it costs."""
import itertools
import json
import math
import os
from unittest import mock

import pytest
import sass
import torch

CLASSES = (1, 2, 3, 10, 100, 1000, 2048, 5000)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ("normal", "huge", "masked", "one-hot")
TOLERANCE = 2e-5
SIXTEEN_BITS = {"fp16": 2**-10, "bf16": 2**-7}  # of a gradient, where it is rounded once more
# Instructions of a lane per class, at 100 classes 320 of a warp per row; sectors over those that reading both logits once and
# writing the gradient takes.
LIMITS = {100: 320 * 32 / 100, 1000: 62, 2048: 65, 32000: 60}
SECTORS = {100: 1.4, 1000: 1.1, 2048: 1.1, 32000: 1.68}
if sass.OLD:
    LIMITS, SECTORS[100] = {100: 342 * 32 / 100, 1000: 71, 2048: 74, 32000: 69}, 1.68
COUNTED = [(classes, "fp32", "pair", "normal", rows, None) for classes, rows in ((100, 64), (1000, 16), (2048, 4), (32000, 2))]


def cases():
    """classes, type, split or direction, kind of logits, rows, seed of the order; a fifth of the combinations, all under
    torture."""
    for classes in CLASSES:
        rows = 33 if classes <= 100 else 3
        for number, (kind, split) in enumerate(itertools.product(KINDS, ("pair", "dominant", "first", "reverse"))):
            if "TORTURE" in os.environ or (number + classes) % 5 == 0:
                yield classes, list(TYPES)[number % 3], split, kind, rows, None if number % 2 else number
    yield from COUNTED


def logits(classes: int, kind: str, rows: int):
    g = torch.Generator().manual_seed(classes)
    z, v = torch.randn(2, rows, classes, generator=g) * 3
    if kind == "huge":
        z, v = 1e3 * z, 1e3 * v
    if kind == "masked" and classes > 3:
        z[:, 1] = v[:, 1] = -math.inf
    if kind == "one-hot":
        v = 60 * torch.nn.functional.one_hot(torch.randint(classes, (rows,), generator=g), classes).float()
    label, other = torch.randint(classes, (2, rows), generator=g)
    lam = torch.rand(rows, generator=g)
    lam[::5], lam[1::7] = 1.0, 0.0
    return z, v, (label, other, lam)


def loss_and_gradient(z, v, targets, split: str):
    from kernels.softmax_kl import Weights, softmax_kl
    leaf, reverse = z.detach().requires_grad_(), split == "reverse"
    weights = Weights(ce=0.3, kl=0.7) if reverse else Weights(1.0, 0.2, 1.0, 8.0) if split == "first" else Weights(ce=1.0,
        tckd=1.0, nckd=8.0)
    loss, terms = softmax_kl(leaf, v, *targets, weights, temperature=4.0, label_smoothing=0.0 if split == "pair" else 0.1,
                             split="pair" if reverse else split, reverse=reverse)
    return torch.stack([loss.detach(), *terms]), torch.autograd.grad(loss, leaf)[0].float()


def execute(sm, *case):
    """A call by the compiled kernel -> its relative errors against the reference, with floors of 1 and 0.01, or the fault; and
    the counts."""
    import ptx

    from kernels import softmax_kl as op
    classes, kind, split, what, rows, seed = case
    z, v, targets = logits(classes, what, rows)
    z, v = z.to(TYPES[kind]), v.to(TYPES[kind])
    expected, expected_gradient = loss_and_gradient(z, v, targets, split)
    op._counter.cache_clear()
    try:
        with ptx.executed(op, "_softmax_kl_kernel", sm, seed) as launches, mock.patch.object(op, "use_triton",
                                                                                             lambda tensor: True):
            losses, gradient = loss_and_gradient(z, v, targets, split)
    except (ptx.Fault, NotImplementedError) as fault:
        return {"sm": sm, "case": case, "fault": str(fault)}
    same = losses.isfinite() == expected.isfinite()
    loss_error = ((losses - expected).abs() / expected.abs().clamp(min=1))[expected.isfinite()]
    gradient_error = (gradient - expected_gradient).abs().max() / expected_gradient.abs().max().clamp(min=0.01)
    return {"sm": sm, "case": case, "alike": bool(same.all()), "loss": loss_error.max().item(), "gradient": gradient_error.item(),
            "counter": int(op._counter(torch.device("cpu"), 0)), "counts": dict(launches[0].counts)}


def without_barriers(sm):
    """Each barrier of the kernel for rows that several warps share, taken out -> number, and whether that was noticed."""
    import ptx

    from kernels import softmax_kl as op
    z, v, targets = logits(5000, "normal", 3)
    with ptx.executed(op, "_softmax_kl_kernel", sm) as launches, mock.patch.object(op, "use_triton", lambda tensor: True):
        loss_and_gradient(z, v, targets, "pair")
    (launch,) = launches
    results = [tensor for tensor in launch.tensors if tensor.untyped_storage().data_ptr() in launch.fresh]
    right = [tensor.clone() for tensor in results]
    def wrong() -> bool:
        return not all(torch.equal(one, two) for one, two in zip(results, right))

    # The last barrier orders memory between programs: only some orders of them show that it is gone.
    for number, noticed in ptx.without_barriers(launch, wrong, range(len(launch.program.barriers)), seeds=(None, *range(8))):
        yield {"sm": sm, "removed": number, "noticed": noticed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for sm in (80, 90):
        for result in itertools.chain((execute(sm, *case) for case in cases()), without_barriers(sm)):
            print(json.dumps(result), flush=True)


@pytest.fixture(scope="module")
def executed():
    return sass.in_a_process(__file__)


def test_ptx_of_softmax_kl_gives_the_losses_of_the_reference(executed):
    results = [result for result in executed if "case" in result]
    assert len(results) == 2 * len(list(cases()))
    bad = [result for result in results if result.get("fault") or not result["alike"] or result["counter"]
           or result["loss"] > TOLERANCE
           or result["gradient"] > SIXTEEN_BITS.get(result["case"][1], TOLERANCE)]
    assert not bad, "\n".join(map(str, bad))


def test_ptx_of_softmax_kl_costs_no_more_than_counted(executed):
    counted = [result for result in executed if result.get("case") in [list(case) for case in COUNTED]]
    assert len(counted) == 2 * len(COUNTED)
    for result in counted:
        classes, _, _, _, rows, _ = result["case"]
        counts = result["counts"]
        assert 32 * counts["warp instructions"] / (rows * classes) <= LIMITS[classes], result
        assert (counts["load sectors"] + counts["store sectors"]) / (3 * rows * classes * 4 / 32) <= SECTORS[classes], result


def test_a_barrier_that_is_taken_out_of_softmax_kl_is_noticed(executed):
    removed = [result for result in executed if "removed" in result]
    assert len(removed) >= 6
    assert all(result["noticed"] for result in removed), "\n".join(map(str, removed))
