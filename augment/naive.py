"""The specification of a batch: image by image, by torchvision's own functions.  Both fast paths must equal it bit for bit.

`cpu.py` and `fused.py` are what runs; this is for reading and for tests.  What is drawn is in `sampling.py`.
"""
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms.autoaugment import InterpolationMode, _apply_op

from kernels import Targets
from kernels.augment_constants import PLACE_BITS

ONE = 2 ** PLACE_BITS  # pixel, in the units of a place between two


def resized(image, size):
    """uint8 (3, height, width) -> (3, size, size), by bilinear interpolation in whole numbers.

    Pixel k of an axis is read at (k + 1/2) * length / size - 1/2, in 256ths of a pixel, halves rounded up, and not beyond the
    outer pixels.  The sum of four pixels by their weights, in 65536ths, is rounded, halves up.  No antialiasing: the images of
    folders are stored with 1.15 times the side of the result, so at most every seventh pixel is skipped.
    """
    image = image.long()
    for axis in (1, 2):
        length, lines = image.shape[axis], []
        for k in range(size):
            place = (((2 * k + 1) * length - size) * ONE + size) // (2 * size)
            before, part = divmod(min(max(place, 0), (length - 1) * ONE), ONE)
            after = min(before + 1, length - 1)
            lines.append((ONE - part) * image.select(axis, before) + part * image.select(axis, after))
        image = torch.stack(lines, axis)
    return ((image + ONE ** 2 // 2) // ONE ** 2).to(torch.uint8)


def augment_image(image, window, codes, erased, *, operations, crop_pad, size, mean, std):
    """Crop, flip, policy, normalise, erase: uint8 (3, H, W) -> float32 (3, size, size).

    window: top, left, height and width in the image with `crop_pad` pixels of zeros around it, or, where that is None, in the
    image itself, resized to `size`; and whether to mirror.  codes: indices of `operations`, (name, magnitude) each.  erased: the
    box top, left, bottom, right that becomes 0.
    """
    *window, mirror = window
    image = resized(TF.crop(image, *window), size) if crop_pad is None else TF.crop(TF.pad(image, [crop_pad]), *window)
    image = TF.hflip(image) if mirror else image
    for code in codes:
        image = _apply_op(image, *operations[code], InterpolationMode.NEAREST, None)
    image = TF.normalize(image / 255, mean, std)
    top, left, bottom, right = erased
    return TF.erase(image, top, left, bottom - top, right - left, 0.0)


def mix(image, partner, lam, pasted):
    """lam * image + (1 - lam) * partner, and the partner alone inside of the box `pasted` (top, left, bottom, right)."""
    top, left, bottom, right = pasted
    mixed = lam * image + (1 - lam) * partner
    mixed[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return mixed


def mix_label(own: int, partner: int, share: float) -> tuple[int, int, float]:
    """label, other and lam of `share` of the one and the rest of the other; one label alone has lam 1."""
    own = partner if share == 0 else own
    return (own, own, 1.0) if share == 1 or own == partner else (own, partner, share)


def augment_batch(images, labels, sampler, epoch: int, step: int, *, batch_size: int, mix_each: bool, mean, std):
    """Batch `step` of an epoch: float32 (batch_size, 3, size, size) and its Targets; arguments as in BatchAugmenter."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    sources = sampler.order(epoch, len(images))[positions]
    how = {"operations": sampler.policy.operations, "crop_pad": None if sampler.resized else sampler.crop_pad,
           "size": sampler.size, "mean": mean, "std": std}
    *window, codes, erased = (drawn.tolist() for drawn in sampler.images(epoch, positions))
    plain = [augment_image(image.permute(2, 0, 1), *drawn, **how)
             for image, *drawn in zip(images[sources], zip(*window), codes, erased)]
    draws = sampler.mixes(epoch, positions if mix_each else positions[:1].expand(batch_size))
    mixed, targets = [], []
    for row, (pasted, lam, share) in enumerate(zip(*draws)):
        partner = row ^ 1 if row ^ 1 < batch_size else row  # an odd last row stays unmixed
        mixed.append(mix(plain[row], plain[partner], lam, pasted) if partner != row else plain[row])
        targets.append(mix_label(int(labels[sources[row]]), int(labels[sources[partner]]), share.item()))
    label, other, lam = zip(*targets)
    return torch.stack(mixed), Targets(torch.tensor(label), torch.tensor(other), torch.tensor(lam))
