"""The CPU path and the kernels make the batches of the specification, bit for bit.

Without a GPU the kernels run in Triton's interpreter on CPU tensors; where there is one, these tests run the compiled kernels.
"""
import itertools

import pytest
import torch
import triton
from kernel_cases import DEVICE, PLAIN, TRAINING, UNMIXED, augmenter, differing, everything, pictures, specified

import kernels
from augment import POLICIES, BatchAugmenter
from kernels.augment_constants import KINDS

ON_GPU = torch.cuda.is_available()
ODD = 5  # images in a batch of the interpreter, which takes 30 to 60 ms for one


@pytest.fixture(params=["reference", "triton"])
def kernel(request):
    return request.param


def compare(kernel, images, epochs=(0,), steps=None, **options):
    """The CPU path runs on the GPU, too, where there is one."""
    for device in dict.fromkeys([DEVICE, "cpu"]) if kernel == "reference" else [DEVICE]:
        ours = augmenter(images, kernel, device=device, **options)
        assert ours.fused == (kernel == "triton")
        for epoch in epochs:
            ours.set_epoch(epoch)
            for step in steps or range(ours.steps):
                wrong = differing(ours(step), specified(images, epoch, step, **options))
                assert not wrong, f"{device}, epoch {epoch}, step {step}: {wrong} numbers differ"


# Every policy, size and type, though not each with each.
@pytest.mark.parametrize("policy, size, dtype, mode", [
    (policy, size, dtype, mode)
    for (policy, size), dtype, mode in zip(itertools.product(POLICIES, (32, 64)),
                                           itertools.cycle([torch.float32, torch.float16, torch.bfloat16]),
                                           itertools.cycle(["elem", "elem", "batch"]))])
def test_every_policy(kernel, policy, size, dtype, mode):
    if kernel == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        dtype = torch.float16  # the interpreter truncates to bfloat16 where a GPU rounds
    count = ODD if kernel == "triton" and not ON_GPU else 257
    compare(kernel, pictures(count, size), batch_size=count, policy=policy, mix_mode=mode, random_erasing=0.5, dtype=dtype)


@pytest.mark.parametrize("size", [32, 64, 20, 17])
def test_every_operation(kernel, size, monkeypatch):
    """Alone and as the first and second of two; on the CPU path at every magnitude, else at low and high ones of both signs, or
    beyond 32 pixels, where the kernel is the same, and in two launches at high ones."""
    if size == (17 if kernel == "triton" else 20):
        pytest.skip("the kernels take multiples of 4, and the CPU path any")

    def pairs(size):
        by_name = {}
        for (operation,) in everything(size):
            by_name.setdefault(operation[0], []).append(operation)
        step = 1 if kernel == "reference" else 5 if size == 32 else 10
        chosen = [operation for operations in by_name.values() for operation in operations[step - 1::step] or operations]
        return list(zip(chosen, chosen[1:] + chosen[:1]))

    monkeypatch.setitem(POLICIES, "everything", pairs)
    images = pictures(1000 if kernel == "reference" else 1024 if ON_GPU else 64 if size == 32 else 24, size)
    options = {"batch_size": len(images), "policy": "everything"} | UNMIXED
    ours = augmenter(images, **options)
    positions, codes = torch.arange(len(images)), {*range(1, len(ours.sampler.policy.operations))}
    epoch = next(epoch for epoch in range(100) if codes <= {*ours.sampler.images(epoch, positions).codes.flatten().tolist()})
    assert len(codes) == (189 if kernel == "reference" else 43 if size == 32 else 23)
    assert {*ours.sampler.policy.kind.tolist()} == {*range(len(KINDS))}
    compare(kernel, images, epochs=(epoch,), **options)


@pytest.mark.parametrize("size", [32, 20])
def test_flat_channels(kernel, size, monkeypatch):
    """Those have no range to stretch and nothing to equalize; padding would hide it."""
    monkeypatch.setitem(POLICIES, "flat", lambda size: [((name, 1.0, 0.0, False),) for name in ("AutoContrast", "Equalize")])
    images = pictures(16, size)
    images[:8] = torch.randint(1, 255, (8, 1, 1, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images[8:12, ..., 1] = 77
    compare(kernel, images, batch_size=16, **(PLAIN | {"policy": "flat"}))


MIXES = {"both": {}, "mixup": {"cutmix": 0.0}, "cutmix": {"mixup": 0.0}, "half": {"mix_prob": 0.5}, "off": UNMIXED,
         "nearly 0 or 1": {"mixup": 0.01, "cutmix": 0.0}}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_every_way_of_mixing(kernel, mode, mix):
    """With batches of both parities, one of them a case in the interpreter; the last row of an odd one is unmixed.  Boxes
    of zeros lie under what is mixed."""
    parities, turn = ((5, [2]), (4, [1])), (list(MIXES).index(mix) + (mode == "elem")) % 2
    for batch_size, steps in parities if kernel == "reference" or ON_GPU else parities[turn:][:1]:
        compare(kernel, pictures(15), steps=steps, batch_size=batch_size, policy="none", random_erasing=0.8, mix_mode=mode,
                **MIXES[mix])


@pytest.mark.parametrize("change", [
    {"crop_pad": 0, "seed": -1}, {"crop_pad": 17, "random_erasing": 0.0}, {"flip": False, "seed": 2 ** 63},
    {"random_erasing": 1.0, "seed": 2 ** 64 + 5}, {"mean": (0.0,) * 3, "std": (1.0,) * 3, "seed": 0x1234567 << 32 | 0xFEEDBEEF}])
def test_every_setting(kernel, change):
    compare(kernel, pictures(6), epochs=(1, 2 ** 32 - 2), batch_size=3, steps=[1], policy="none", **change)


@pytest.mark.parametrize("size, stored, options", [
    (32, 36, {"mix_mode": "elem", "policy": "autoaugment-imagenet"}), (64, 72, {"flip": False}), (32, 20, {"scale": (1.0, 1.0)}),
    (17, 25, {"policy": "randaugment"}), (20, 24, {"policy": "autoaugment"}),
    (32, 32, {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)})])
def test_windows_that_are_resized(kernel, size, stored, options):
    """Down and up; on the CPU path to every size; a whole image of the size of the result stays as it is."""
    if kernel == "triton" and size == 17:
        pytest.skip("the kernels make multiples of 4")
    count = 2 if kernel == "triton" and not ON_GPU else 66
    options = {"policy": "none", "crop": "resized", "image_size": size, "batch_size": count, "random_erasing": 0.5} | options
    compare(kernel, pictures(count, stored), **options)


def test_resized_windows_are_those_of_torch_to_one_level():
    """Of F.interpolate in float32, whose places are not rounded to 256ths of a pixel."""
    images = pictures(22, 40)
    ours = augmenter(images, batch_size=22, **(PLAIN | {"crop": "resized", "image_size": 24}))
    draws = ours.sampler.images(0, torch.arange(22))
    for image, result, top, left, height, width in zip(images[ours.sources(0)], ours(0).images * 255, *draws[:4]):
        window = image[top:top + height, left:left + width].permute(2, 0, 1)[None].float()
        (expected,) = torch.nn.functional.interpolate(window, (24, 24), mode="bilinear")
        assert (result - expected).abs().max() < 0.5 + 255 * 2 * 0.5 / 256


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("batch_size, cuts, size", [(9, [0, 2, 8, 9], 32), (5, [0, 2, 4, 5], 20)])
def test_parts_of_a_batch_equal_the_whole(kernel, mode, batch_size, cuts, size, monkeypatch):
    """Also of one that the CPU path takes in blocks; and a step may be a tensor."""
    images = pictures(36, size)
    ours, options = augmenter(images, kernel, batch_size=batch_size, mix_mode=mode, policy="none"), {"device": DEVICE}
    if kernel == "reference":
        monkeypatch.setattr("augment.cpu.CPU_BLOCK", 4 * 32 * 32)
        options = {}
    parts = [ours(torch.tensor(1, **options), range(start, stop)) for start, stop in zip(cuts, cuts[1:])]
    assert [len(part.images) for part in parts] == [stop - start for start, stop in zip(cuts, cuts[1:])]
    expected = specified(images, 0, 1, batch_size=batch_size, mix_mode=mode, policy="none")
    for column, pieces in zip(expected, zip(*((part.images, *part.targets) for part in parts))):
        assert torch.equal(torch.cat(pieces).cpu(), column)
    for wrong in (torch.tensor(0, dtype=torch.int32), torch.tensor([0])):
        with pytest.raises(ValueError, match="0-dim torch.int64"):
            ours(wrong)


def test_far_into_a_large_epoch():
    """Beyond the 2^31st byte of the images, whose other pages are never touched, and at the last position."""
    count = 2 ** 31 // 3072 + 1000
    images = torch.empty(count, 32, 32, 3, dtype=torch.uint8, device=DEVICE)
    ours = augmenter(images, "triton", torch.arange(count), batch_size=2, **PLAIN)
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
    batch = augmenter(memory[begin:].view_as(images), "triton", batch_size=6, policy="none")(0)
    assert not differing(batch, specified(images, 0, 0, batch_size=6, policy="none"))


def test_rows_choose_among_more_images(kernel):
    images, labels, rows = pictures(12), torch.tensor([4, 0, 2, 1, 3]), torch.tensor([7, 2, 11, 3, 5])
    few, chosen = (augmenter(each, kernel, labels, batch_size=4, rows=part)
                   for each, part in ((images[rows], None), (images, rows)))
    assert few.steps == chosen.steps == 1 and few.sources(0).tolist() == chosen.sources(0).tolist()
    one, other = few(0), chosen(0)
    assert torch.equal(one.images, other.images) and all(map(torch.equal, one.targets, other.targets))


def test_other_sizes_take_the_cpu_path_and_say_so_once(capsys):
    images = pictures(4, 18)
    kernels.choose("triton")
    try:
        ours = [BatchAugmenter(images.to(DEVICE), (torch.arange(4) // 3).to(DEVICE), batch_size=2, seed=3, **TRAINING)
                for _ in range(2)]
    finally:
        kernels.choose("auto")
    (said,) = capsys.readouterr().out.splitlines()
    assert all(number in said for number in ("18x18", "8", "256", "4"))
    assert not ours[0].fused and not differing(ours[1](1), specified(images, 0, 1, batch_size=2))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("size", [32, 40])
def test_a_captured_graph_counts_its_own_steps_and_follows_the_epoch(size):
    images, options = pictures(96, size), {"batch_size": 15, "dtype": torch.float16}
    ours = augmenter(images, "triton", **options)
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
        step.zero_()
        for number in range(ours.steps):
            graph.replay()
            assert not differing(batch, specified(images, epoch, number, **options))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("size, launches", [(32, 1), (40, 2)])
def test_a_step_is_few_launches_and_never_waits(size, launches, monkeypatch):
    ours = augmenter(pictures(64, size), "triton")
    ours(0)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **_: pytest.fail("the kernel is compiled again"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for step in range(ours.steps):
                ours(step, range(2, 8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The profile also has what the CPU did for each launch.
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(ran) == launches * ours.steps and all("augment" in name for name in ran), ran
