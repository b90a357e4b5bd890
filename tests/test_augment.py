"""What is drawn and which images are taken; the policies are torchvision's.  The arithmetic: test_augment_kernel.py."""
import math

import pytest
import torch
from kernel_cases import PLAIN, TRAINING, UNMIXED, pictures
from kernel_cases import augmenter as make
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    TrivialAugmentWide,
)

from augment import POLICIES
from augment.policy import build_tables
from augment.sampling import Sampler, beta_quantiles, erase_sizes, philox
from kernels.augment_constants import POLICY


def augmenter(images, labels=None, batch_size=16, **options):
    labels = torch.arange(len(images)) if labels is None else labels
    return make(images, labels=labels, batch_size=batch_size, **options)


def epoch(augmented):
    """All batches of the epoch, one after the other: images, label, other, lam."""
    batches = [augmented(step) for step in range(augmented.steps)]
    return [torch.cat(column) for column in zip(*((batch.images, *batch.targets) for batch in batches))]


def bytes_of(images):
    return (images * 255).round().to(torch.uint8)


def in_order(augmented, images):
    """The images of the epoch as (count, 3, size, size), and all that was drawn for them."""
    count = augmented.steps * augmented.batch_size
    images = images[augmented.sampler.order(0, len(images))[:count]].permute(0, 3, 1, 2).contiguous()
    return images, augmented.sampler.images(0, torch.arange(count))


def torchvision_policy(policy):
    """torchvision's transform and what it draws, from a sub-policy, two probabilities and two signs, as (number, limit) in
    turn."""
    if policy.startswith("autoaugment"):
        data = policy.removeprefix("autoaugment").removeprefix("-") or "cifar10"
        return AutoAugment(AutoAugmentPolicy(data)), None
    space = RandAugment()._augmentation_space(31, (32, 32))  # which of the operations have a sign, and which a magnitude
    names, signed = list(space), [signed for _, signed in space.values()]
    if policy == "randaugment":
        def draws(subpolicy, signs):
            for slot, number in enumerate(divmod(subpolicy, 14)):
                yield number, 14
                if signed[number]:
                    yield 1 - signs[slot], 2  # theirs is negative for 1
        return RandAugment(), draws

    def draws(subpolicy, signs):
        number, level = divmod(subpolicy, 31)
        yield number, 14
        if space[names[number]][0].ndim:
            yield level, 31
        if signed[number]:
            yield 1 - signs[0], 2
    return TrivialAugmentWide(), draws


def whole_policy(images, policy="autoaugment"):
    """Ours and torchvision's result of a policy under the same draws."""
    ours = augmenter(images, **(PLAIN | {"policy": policy}))
    originals, _ = in_order(ours, images)
    subpolicies, *chances, signs = philox(ours.sampler.seed, torch.arange(len(originals)), 0, POLICY, 0)
    subpolicies = (subpolicies * len(ours.sampler.policy.codes) >> 32).tolist()
    theirs, draws = torchvision_policy(policy)
    expected = []
    for row, (image, subpolicy) in enumerate(zip(originals, subpolicies)):
        both = [int(signs[row]) & 1, int(signs[row]) >> 1 & 1]
        if draws:
            following = draws(subpolicy, both)

            def randint(limit, shape, dtype=None):
                number, of = next(following)
                assert of == limit
                return torch.tensor([number])

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randint", randint)
                expected.append(theirs(image))
            assert not list(following)
        else:
            theirs.get_params = lambda transform_num: (subpolicy, [chance[row] / 2 ** 32 for chance in chances], both)
            expected.append(theirs(image))
    return bytes_of(epoch(ours)[0]), torch.stack(expected), originals


@pytest.mark.parametrize("policy, size", [(policy, 32) for policy in POLICIES if policy != "none"] + [("randaugment", 17)])
def test_policy_equals_torchvision_under_the_same_draws(size, policy):
    result, expected, originals = whole_policy(pictures(304, size), policy)
    wrong = (result != expected).sum()
    assert wrong == 0, f"{wrong} of {expected.numel()} bytes differ"
    changed = (expected != originals).flatten(1).any(1).float().mean()
    assert 0.5 < changed < 1, f"{changed:.2f} of the images changed"


def test_label_weight_is_the_share_of_pixels():
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 32, 32, 3).contiguous()
    ours = augmenter(images, batch_size=10, mix_mode="elem", **(PLAIN | {"cutmix": 1.0}))
    ours.set_epoch(1)
    result, label, other, lam = epoch(ours)
    share = (bytes_of(result)[:, 0] == label.view(-1, 1, 1)).float().mean((1, 2))
    assert torch.equal(share, lam), f"off by up to {(share - lam).abs().max():.4f}"
    rest = (bytes_of(result)[:, 0] == other.view(-1, 1, 1)).float().mean((1, 2))
    assert torch.equal(torch.where(lam < 1, rest, 0), 1 - lam)
    assert len(lam.unique()) > 50 and lam.min() < 0.3


@pytest.mark.parametrize("rows", [range(1, 16), range(0, 15), range(0, 18), range(-2, 4), range(0, 16, 2)])
def test_rows_that_split_pairs_are_refused(rows):
    with pytest.raises(ValueError, match="whole pairs"):
        augmenter(pictures(32))(0, rows)


def test_draws_depend_on_seed_epoch_and_position_alone():
    images = pictures(96)
    first = augmenter(images)
    reference = epoch(first)
    first(5)  # an order of calls that no other augmenter of this test has
    first.set_epoch(7)
    assert not torch.equal(epoch(first)[0], reference[0])
    first.set_epoch(0)
    state = torch.random.get_rng_state()
    again = epoch(first)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(12345)
    backwards = [augmenter(images)(step) for step in range(5, -1, -1)]
    for expected, column, replayed in zip(reference, again, zip(*((batch.images, *batch.targets) for batch in backwards))):
        assert torch.equal(column, expected) and torch.equal(torch.cat(replayed[::-1]), expected)
    unmixed = [epoch(augmenter(images, batch_size=size, **UNMIXED))[0] for size in (16, 8, 96)]
    assert torch.equal(unmixed[0], unmixed[1]) and torch.equal(unmixed[0], unmixed[2]), "an image depends on the batch size"
    torch.random.set_rng_state(state)


def test_order_covers_every_image_and_differs_by_seed_and_epoch():
    images = torch.zeros(300, 8, 8, 3, dtype=torch.uint8)
    seen = {}
    for seed in (0, 1, 2, 2 ** 32, -1):
        ours = augmenter(images, batch_size=100, seed=seed, **UNMIXED)
        for number in range(4):
            ours.set_epoch(number)
            labels = epoch(ours)[1]
            assert torch.equal(labels.sort()[0], torch.arange(300))
            seen[seed, number] = tuple(labels.tolist())
    assert len(set(seen.values())) == len(seen), "two of (seed, epoch) have the same order"


def test_an_incomplete_batch_is_dropped():
    ours = augmenter(torch.zeros(50, 8, 8, 3, dtype=torch.uint8), batch_size=16, **UNMIXED)
    labels = epoch(ours)[1]
    assert ours.steps == 3 and len(labels) == len(labels.unique()) == 48
    with pytest.raises(IndexError, match="no such step in the epoch .3."):
        ours(3)


def test_batch_layout():
    batch = augmenter(pictures(32), batch_size=5)(1)
    assert batch.images.shape == (5, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert [column.dtype for column in batch.targets] == [torch.int64, torch.int64, torch.float32]


def test_philox_gives_the_vectors_of_random123():
    for counter, key, expected in [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 2 ** 64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]:
        for as_type in (int, torch.tensor):
            words = philox(key, *(as_type(word) for word in counter))
            assert " ".join(f"{int(word):08x}" for word in words) == expected


def sampler(**options):
    defaults = {"seed": 11, "crop_pad": 4, "flip": True, "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0}
    return Sampler(32, build_tables("autoaugment", 32), **(defaults | options))


COUNT = 200_000  # so that five deviations of a share are 0.006 at most


def near(share, expected):
    assert abs(float(share) - expected) < 0.006, f"{float(share):.4f}, expected {expected}"


def test_image_draws_have_the_stated_frequencies():
    drawn = sampler()
    draws = drawn.images(2, torch.arange(COUNT))
    near(draws.mirror.float().mean(), 0.5)
    corners = torch.bincount(draws.top * 9 + draws.left, minlength=81) / COUNT
    assert corners.shape == (81,) and (corners - 1 / 81).abs().max() < 0.002, "crops are not uniform"
    near((draws.erased[:, 2] > draws.erased[:, 0]).float().mean(), 0.25)
    assert draws.erased.min() == 0 and draws.erased.max() == 32
    counts = torch.bincount(draws.codes.flatten(), minlength=len(drawn.policy.operations)) / COUNT
    expected = dict.fromkeys(drawn.policy.operations, 0.0)
    for subpolicy in POLICIES["autoaugment"](32):
        for name, probability, magnitude, signed in subpolicy:
            for value in (magnitude, -magnitude if signed else magnitude):
                expected[name, value] += probability / 50
    for (operation, share), count in list(zip(expected.items(), counts))[1:]:
        assert abs(count - share) < 0.004, f"{operation}: {count:.4f}, expected {share:.4f}"


@pytest.mark.parametrize("kind, scale, ratio, size", [
    ("window", (0.08, 1.0), (0.75, 1.3333), 256), ("window", (0.9, 1.0), (0.5, 2.0), 36), ("window", (1.0, 1.0), (1.0, 1.0), 20),
    ("window", (0.3, 0.6), (2.0, 3.0), 50), ("erased", (0.02, 0.33), (0.3, 3.3), 32)])
def test_boxes_are_distributed_as_those_of_torchvision(kind, scale, ratio, size):
    """With scales near 1 most windows do not fit, and after ten torchvision takes the largest."""
    positions, image = torch.arange(COUNT // 4), torch.empty(3, size, size)
    if kind == "window":
        draws = sampler(stored=size, scale=scale, ratio=ratio).images(0, positions)
        top, left, height, width = draws[:4]
    else:
        top, left, bottom, right = sampler(random_erasing=1.0).images(0, positions).erased.unbind(1)
        height, width = bottom - top, right - left
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) if kind == "window" else
                  RandomErasing.get_params(image, scale, ratio, [0.0])[:4] for _ in range(5000)]

    def facts(top, left, height, width):
        return {"height": height / size, "width": width / size, "area": height * width / size ** 2,
                "ratio": (width / height).log(), "bottom": (top + height) / size}

    assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= size).all() and (left + width <= size).all()
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    found, wanted = facts(top, left, height, width), facts(*torch.tensor(theirs).float().unbind(1))
    for name, values in wanted.items():
        gap = max(abs(found[name].mean() - values.mean()), (found[name].quantile(levels) - values.quantile(levels)).abs().max())
        assert gap < 0.035, f"{name}: {found[name].quantile(levels)}, torchvision {values.quantile(levels)}"
    for corner, free in ((top, size - height), (left, size - width)):  # uniform from 0 to `free`, both included
        near((corner / free)[free > 0].mean() if (free > 0).any() else 0.5, 0.5)
        near((corner == free).float().mean(), (1 / (free + 1)).mean())


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0, 2000.0])
def test_beta_quantiles(alpha):
    quantiles = beta_quantiles(alpha)
    assert len(quantiles) == 4096 and (quantiles.diff() >= 0).all()
    torch.testing.assert_close(quantiles, 1 - quantiles.flip(0), rtol=0, atol=1e-6)
    if alpha == 1.0:
        torch.testing.assert_close(quantiles, (torch.arange(4096) + 0.5) / 4096, rtol=0, atol=1e-6)
    mean_square = (1 + 1 / alpha) / (2 + 1 / alpha) / 2
    assert abs(quantiles.double().square().mean() - mean_square) < 1e-4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sample = torch.distributions.Beta(alpha, alpha).sample((50_000,)).sort()[0]
    gap = (sample[25::50] - quantiles[((torch.arange(1000) + 0.5) / 1000 * 4096).long()]).abs().max()
    assert gap < 0.03, f"off by {gap:.3f} from a sample"


def test_beta_of_a_huge_alpha_is_a_half():
    assert (beta_quantiles(1e300) - 0.5).abs().max() < 1e-4


def test_mix_draws_have_the_stated_frequencies():
    positions = torch.arange(COUNT)
    draws = sampler().mixes(1, positions)
    near((draws.lam < 1).float().mean(), 0.5)
    near(draws.lam[draws.lam < 1].mean(), 0.5)
    assert (sampler(cutmix=0.0).mixes(1, positions).lam < 1).all()
    assert (sampler(mixup=0.0).mixes(1, positions).lam == 1).all()
    assert (sampler(mixup=0.0, cutmix=0.0).mixes(1, positions).share == 1).all()
    near((sampler(cutmix=0.0, mix_prob=0.3).mixes(1, positions).share < 1).float().mean(), 0.3)
    assert (sampler(mix_prob=0.0).mixes(1, positions).share == 1).all()
    # A box of half side int(16 * sqrt(1 - lam)), lam uniform, around a uniform centre, cut at the border.
    top, left, bottom, right = sampler(mixup=0.0).mixes(1, positions).pasted.unbind(1)
    half = (16 * (1 - (torch.arange(4096) + 0.5) / 4096).sqrt()).int().view(-1, 1)
    centre = torch.arange(32)
    height = ((centre + half).clamp(max=32) - (centre - half).clamp(min=0)).float()
    near((bottom - top).float().mean() / 32, height.mean() / 32)
    near(((bottom - top) * (right - left)).float().mean() / 1024, height.mean(1).square().mean() / 1024)


def test_draws_of_neighbours_epochs_and_seeds_are_unrelated():
    positions = torch.arange(COUNT)
    draws = [sampler(seed=seed).images(number, positions) for seed, number in ((0, 0), (0, 1), (1, 0), (2 ** 32, 0))]
    one = draws[0]
    bits = [*(draw.mirror for draw in draws), one.mirror.roll(1), one.top > 4, one.left > 4, one.codes[:, 0] > 0,
            one.codes[:, 1] > 0, one.erased[:, 2] > one.erased[:, 0]]
    correlation = torch.corrcoef(torch.stack(bits).float()).fill_diagonal_(0)
    assert correlation.abs().max() < 0.015, correlation


def test_describe_names_what_was_done():
    images = pictures(96)
    ours = augmenter(images, batch_size=9, mix_mode="elem", crop_pad=0, flip=False)
    lams, texts = epoch(ours)[3], [text for step in range(ours.steps) for text in ours.describe(step)]
    unmixed = augmenter(images, batch_size=9, crop_pad=0, flip=False, **UNMIXED)
    unmixed_images, unmixed_texts = epoch(unmixed)[0], [text for step in range(ours.steps) for text in unmixed.describe(step)]
    plain = epoch(augmenter(images, batch_size=9, **(PLAIN | TRAINING)))[0]
    words = set()
    for row, (text, lam) in enumerate(zip(texts, lams, strict=True)):
        done, _, mixed = text.partition(" | ")
        assert done == unmixed_texts[row]
        assert mixed in ((f"mixup {lam:.2f}", f"cutmix {lam:.2f}") if lam < 1 else ("",)), f"{text}, but a label weight of {lam}"
        assert done != "as it is" or torch.equal(unmixed_images[row], plain[row])
        words |= {*done.split(", "), mixed.partition(" ")[0]}
    assert {"shear y", "auto contrast", "erase", "as it is", "mixup", "cutmix"} <= words and "identity" not in words


def test_describe_names_the_window_and_what_is_mirrored():
    images = pictures(144)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    for options in ({"crop_pad": 1}, {"crop": "resized", "image_size": 16}, {"crop": "resized"} | whole):
        ours = augmenter(images, batch_size=144, **(PLAIN | {"flip": True} | options))
        (originals, draws), result, texts = in_order(ours, images), bytes_of(epoch(ours)[0]), ours.describe(0)
        assert torch.equal(images[ours.sources(0)].permute(0, 3, 1, 2), originals)
        for original, row, text, top, left, height, width, mirror in zip(originals, result, texts, *draws[:5]):
            words = ["mirrored"] * bool(mirror)
            if options.get("crop_pad") and (top, left) != (1, 1):
                words = [f"crop {top - 1:+d} {left - 1:+d}", *words]
            elif "image_size" in options:
                words = [f"window {height}x{width} at {top} {left}", *words]
            assert text == (", ".join(words) or "as it is")
            assert text != "as it is" or torch.equal(row, original)
        assert {"mirrored", "as it is"} <= {*texts} or "image_size" in options


@pytest.mark.parametrize("change, message", [
    ({"policy": "autoaugmnet"}, "unknown policy .autoaugmnet.. choose one of none, autoaugment"),
    ({"crop": "random"}, "unknown crop .random.. choose one of pad, resized"),
    ({"image_size": 24}, "32 pixels are not resized to 24 by this crop .pad.. choose resized"),
    ({"mix_mode": "row"}, "unknown mix_mode .row.. choose one of batch, elem"),
    ({"batch_size": 33}, "fewer images than one batch .32 < 33.. use a smaller batch"),
    ({"images": torch.zeros(32, 3, 32, 32, dtype=torch.uint8)}, "torch.uint8 .32, 3, 32, 32"),
    ({"images": torch.zeros(32, 32, 32, 3)}, "torch.float32 .32, 32, 32, 3"),
    ({"images": torch.zeros(32, dtype=torch.uint8)}, "torch.uint8 .32,"),
])
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        augmenter(**({"images": pictures(32)} | change))


@pytest.mark.parametrize("size", [32, 64])
def test_erased_boxes_follow_torchvisions_law(size):
    """The law by a fine grid over what torchvision draws, share of the area and logarithm of the ratio."""
    grid = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    area, ratio = (size * size * (0.02 + 0.31 * grid))[:, None], (math.log(0.3) + math.log(11) * grid).exp()
    height, width = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (height < size) & (width < size)
    law = torch.bincount((height * size + width)[fits], minlength=size * size) / fits.sum().double()
    table = erase_sizes(size)
    found = torch.bincount(table[:, 0] * size + table[:, 1], minlength=size * size) / len(table)
    assert (found - law).abs().sum() / 2 < 0.01, "total variation"
    assert (found[law > 1 / 8192] > 0).all() and (law[found > 0] > 0).all()
    assert torch.equal(table, erase_sizes(size))
