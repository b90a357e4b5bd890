"""The CPU path and the kernel behind the losses, against the specification in float64, and mpmath where float64 itself fails.

Without a GPU the kernel runs in Triton's interpreter on CPU tensors; where there is one, these tests run the compiled kernel.
"""
import itertools
import os

import mpmath
import pytest
import torch
import torch.nn.functional as F
import triton
from kernel_cases import DEVICE, rows, truth

import kernels
from kernels import softmax_kl as op
from kernels.softmax_kl import Tile, Weights, hyperparameters, softmax_kl
from losses import Targets

# Losses relative with floor 1, gradients relative to their largest entry with floor 0.01; a GPU's exp2 is good to 2 ulp.
TOLERANCE = 2e-5 if DEVICE == "cuda" else 5e-6
INF = float("inf")
MIX = Weights(0.7, 0.3, 1.0, 8.0)
BLOCKED = Tile(rows=64, lanes=8, chunks=2, warps=4, registers=255)  # the path of wide rows, without their width


KERNELS = ("reference", "triton", "triton in blocks")


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Every test that uses this runs with each implementation behind the op."""
    if request.param == "triton in blocks":
        monkeypatch.setattr(op, "tile_for", lambda classes, vector, *_: BLOCKED._replace(
            chunks=triton.next_power_of_2(max(64, classes // 8)) // BLOCKED.lanes // vector))
    kernels.choose(request.param.split()[0])
    yield request.param
    kernels.choose("auto")


def combined(**values):
    """Parametrizes over all combinations of these, the last fastest; the slow interpreter takes every fifth unless TORTURE."""
    step = 1 if DEVICE == "cuda" or "TORTURE" in os.environ else 5
    cases = [(kernel, *case) for number, kernel in enumerate(KERNELS)
             for case in list(itertools.product(*values.values()))[number % step::step if number else 1]]
    return pytest.mark.parametrize(("kernel", *values), cases, indirect=["kernel"])


def run(z, v, targets, weights=MIX, temperature=4.0, **how):
    """Loss, terms and the student's gradient, on the CPU."""
    leaf = z.to(DEVICE).detach().requires_grad_()
    loss, terms = softmax_kl(leaf, v.to(DEVICE), *(part.to(DEVICE) for part in targets), weights, temperature=temperature, **how)
    (grad,) = torch.autograd.grad(loss, leaf)
    terms = torch.stack(terms)
    assert terms.isnan().tolist() == [weight is None for weight in weights], f"{terms.tolist()} for {weights}"
    return loss.detach().cpu(), terms.cpu(), grad.cpu()


def on_device(z, v, targets):
    return z.to(DEVICE), v.to(DEVICE), Targets(*(part.to(DEVICE) for part in targets))


def assert_terms(terms, expected, label=""):
    """Of the wanted terms, which are no NaN: `run` sees to that."""
    error = ((terms.double() - expected).abs() / expected.abs().clamp(min=1))[~terms.isnan()].max().item()
    assert error < TOLERANCE, f"{label} relative error {error:.2g}: {terms.tolist()} for {expected.tolist()}"


def assert_grad(grad, expected, label=""):
    error = ((grad.double() - expected).abs().max() / expected.abs().max().clamp(min=0.01)).item()
    assert error < TOLERANCE, f"{label} gradient error {error:.2g} of its largest entry"


def of_split(split):
    """Weights and keyword arguments of a way to split the classes, or of KD, which does not, or of its reverse KL."""
    return (Weights(0.5, 0.5), {"reverse": split == "reverse"}) if split in ("kd", "reverse") else (MIX, {"split": split})


# 1 and 2 classes have no rest or a single one, 3 the smallest pair with a rest; 10 is below every tile, 100 is CIFAR-100 with one
# warp a row, 300 and 1000 take four, 5000 more than one tile.  37 rows fill no tile of rows.
@combined(split=["pair", "dominant", "first", "kd", "reverse"],
          how=[(4.0, 3.0, 0.0, False), (1.0, 10.0, 0.1, False), (4.0, 5.0, 0.1, True)],
          classes=[1, 2, 3, 10, 100, 300, 1000, 5000])
def test_terms_and_gradient_match_float64_sums(kernel, split, how, classes):
    """how: temperature, deviation of the logits, label smoothing, and whether classes have weights."""
    temperature, scale, smoothing, weighted = how
    z, v, targets = rows(37 if classes <= 100 else 9 if classes < 5000 else 3, classes, scale, seed=classes)
    weights, how = of_split(split)
    how |= {"temperature": temperature, "label_smoothing": smoothing}
    class_weights = class_weights_for(classes) if weighted else None
    expected, expected_grad = truth(z, v, targets, weights, class_weights=class_weights, **how)
    loss, terms, grad = run(z, v, targets, weights, class_weights=class_weights.to(DEVICE) if weighted else None, **how)
    assert_terms(terms, expected)
    assert_terms(loss, sum(weight * term for weight, term in zip(weights, expected) if weight is not None))
    assert_grad(grad, expected_grad)


def class_weights_for(classes):
    """Every fourth is 0, the others 0.5, 1 or 1.5."""
    return torch.arange(1, classes + 1) % 4 / 2.0


def test_cross_entropy_is_that_of_torch(kernel):
    """With probabilities as targets; with class indices as targets torch divides by the sum of the rows' weights, not by N."""
    z, _, targets = rows(37, 10)
    soft = targets.lam[:, None] * F.one_hot(targets.label, 10) + (1 - targets.lam[:, None]) * F.one_hot(targets.other, 10)
    unmixed = Targets.unmixed(targets.label)
    for smoothing, weights in itertools.product((0.0, 0.1), (None, class_weights_for(10))):
        theirs = torch.nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing)
        how = {"label_smoothing": smoothing, "class_weights": None if weights is None else weights.to(DEVICE)}
        mean = 1 if weights is None else weights[unmixed.label].mean()
        for ours, labels, factor in ((targets, soft, 1), (unmixed, unmixed.label, mean)):
            leaf = z.clone().requires_grad_()
            expected = theirs(leaf, labels) * factor
            loss, _, grad = run(z, z, ours, Weights(ce=1.0), 1.0, **how)
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf)[0], rtol=1e-4, atol=1e-7)


def test_an_impossible_class_may_have_no_weight(kernel):
    z, v, targets = rows(37, 10)
    z[:, 9], targets = -INF, Targets.unmixed(targets.label % 9)
    class_weights = torch.tensor([1.0] * 9 + [0.0])
    expected, expected_grad = truth(z, v, targets, Weights(1, 0, 0, 0), temperature=4.0, label_smoothing=0.1,
                                    class_weights=class_weights.double())
    _, terms, grad = run(z, v, targets, Weights(ce=1.0), label_smoothing=0.1, class_weights=class_weights.to(DEVICE))
    assert_terms(terms, expected)
    assert_grad(grad, expected_grad)


@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("close", ["in R", "label and R"])
def test_reverse_gradient_does_not_cancel(kernel, scale, close):
    """Where one class has nearly all of q, ln q_i - ln p_i and its mean are thousands and nearly equal; pairs of classes keep
    the digits."""
    z, v, targets = rows(32, 100, scale)
    second = z.argsort(1, descending=True)[:, :2]
    if close == "label and R":
        targets = targets._replace(label=second[:, 1], other=second[:, 1])
    z = z.scatter(1, second[:, 1:], z.gather(1, second[:, :1]) - torch.linspace(8, 60, 32)[:, None])
    q, p = ((x.double() / 4).log_softmax(1) for x in (z, v))
    level = q - p
    expected = 4 / 32 * q.exp() * (q.exp()[:, None, :] * (level[:, :, None] - level[:, None, :])).sum(2)
    grad = run(z, v, targets, Weights(kl=1.0), 4.0, reverse=True)[2]
    error = ((grad.double() - expected).abs().amax(1) / expected.abs().amax(1)).max().item()
    assert error < 2e-5, f"{error:.2g} of a row's largest entry"


def test_cross_entropy_alone_reads_no_teacher(kernel):
    z, _, targets = rows(37, 10)
    leaf = z.to(DEVICE).requires_grad_()
    targets = tuple(part.to(DEVICE) for part in targets)
    loss, terms = softmax_kl(leaf, None, *targets, Weights(ce=2.0), temperature=4.0, label_smoothing=0.1)
    expected, expected_grad = truth(z, z, rows(37, 10)[2], Weights(2.0, 0.0, 0.0, 0.0), temperature=4.0, label_smoothing=0.1)
    assert_terms(torch.stack(terms).cpu(), expected)
    assert_grad(torch.autograd.grad(loss, leaf)[0].cpu(), expected_grad)
    with pytest.raises(ValueError, match="kl needs the teacher's logits"):
        softmax_kl(leaf, None, *targets, Weights(kl=1.0), temperature=4.0)
    with pytest.raises(ValueError, match="no term is wanted"):
        softmax_kl(leaf, leaf, *targets, Weights(), temperature=4.0)
    for weights in (Weights(kl=1.0, tckd=1.0), Weights(nckd=1.0)):
        with pytest.raises(ValueError, match="no reverse"):
            softmax_kl(leaf, leaf, *targets, weights, temperature=4.0, reverse=True)


def hard_cases():
    """Logits on which naive code gives inf, NaN or the wrong digits."""
    noise = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    hot = torch.full((6, 10), -1e4).scatter(1, torch.arange(6)[:, None], 1e4)
    masked, ties = noise.clone(), noise.round()
    masked[:, 9] = -INF
    return {
        "one-hot teacher": (noise, hot), "one-hot student": (hot, noise), "both one-hot": (hot, hot.roll(1, 0)),
        "both the same": (hot, hot),
        "random 1e4": (1e4 * noise, 1e4 * noise.roll(1, 0)), "shifted": (noise + 3e4, noise.roll(1, 0) - 3e4),
        "saturated": (30 * noise, -30 * noise),
        "equal": (torch.zeros(6, 10), torch.zeros(6, 10)), "identical": (noise, noise), "ties": (ties, ties.roll(1, 0)),
        "class masked in both": (masked, masked.roll(1, 0)),
    }


@combined(split=["pair", "dominant", "reverse"], name=hard_cases())
def test_extreme_logits_stay_finite_and_exact(kernel, split, name):
    z, v = hard_cases()[name]
    targets = Targets(torch.arange(6), torch.tensor([0, 2, 2, 4, 5, 5]), torch.tensor([1.0, 0.7, 0.3, 1.0, 0.5, 0.9]))
    weights, how = of_split(split)
    how["label_smoothing"] = 0.0 if "masked" in name else 0.1  # smoothing towards an impossible class is infinite by definition
    expected, expected_grad = truth(z, v, targets, weights, temperature=4.0, **how)
    _, terms, grad = run(z, v, targets, weights, **how)
    assert_terms(terms, expected, name)
    assert_grad(grad, expected_grad, name)
    if name in ("identical", "both the same"):
        assert terms[1:].nan_to_num().abs().max() <= 1e-5, terms


@pytest.mark.parametrize("odds", [(20.0, 30.0), (60.0, 40.0)])
def test_confident_rows_match_mpmath(kernel, odds):
    """Where 1 - p is below float64's resolution the terms are still right, relative to their own tiny size."""
    mpmath.mp.dps = 200
    z, v = (torch.tensor([[float(odd), 1.0, -0.5, 0.25]]) for odd in odds)

    def softmax(x):
        weights = [mpmath.e ** mpmath.mpf(value) for value in x[0].tolist()]
        return [weight / sum(weights) for weight in weights]

    q, p = softmax(z), softmax(v)
    q_rest, p_rest = sum(q[1:]), sum(p[1:])
    tckd = p[0] * mpmath.log(p[0] / q[0]) + p_rest * mpmath.log(p_rest / q_rest)
    _, terms, grad = run(z, v, Targets.unmixed(torch.tensor([0])), Weights(tckd=1.0), 1.0)
    assert terms[2].item() == pytest.approx(float(tckd), rel=1e-4, abs=1e-37)
    assert grad[0, 0].item() == pytest.approx(float(p_rest - q_rest), rel=1e-4, abs=1e-37)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradient_is_the_float64_gradient_rounded_once(kernel, dtype):
    """It is kept in fp32 until the upstream gradient, the loss scale, has multiplied it: nothing underflows."""
    z, v, targets = rows(64, 100, dtype=dtype)
    scale = torch.tensor(65536.0, device=DEVICE)
    _, expected = truth(z, v, targets, Weights(1.0, 0, 1.0, 8.0), temperature=4.0)
    exact = expected * 65536
    # The interpreter truncates to bf16 where a GPU rounds.
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2)
    leaf = z.clone().to(DEVICE).requires_grad_()
    loss, _ = softmax_kl(leaf, v.to(DEVICE), *(part.to(DEVICE) for part in targets), Weights(1.0, 0, 1.0, 8.0), temperature=4.0)
    (loss * scale).backward()
    grad = leaf.grad.cpu()
    assert grad.dtype == dtype
    error = (grad.double() - exact).abs() - rounding * 1.01 * exact.abs()
    assert error.max() <= exact.abs().max() * TOLERANCE, f"{error.max()} beyond one rounding"
    assert (grad == 0).float().mean() < 0.01, "small gradients vanished"


def test_a_weight_may_be_a_tensor_that_a_schedule_fills(kernel):
    z, v, targets = rows(50, 20)
    beta = torch.zeros((), device=DEVICE)
    for number in (8.0, 0.0):
        beta.fill_(number)
        for one, other in zip(run(z, v, targets, MIX._replace(nckd=beta)), run(z, v, targets, MIX._replace(nckd=number))):
            assert torch.equal(one, other)


def test_strided_rows(kernel):
    z, v, targets = on_device(*rows(9, 11))
    wide, transposed = torch.randn(9, 40, device=z.device), v.T.contiguous().T
    wide[:, 3:14] = z
    every_third = torch.randn(9, 40, device=z.device)
    every_third[:, 3:36:3] = z
    plain = run(z, v, targets)
    for student in (wide[:, 3:14], every_third[:, 3:36:3]):
        assert not student.is_contiguous() and not transposed.is_contiguous()
        for one, two in zip(run(student, transposed, targets), plain):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_bits_do_not_depend_on_the_run_or_the_number_of_programs(monkeypatch, reverse):
    z, v, targets = on_device(*rows(*((20, 20) if DEVICE == "cpu" else (70, 100))))
    hyper = hyperparameters(Weights(0.7, 0.3), 4.0, 0.1, z.device)

    def launch(tile_rows):
        monkeypatch.setattr(op, "tile_for", lambda *_: Tile(tile_rows, lanes=8, chunks=4, warps=1, registers=255))
        return op.softmax_kl_triton(z, v, *targets, hyper, terms=MIX.terms, split="pair", reverse=reverse)

    sizes = (8, 64) if DEVICE == "cpu" else (1, 4, 8)
    smallest = launch(sizes[0])
    for tile_rows in sizes:
        first = launch(tile_rows)
        for _ in range(1 if DEVICE == "cpu" else 1000):
            assert all(torch.equal(one, two) for one, two in zip(launch(tile_rows), first))
        # On a GPU another tile is another compiled kernel, which may sum the classes of a row in another order.
        assert DEVICE == "cuda" or all(torch.equal(one, two) for one, two in zip(first, smallest))


@combined(split=["pair", "dominant", "reverse"], column=[2, 5], bad=[float("nan"), INF], of_teacher=[False, True])
def test_a_loss_is_not_finite_where_its_gradient_is_not(kernel, split, column, bad, of_teacher):
    """Column 2 is a target, 5 is not."""
    weights, how = of_split(split)
    weights = weights._replace(ce=None)
    z, v = (torch.randn(3, 10, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    (v if of_teacher else z)[1, column] = bad
    z, v, targets = on_device(z, v, (torch.tensor([1, 2, 3]), torch.tensor([1, 4, 3]), torch.tensor([1.0, 0.6, 1.0])))
    loss, _ = softmax_kl(z.requires_grad_(), v, *targets, weights, temperature=4.0, **how)
    loss.backward()
    assert not z.grad.isfinite().all() and not loss.isfinite()


def test_a_second_derivative_is_refused(kernel):
    z, v = torch.randn(2, 5, device=DEVICE, requires_grad=True), torch.randn(2, 5, device=DEVICE)
    label = torch.tensor([1, 2], device=DEVICE)
    loss, _ = softmax_kl(z, v, label, label, torch.ones(2, device=DEVICE), MIX, temperature=4.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


@pytest.mark.parametrize("choice", ["reference", "triton"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_operator_is_sound(choice, reverse):
    """Its fake form is right and it mutates nothing; that autograd and the compiler go with it shows below."""
    z, v, targets = on_device(*rows(6, 20))
    arguments = (z, v, *targets, hyperparameters(MIX, 4.0, 0.1, z.device), MIX.terms, "pair", reverse,
                 class_weights_for(20).to(DEVICE) if reverse else None)
    kernels.choose(choice)
    try:
        torch.library.opcheck(torch.ops.fusekd.softmax_kl.default, arguments, test_utils=("test_schema", "test_faketensor"))
    finally:
        kernels.choose("auto")


def test_a_step_compiles_as_one_graph():
    z, v, targets = on_device(*rows(6, 20))
    torch.manual_seed(0)
    net = torch.nn.Linear(20, 20, device=DEVICE)

    def step(x):
        loss, terms = softmax_kl(net(x), v, *targets, MIX, temperature=4.0)
        return 0.5 * loss, terms

    results = []
    for run_step in (step, torch.compile(step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")):
        net.zero_grad()
        loss, terms = run_step(z)
        loss.backward()
        results.append((loss.detach(), terms, net.weight.grad.clone()))
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_rows_beyond_32_bit_offsets():
    """Three rows 2^30 elements apart; the pages between them are never touched."""
    stride = 2**30 + 16
    far = torch.empty(2 * stride + 10, dtype=torch.float16, device=DEVICE).as_strided((3, 10), (stride, 1))
    z, v, targets = rows(3, 10, dtype=torch.float16)
    far.copy_(z)
    hyper = hyperparameters(MIX, 4.0, 0.0, torch.device(DEVICE))
    targets = Targets(*(part.to(DEVICE) for part in targets))
    for one, two in zip(*(op.softmax_kl_triton(x, v.to(DEVICE), *targets, hyper, terms=MIX.terms, split="pair", reverse=False)
                          for x in (far, z.to(DEVICE)))):
        assert torch.equal(one, two)


def test_who_decides(monkeypatch):
    tensor = torch.zeros(1)
    assert not kernels.use_triton(tensor), "auto leaves CPU tensors to the CPU path"
    try:
        kernels.choose("triton")
        assert kernels.use_triton(tensor) == kernels.interpreted()
        kernels.choose("reference")
        assert not kernels.use_triton(tensor)
    finally:
        kernels.choose("auto")
    with pytest.raises(ValueError, match="cuda"):
        kernels.choose("cuda")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_graph_follows_its_inputs_and_numbers():
    z, v, targets = on_device(*rows(64, 100))
    beta = torch.tensor(8.0, device=DEVICE)

    def call():
        hyper = hyperparameters(MIX._replace(nckd=beta), 4.0, 0.1, z.device)
        return torch.ops.fusekd.softmax_kl(z, v, *targets, hyper, MIX.terms, "pair", False)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        losses, grad = call()
    for scale in (1.0, 0.5):
        z.mul_(scale)
        beta.mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        for one, two in zip((losses, grad), call()):
            assert torch.equal(one, two)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_other_weights_compile_nothing(monkeypatch):
    z, v, targets = rows(16, 100)
    run(z, v, targets)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **_: pytest.fail("the kernel is compiled again"))
    for beta in (1.0, 2.5, 8.0):
        run(z, v, targets, Weights(1.0, 0.0, 1.0, beta), temperature=beta)
