"""The fused augmentation equals its plain-PyTorch reference bit for bit; on CPU tensors in Triton's interpreter, on a GPU
compiled."""
import itertools

import pytest
import torch
from test_augment import AS_IS, PLAIN, UNMIXED, everything, pictures

import kernels
from augment import POLICIES, BatchAugmenter
from kernels import augment as op
from kernels.augment_constants import KINDS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ODD = {32: 513, 64: 257} if ON_GPU else {32: 25, 64: 9}  # a batch: the interpreter takes 30 to 60 ms for an image
TRAINING = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


def make(kernel, images, labels=None, device=DEVICE, **options):
    """An augmenter by "triton" or by "reference"; three images to a label, so that partners may be of one class."""
    labels = torch.arange(len(images)) // 3 if labels is None else labels
    kernels.choose(kernel)
    try:
        ours = BatchAugmenter(images.to(device), labels.to(device), **({"batch_size": 8, "seed": 3} | TRAINING | options))
    finally:
        kernels.choose("auto")
    assert ours.fused == (kernel == "triton")
    return ours


def references_of(images, **options):
    """The reference on the CPU and, where there is one, on the GPU."""
    return [make("reference", images, device=device, **options) for device in dict.fromkeys(["cpu", DEVICE])]


def assert_equal(batch, expected, about=""):
    for name, ours, theirs in zip(("images", "label", "other", "lam"), (batch.images, *batch.targets),
                                  (expected.images, *expected.targets)):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), f"{about} {name}"
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[ours.element_size()]
        wrong = (ours.cpu().view(bits) != theirs.cpu().view(bits)).flatten(1 if ours.dim() > 1 else 0)
        rows = wrong.any(1).nonzero().flatten().tolist() if wrong.dim() > 1 else wrong.nonzero().flatten().tolist()
        assert not rows, f"{about} {name}: {wrong.sum()} of {wrong.numel()} differ, in rows {rows}"


def compare(images, epochs=(0,), steps=None, **options):
    ours, references = make("triton", images, **options), references_of(images, **options)
    for epoch in epochs:
        for one in (ours, *references):
            one.set_epoch(epoch)
        for step, reference in itertools.product(steps or range(ours.steps), references):
            assert_equal(ours(step), reference(step), f"epoch {epoch}, step {step}:")
    return references[0]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy(policy, size):
    compare(pictures(ODD[size], size), batch_size=ODD[size], policy=policy, mix_mode="elem", random_erasing=0.5)


@pytest.mark.parametrize("size", [32, 64])
def test_every_operation(monkeypatch, size):
    """Alone and as the first and second of two, at low and high magnitudes of both signs."""
    def pairs(size):
        by_name = {}
        for (operation,) in everything(size):
            by_name.setdefault(operation[0], []).append(operation)
        chosen = [operation for operations in by_name.values() for operation in operations[4::5] or operations]
        return list(zip(chosen, chosen[1:] + chosen[:1]))

    monkeypatch.setitem(POLICIES, "everything", pairs)
    options = {"batch_size": 1024 if ON_GPU else 96, "policy": "everything"} | UNMIXED
    images = pictures(options["batch_size"], size)
    reference = make("reference", images, **options)
    positions, codes = torch.arange(len(images), device=DEVICE), {*range(1, len(reference.sampler.policy.operations))}
    epoch = next(epoch for epoch in range(100) if codes <= {*reference.sampler.images(epoch, positions).codes.flatten().tolist()})
    assert len(codes) == 43 and {*reference.sampler.policy.kind.tolist()} == {*range(len(KINDS))}
    compare(images, epochs=(epoch,), **options)


def test_flat_channels(monkeypatch):
    """Those have no range to stretch and nothing to equalize; padding would hide it."""
    monkeypatch.setitem(POLICIES, "flat", lambda size: [((name, 1.0, 0.0, False),) for name in ("AutoContrast", "Equalize")])
    images = pictures(16)
    images[:8] = torch.randint(1, 255, (8, 1, 1, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images[8:12, ..., 1] = 77
    compare(images, batch_size=16, **(PLAIN | {"policy": "flat"}))


MIXES = {"both": {}, "mixup": {"cutmix": 0.0}, "cutmix": {"mixup": 0.0}, "half": {"mix_prob": 0.5}, "off": UNMIXED,
         "nearly 0 or 1": {"mixup": 0.01, "cutmix": 0.0}}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_every_way_of_mixing(mode, mix):
    """With batches of both parities, the last row of an odd one unmixed, and boxes of zeros under what is mixed."""
    for batch_size, steps in ((5, [0, 2]), (4, [1])):
        compare(pictures(15), steps=steps, batch_size=batch_size, policy="none", random_erasing=0.8, mix_mode=mode, **MIXES[mix])


@pytest.mark.parametrize("change", [
    {"crop_pad": 0}, {"crop_pad": 17}, {"flip": False}, {"random_erasing": 0.0}, {"random_erasing": 1.0}, AS_IS,
    {"seed": -1}, {"seed": 2 ** 63}, {"seed": 2 ** 64 + 5}, {"seed": 0x1234567 << 32 | 0xFEEDBEEF},
])
def test_every_setting(change):
    compare(pictures(6), epochs=(1, 2 ** 32 - 2), batch_size=3, steps=[1], policy="none", **change)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    not ON_GPU, reason="the interpreter truncates to bfloat16 where a GPU rounds"))])
@pytest.mark.parametrize("size", [32, 64])
def test_half_precision(size, dtype):
    compare(pictures(ODD[size], size), batch_size=ODD[size], dtype=dtype, mix_mode="elem")


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("batch_size, cuts", [(16, [0, 8, 16]), (9, [0, 2, 8, 9])])
def test_parts_of_a_batch_equal_the_whole(mode, batch_size, cuts):
    ours = make("triton", pictures(36), batch_size=batch_size, mix_mode=mode, policy="none")
    whole, step = ours(1), torch.tensor(1, device=DEVICE)
    parts = [ours(step, range(start, stop)) for start, stop in zip(cuts, cuts[1:])]
    assert all(len(part.images) == stop - start for part, start, stop in zip(parts, cuts, cuts[1:]))
    joined = [torch.cat(columns) for columns in zip(*((part.images, *part.targets) for part in parts))]
    for one, two in zip(joined, (whole.images, *whole.targets)):
        assert torch.equal(one, two)


def test_far_into_a_large_epoch():
    """Beyond the 2^31st byte of the images, whose other pages are never touched, and at the last position."""
    count = 2 ** 31 // 3072 + 1000
    images = torch.empty(count, 32, 32, 3, dtype=torch.uint8, device=DEVICE)
    ours = make("triton", images, torch.arange(count), batch_size=2, **PLAIN)
    order = ours.sampler.order(0, count).view(-1, 2)
    for step in (int((order.max(1)[0] > 2 ** 31 // 3072).nonzero()[0]), count // 2 - 1):
        images[order[step].to(DEVICE)] = pictures(2).to(DEVICE)
        batch = ours(step)
        assert torch.equal(batch.targets.label.cpu(), order[step])
        assert torch.equal((batch.images.cpu() * 255).round().byte(), pictures(2).permute(0, 3, 1, 2))


@pytest.mark.parametrize("begin", [1, 4])
def test_images_may_be_a_part_of_other_memory(begin):
    """One that begins within a word or with one: the kernel reads whole words."""
    images, memory = pictures(6), torch.zeros(begin + 6 * 3072, dtype=torch.uint8, device=DEVICE)
    memory[begin:] = images.flatten().to(DEVICE)
    compare(memory[begin:].view_as(images), batch_size=6, policy="none")


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_a_step_may_be_a_tensor(kernel):
    ours, step = make(kernel, pictures(24), policy="none"), torch.tensor(0, device=DEVICE)
    for number in range(ours.steps):
        assert_equal(ours(step), ours(number))
        step += 1
    for wrong in (torch.tensor(0, dtype=torch.int32), torch.tensor([0])):
        with pytest.raises(ValueError, match="0-dim torch.int64"):
            ours(wrong)
    with pytest.raises(IndexError):
        ours(ours.steps)


def test_an_epoch_is_only_uploaded(monkeypatch):
    ours = make("triton", pictures(16))
    tables, before = ours._batches.tables, [table.clone() for table in ours._batches.tables]
    for drawn in ("images", "mixes"):
        monkeypatch.setattr(ours.sampler, drawn, lambda *arguments: pytest.fail("drawn on the host"))
    ours.set_epoch(4)
    ours(1)
    changed = [name for name, old, new in zip(tables._fields, before, ours._batches.tables) if not torch.equal(old, new)]
    assert changed == ["order", "numbers"] and tables.numbers[op.EPOCH.value] == 4
    assert all(old is new for old, new in zip(tables, ours._batches.tables)), "a captured graph would not follow"


def test_descriptions_are_those_of_the_reference():
    images = pictures(14)
    ours, reference = make("triton", images, batch_size=7), make("reference", images, batch_size=7)
    for epoch in (0, 3):
        ours.set_epoch(epoch)
        reference.set_epoch(epoch)
        assert [ours.describe(step) for step in (0, 1)] == [reference.describe(step) for step in (0, 1)]


def test_other_sizes_fall_back_with_one_sentence(capsys):
    images = pictures(4, 24)
    expected = make("reference", images, batch_size=2)(1)
    kernels.choose("triton")
    try:
        ours = [BatchAugmenter(images.to(DEVICE), (torch.arange(4) // 3).to(DEVICE), batch_size=2, seed=3, **TRAINING)
                for _ in range(2)]
    finally:
        kernels.choose("auto")
    said = capsys.readouterr().out.splitlines()
    assert said == ["images of 24x24 are augmented in plain PyTorch: the fused kernel takes 32x32 and 64x64"]
    assert not ours[0].fused
    assert_equal(ours[1](1), expected)


def test_auto_leaves_cpu_tensors_to_the_reference():
    assert not BatchAugmenter(pictures(4), torch.arange(4), batch_size=2, seed=0, **TRAINING).fused
    if ON_GPU:
        assert BatchAugmenter(pictures(4).cuda(), torch.arange(4).cuda(), batch_size=2, seed=0, **TRAINING).fused


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_captured_graph_counts_its_own_steps_and_follows_the_epoch():
    images, options = pictures(96), {"batch_size": 15, "dtype": torch.float16}
    ours, reference = make("triton", images, **options), make("reference", images, **options)
    step, stream = torch.zeros((), dtype=torch.int64, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        batch = ours(step)
        step += 1
    for epoch in (0, 2):
        ours.set_epoch(epoch)
        reference.set_epoch(epoch)
        step.zero_()
        for number in range(ours.steps):
            graph.replay()
            assert_equal(batch, reference(number), f"epoch {epoch}, step {number}:")


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_step_is_one_launch_and_never_waits():
    ours = make("triton", pictures(64))
    ours(0)
    cache = op._augment_kernel.device_caches[torch.cuda.current_device()][0]
    compiled = len(cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for step in range(ours.steps):
                ours(step, range(2, 8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The profile also has what the CPU did for each launch.
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(ran) == ours.steps and all("augment" in name for name in ran), ran
    assert len(cache) == compiled, "odd steps, other rows or another alignment compiled the kernel again"
