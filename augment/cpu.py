"""The CPU path: batches in plain PyTorch, on CPUs, and on GPUs where the kernel does not run.

Its specification is naive.py; its bytes are those of torchvision's v1 tensor operations on every IEEE device.  Images are uint8
(rows, 3*size*size), NHWC, unless said otherwise.  Each product and each sum is rounded by itself, as eager PyTorch does: fused
multiply-adds would break the equality with the kernel.
"""
import functools
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from augment.crop import resized_crop
from augment.policy import AUTOCONTRAST, CONTRAST, EQUALIZE, GEOMETRY, LOOKUP, SHARPNESS, PolicyTables
from augment.sampling import Sampler
from kernels import Targets
from kernels.augment_constants import KINDS

CPU_BLOCK = 2 ** 18  # pixels that a CPU works on at a time: the memory of larger tensors is given back and mapped anew each time


class CpuBatches:
    """Makes batches of `images` on their device; the arguments are those of BatchAugmenter."""

    def __init__(self, images, labels, rows, sampler: Sampler, *, batch_size, mix_each, mean, std, dtype):
        self.images, self.labels, self.rows, self.sampler = images, labels, rows, sampler
        self.batch_size, self.dtype = batch_size, dtype
        self.size, self.steps, self.mix_each = sampler.size, len(labels) // batch_size, mix_each
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).repeat(self.size ** 2).to(images.device)
                              for values in (mean, std))

    def set_epoch(self, epoch: int, order: torch.Tensor) -> None:
        """Draw all of `epoch` at once, so that a step only looks it up; waits for the device."""
        positions = torch.arange(self.steps * self.batch_size, device=self.images.device).view(self.steps, self.batch_size)
        order = order[:positions.numel()].to(self.images.device).view_as(positions)
        self._sources = order if self.rows is None else self.rows[order]
        self._draws = self.sampler.images(epoch, positions)
        self._mixes = self.sampler.mixes(epoch, positions if self.mix_each else positions[:, :1])

        paired = self.batch_size // 2 * 2
        share = self._mixes.share.expand_as(positions)
        label = self.labels[order]
        other = label.clone()  # an odd last row is its own partner
        other[:, :paired] = label[:, :paired].unflatten(1, (-1, 2)).flip(2).flatten(1)
        label = torch.where(share == 0, other, label)
        unmixed = (share == 1) | (label == other)
        self._targets = Targets(label, torch.where(unmixed, label, other), share.masked_fill(unmixed, 1))
        self._plans = {rows: self._plan(rows) for rows in self._blocks(range(self.batch_size))}

    def batch(self, step: int | torch.Tensor, rows: range) -> tuple[torch.Tensor, Targets]:
        """`rows` of batch `step`; waits for the device where step is a tensor, or where the rows are new in this epoch."""
        step = int(step)
        images = torch.empty(len(rows), self.size, 3 * self.size, dtype=self.dtype, device=self.images.device)
        blocks = self._blocks(rows)
        for block, result in zip(blocks, images.split(len(blocks[0]))):
            self._augment(step, block, result)
        return (images.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2),
                Targets(*(column[step, rows.start:rows.stop] for column in self._targets)))

    def _blocks(self, rows: range) -> list[range]:
        length = len(rows) if self.images.is_cuda else max(2, CPU_BLOCK // self.size ** 2 // 2 * 2)
        return [rows[first:first + length] for first in range(0, len(rows), length)]

    def _augment(self, step: int, rows: range, result: torch.Tensor) -> None:
        """Write `rows` of batch `step` to `result` (rows, size, 3*size), NHWC."""
        if rows not in self._plans:
            self._plans[rows] = self._plan(rows)
        plan = self._plans[rows]
        images = self.images.index_select(0, plan.sources[step])
        if self.sampler.resized:
            images = resized_crop(images, plan.windows[step], self.size, plan.lines[step])
        else:
            images = crop(images, plan.mirror_from[step], plan.windows[step], self.sampler.crop_pad)
        for codes, counts, moves in zip(plan.codes, plan.counts, plan.moves):
            apply_operations(images, codes[step], counts[step], self.sampler.policy)
            images = images.index_select(0, moves[step])
        values = result if self.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)
        normalise(images, self.mean, self.std, out=values.view(len(rows), -1))
        erase(values, plan.erased[step])
        paired = len(rows) // 2 * 2
        if self.sampler.mix_threshold and paired:
            lam = self._mixes.lam[step, rows.start:rows.start + paired] if self.mix_each else self._mixes.lam[step]
            mix(values[:paired], lam, plan.pasted[step], plan.mixed[step])
        if values is not result:
            result.copy_(values)

    def _plan(self, rows: range) -> SimpleNamespace:
        """How the S steps of an epoch treat R rows of their batches.

        Images are read, mirrored ones last, and cropped into the order of the first operation, which is sorted by kind.  It is
        applied; then they are moved into the order of the next one, and after the last into that of the batch.  Windows to
        resize are read in the first order.

        The lists are on the host: they hold the sizes of all groups, so that no step has to ask the device for one.
        """
        part = slice(rows.start, rows.stop)
        top, left, height, width, mirror, codes, erased = (drawn[:, part] for drawn in self._draws)
        pasted, lam, _ = (drawn[:, part] if self.mix_each else drawn for drawn in self._mixes)
        kinds = self.sampler.policy.kind[codes]
        orders = [*kinds.argsort(dim=1, stable=True).unbind(2), torch.arange(len(rows), device=codes.device).expand_as(top)]
        if self.sampler.resized:
            reading, drawn = orders[0], (top, left, height, width, mirror.long())
            windows = torch.stack([each.gather(1, reading) for each in drawn], 2)
        else:
            reading = mirror.int().argsort(dim=1, stable=True)
            # In an image that is mirrored before, the window is as far from the right edge as it was to be from the left.
            left = torch.where(mirror, 2 * self.sampler.crop_pad - left, left)
            corners = (reading.argsort(1) * self.sampler.crop_from + top) * self.sampler.crop_from + left
            windows = corners.gather(1, orders[0])
        return SimpleNamespace(
            sources=self._sources[:, part].gather(1, reading),  # int64 (S, R), image numbers
            mirror_from=(~mirror).sum(1).tolist(),  # per step
            windows=windows,  # int64 (S, R), see crop; or (S, R, 5), see resized_crop
            lines=height.sum(1).tolist(),  # per step, of all windows
            codes=[code.gather(1, order) for code, order in zip(codes.unbind(2), orders)],  # per slot int64 (S, R)
            counts=F.one_hot(kinds, len(KINDS)).sum(1).transpose(0, 1).tolist(),  # per slot, step and kind
            moves=[here.argsort(1).gather(1, following) for here, following in zip(orders, orders[1:])],  # per slot int64 (S, R)
            erased=erased.tolist(),  # per step and row
            pasted=pasted.tolist(),  # per step, and per row or one for all
            mixed=(lam < 1).any(1).tolist())  # per step, whether any image is mixed outside of its box


# Arithmetic

def crop(images: torch.Tensor, mirror_from: int, corners: torch.Tensor, pad: int) -> torch.Tensor:
    """Windows of the zero-padded `images`, uint8 (rows, size, size, 3), those from row `mirror_from` on mirrored first.

    corners: int64 (rows,), where the window of each row of the result begins, in pixels from the first of all padded images.
    """
    rows, size = images.shape[:2]
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    padded[mirror_from:] = padded[mirror_from:].flip(2)
    width = size + 2 * pad
    # A line of a window is 3*size bytes in a row, from any pixel on: in this view of the same memory a crop copies whole lines.
    lines = padded.as_strided((rows * width * width - size + 1, 3 * size), (3, 1))
    starts = corners.unsqueeze(1) + torch.arange(0, size * width, width, device=images.device)
    return lines.index_select(0, starts.view(-1)).view(rows, 3 * size * size)


def apply_operations(images: torch.Tensor, codes: torch.Tensor, counts: list[int], tables: PolicyTables) -> None:
    """Apply operation `codes[i]`, int64 (rows,), to `images[i]`, in place; the rows are sorted by kind, `counts` of each kind."""
    rows = [slice(end - count, end) for end, count in zip(accumulate(counts), counts)]
    if counts[GEOMETRY]:
        moved = rows[GEOMETRY]
        sources = tables.maps.index_select(0, tables.argument.index_select(0, codes[moved]))
        first = torch.arange(len(sources), dtype=torch.int32, device=images.device).unsqueeze(1) * (sources.shape[1] + 1)
        pixels = F.pad(images[moved], (0, 3)).view(-1, 3)  # behind each image one that is black
        images[moved] = pixels.index_select(0, (sources + first).view(-1)).view(len(sources), -1)

    blended = slice(rows[SHARPNESS].start, rows[CONTRAST].stop)
    if blended.start < blended.stop:
        values = images[blended].float()
        parts = [part.split(counts[SHARPNESS:CONTRAST + 1]) for part in (
            values.view(len(values), -1, 3), *(table.index_select(0, codes[blended]).view(-1, 1, 1)
                                               for table in (tables.ratio, tables.complement)))]
        for blend_with, pixels, ratio, complement in zip((_blurred, _gray, _mean_gray), *parts):
            if len(pixels):
                other = blend_with(pixels).mul_(complement)  # before the pixels change
                pixels.mul_(ratio).add_(other)
        images[blended] = _whole(values)

    looked_up = slice(rows[EQUALIZE].start, rows[LOOKUP].stop)
    if looked_up.start < looked_up.stop:
        index = _lookup_index(images[looked_up])
        lookups = []
        if counts[EQUALIZE]:
            lookups.append(_equalizing(index[:counts[EQUALIZE]]))
        if counts[AUTOCONTRAST]:
            lookups.append(_stretching(images[rows[AUTOCONTRAST]], tables))
        if counts[LOOKUP]:
            chosen = tables.argument.index_select(0, codes[rows[LOOKUP]])
            lookups.append(tables.lookups.index_select(0, chosen).unsqueeze(1).expand(-1, 3, -1))
        images[looked_up] = torch.cat(lookups).to(torch.uint8).view(-1).index_select(0, index.view(-1)).view_as(index)


def _whole(values):
    """Truncated to [0, 255], as int16: to this a CPU converts four times as fast as to uint8."""
    return values.clamp_(0, 255).to(torch.int16)


# What images, float32 (rows, size*size, 3), are blended with: float32, broadcast over the pixels and channels.

def _blurred(pixels):
    size = round(pixels.shape[1] ** 0.5)
    images = pixels.view(-1, size, 3 * size)
    lines = (images[:, :-2] + images[:, 1:-1]).add_(images[:, 2:])
    squares = (lines[..., :-6] + lines[..., 3:-3]).add_(lines[..., 6:])
    blurred = images.clone()
    blurred[:, 1:-1, 3:-3].mul_(4).add_(squares).div_(13).round_()  # not the border; 13 is odd, so there are no ties to round
    return blurred.view_as(pixels)


def _gray(pixels):
    """(rows, size*size, 1), whole numbers."""
    red, green, blue = (pixels.flatten(1) * _constants(pixels.shape[1], pixels.device).gray_weights).view_as(pixels).unbind(2)
    return (red + green).add_(blue).trunc_().unsqueeze(2)


def _mean_gray(pixels):
    total = _gray(pixels).sum(1, keepdim=True, dtype=torch.int64).float()  # of whole numbers: exact in any order
    return total / _constants(pixels.shape[1], pixels.device).pixels


# Lookups that depend on the image: int16 (rows, 3, 256).

def _stretching(images, tables):
    planes = images.view(len(images), -1, 3).transpose(1, 2).contiguous()
    low, high = planes.amin(2, keepdim=True), planes.amax(2, keepdim=True)
    stretch = tables.stretch[(high - low).long()]
    return _whole((_constants(images.shape[1] // 3, images.device).ramp - low.masked_fill(low == high, 0)).mul_(stretch))


def _equalizing(index):
    pixels = index.shape[1] // 3
    histogram = torch.zeros(len(index) * 768, dtype=torch.int32, device=index.device)
    histogram = histogram.index_add_(0, index.view(-1), index.new_ones(1).expand(index.numel())).view(-1, 3, 256)
    not_brighter = histogram.cumsum(2, dtype=torch.int32)
    below_brightest = not_brighter.masked_fill(not_brighter == pixels, 0).amax(2, keepdim=True)
    step = below_brightest // 255
    # The float32 quotient of whole numbers below 2^23 truncates to the integer quotient: it never rounds up to a whole number.
    equalized = not_brighter.sub_(histogram).add_(step // 2) / step.clamp(min=1)
    return _whole(torch.where(step > 0, equalized, _constants(pixels, index.device).ramp))


def _lookup_index(images):
    """int32 (rows, 3*size*size): where each byte finds its value in lookups (rows, 3, 256)."""
    rows, size = images.shape
    first = torch.arange(0, rows * 768, 768, dtype=torch.int32, device=images.device).unsqueeze(1)
    return images.int().add_(_constants(size // 3, images.device).first_of_channel).add_(first)


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """float32 (rows, 3*size*size), by the steps of ToTensor and Normalize; mean, std: float32 (3*size*size,)."""
    values = images.float() if out is None else out.copy_(images)
    return values.div_(_constants(images.shape[1] // 3, images.device).byte).sub_(mean).div_(std)


def erase(images: torch.Tensor, boxes: list[list[int]]) -> None:
    """Set the pixels inside of `boxes` (top, left, bottom, right) to zero, in place; images: float32 (rows, size, 3*size).

    Random Erasing: Zhong et al. 2017, arXiv 1708.04896.
    """
    for image, (top, left, bottom, right) in zip(images, boxes):
        if top < bottom:
            image[top:bottom, 3 * left:3 * right] = 0


def mix(images: torch.Tensor, lam: torch.Tensor, boxes: list[list[int]], mixed: bool) -> None:
    """lam * image + (1 - lam) * partner, in place, where rows 2k and 2k+1 are partners and lam counts as 0 inside of `boxes`.

    images: float32 (rows, size, 3*size), rows even; lam: float32 (rows,); boxes: for each row, or one for all.
    mixed: whether any lam is below 1.
    Mixup: Zhang et al. 2017, arXiv 1710.09412.  CutMix: Yun et al. 2019, arXiv 1905.04899.
    """
    partners = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if mixed:
        lam = lam.view(-1, 1, 1)
        images.mul_(lam).add_(partners * (1 - lam))
    length = len(images) if len(boxes) == 1 else 1
    for (top, left, bottom, right), image, partner in zip(boxes, images.split(length), partners.split(length)):
        if top < bottom:
            image[:, top:bottom, 3 * left:3 * right] = partner[:, top:bottom, 3 * left:3 * right]


# Constants, which a small batch would spend more time on making than on using.

@functools.cache
def _constants(pixels: int, device) -> SimpleNamespace:
    """For images of so many pixels.  `pixels` and `byte` divide: by Python's numbers, a GPU multiplies with a rounded inverse."""
    ramp, first_of_channel = torch.arange(256, dtype=torch.float32), torch.arange(0, 768, 256, dtype=torch.int32)
    return SimpleNamespace(
        pixels=torch.tensor(float(pixels), device=device), byte=torch.tensor(255.0, device=device), ramp=ramp.to(device),
        first_of_channel=first_of_channel.repeat(pixels).to(device),
        gray_weights=torch.tensor([0.2989, 0.587, 0.114]).repeat(pixels).to(device))
