"""`BatchAugmenter`: from uint8 images on a device to batches that are ready for the network."""
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F

from augment import ops
from augment.policy import KINDS, build_tables
from augment.sampling import Sampler
from losses.targets import Targets

CPU_BLOCK = 2 ** 18  # pixels that a CPU works on at a time: the memory of larger tensors is given back and mapped anew each time


class Batch(NamedTuple):
    """images: (B, 3, H, W) channels_last, normalised; targets: the labels they carry."""
    images: torch.Tensor
    targets: Targets


class _Plan(NamedTuple):
    """How the S steps of an epoch treat R rows of their batches: read them, mirrored ones last; crop, into the order of the first
    operation, sorted by kind; apply it; move into the order of the next operation, and after the last into that of the batch.

    The lists are on the host: they hold the sizes of all groups, so that no step has to ask the device for one.
    """
    sources: torch.Tensor  # int64 (S, R), image numbers
    mirror_from: list[int]  # per step
    corners: torch.Tensor  # int64 (S, R), see ops.crop
    codes: list[torch.Tensor]  # per slot int64 (S, R)
    counts: list[list[list[int]]]  # per slot, step and kind
    moves: list[torch.Tensor]  # per slot int64 (S, R): where in this order each row of the next one is


class BatchAugmenter:
    """Crop, flip, policy, normalise, erase and mix: `augmenter(step)` is batch `step` of the epoch that was set last, at first 0.

    images: uint8 (N, size, size, 3), size >= 8, on any device; labels: int64 (N,), on the same.  An epoch is a permutation of the
    images without the last incomplete batch.  What is drawn depends on (seed, epoch, position in the epoch) alone, on no global
    generator and not on the order of the calls; the bytes after the policy are those of torchvision's v1 transforms on tensors.

    policy: a key of POLICIES.  crop_pad: pixels of zeros around the image that is cropped.  flip: mirror half of the images.
    random_erasing: share of the images with a box of zeros after normalising (Zhong et al. 2017, arXiv 1708.04896).
    mixup, cutmix: alpha of Beta(alpha, alpha) (Zhang et al. 2017, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899); 0 is off;
    with both on, each draw is one of them with probability one half.  mix_prob: share of the draws that mix at all.
    mix_mode: rows 2k and 2k+1 are mixed with one draw for the "batch", for each "pair" or for each row ("elem"); an odd last row
    stays unmixed.  mean, std: three floats each, for images in [0, 1].  dtype: of the result, which is rounded to it once.
    ValueError: images of another shape or type, an unknown name, fewer images than one batch.
    """

    def __init__(self, images, labels, *, batch_size, seed, policy="autoaugment", crop_pad=4, flip=True, random_erasing=0.25,
                 mixup=0.8, cutmix=1.0, mix_prob=1.0, mix_mode="batch", mean, std, dtype=torch.float32):
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[2:] != (images.shape[1], 3) or images.shape[1] < 8:
            raise ValueError(f"cannot augment images ({images.dtype} {tuple(images.shape)}). "
                             "give torch.uint8 (N, size, size, 3), size >= 8")
        rows_per_mix = {"batch": batch_size, "pair": 2, "elem": 1}
        if mix_mode not in rows_per_mix:
            raise ValueError(f"unknown mix_mode ({mix_mode}). choose one of {', '.join(rows_per_mix)}")
        if len(images) < batch_size:
            raise ValueError(f"fewer images than one batch ({len(images)} < {batch_size}). use a smaller batch, or more images")
        self.images, self.labels, self.batch_size, self.dtype = images, labels, batch_size, dtype
        self.size, self.steps, self.rows_per_mix = images.shape[1], len(images) // batch_size, rows_per_mix[mix_mode]
        self.tables = build_tables(policy, self.size).to(images.device)
        self.sampler = Sampler(self.size, self.tables, seed=seed, crop_pad=crop_pad, flip=flip, random_erasing=random_erasing,
                               mixup=mixup, cutmix=cutmix, mix_prob=mix_prob)
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).repeat(self.size ** 2).to(images.device)
                              for values in (mean, std))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw all of `epoch` at once, so that a step only looks it up; may wait for the device."""
        positions = torch.arange(self.steps * self.batch_size, device=self.images.device).view(self.steps, self.batch_size)
        order = self.sampler.order(epoch, len(self.images))[:positions.numel()]
        self._sources = order.to(self.images.device).view_as(positions)
        self._draws = self.sampler.images(epoch, positions)
        self._mixes = self.sampler.mixes(epoch, positions[:, ::self.rows_per_mix])

        paired = self.batch_size // 2 * 2
        share = self._mixes.share.repeat_interleave(self.rows_per_mix, 1)[:, :self.batch_size]
        label = self.labels[self._sources]
        other = label.clone()  # an odd last row is its own partner
        other[:, :paired] = label[:, :paired].unflatten(1, (-1, 2)).flip(2).flatten(1)
        label = torch.where(share == 0, other, label)
        unmixed = (share == 1) | (label == other)
        self._targets = Targets(label, torch.where(unmixed, label, other), share.masked_fill(unmixed, 1))
        self._plans = {rows: self._plan(rows) for rows in self._blocks(range(self.batch_size))}

    def __call__(self, step: int, rows: range | None = None) -> Batch:
        """Batch `step`, or some `rows` of it, such as a shard or a micro-batch, just as they are in the whole batch.

        Never waits for the device, except for `rows` that are new in this epoch.  ValueError: rows that split a pair (2k, 2k+1).
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"no such step in the epoch ({step}). choose one from 0 to {self.steps - 1}")
        rows = range(self.batch_size) if rows is None else rows
        images = torch.empty(len(rows), self.size, 3 * self.size, dtype=self.dtype, device=self.images.device)
        blocks = self._blocks(rows)
        for block, result in zip(blocks, images.split(len(blocks[0]))):
            result.copy_(self._augmented(step, block))
        return Batch(images.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2),
                     Targets(*(column[step, rows.start:rows.stop] for column in self._targets)))

    def describe(self, step: int) -> list[str]:
        """What was drawn for each row of batch `step`, such as "shear y, posterize | cutmix 0.63": 0.63 of it is its own."""
        names = [re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower() for name, _ in self.tables.operations]
        done = [[names[code] for code in codes if code] + ["erase"] * (bottom > top) for codes, (top, _, bottom, _)
                in zip(self._draws.codes[step].tolist(), self._draws.erased[step].tolist())]
        mixes = [f" | {'mixup' if lam < 1 else 'cutmix'} {share:.2f}" if share < 1 else ""
                 for lam, share in zip(self._mixes.lam[step].tolist(), self._mixes.share[step].tolist())]
        return [(", ".join(words) or "as it is") + (mixes[row // self.rows_per_mix] if row ^ 1 < self.batch_size else "")
                for row, words in enumerate(done)]

    def _blocks(self, rows: range) -> list[range]:
        """`rows` in parts that are worked on at a time."""
        length = len(rows) if self.images.is_cuda else max(2, CPU_BLOCK // self.size ** 2 // 2 * 2)
        return [rows[first:first + length] for first in range(0, len(rows), length)]

    def _augmented(self, step: int, rows: range) -> torch.Tensor:
        """float32 (rows, size, 3*size): `rows` of batch `step`, in NHWC."""
        if rows not in self._plans:
            self._plans[rows] = self._plan(rows)
        plan = self._plans[rows]
        images = self.images.index_select(0, plan.sources[step])
        images = ops.crop(images, plan.mirror_from[step], plan.corners[step], self.sampler.crop_pad)
        for codes, counts, moves in zip(plan.codes, plan.counts, plan.moves):
            ops.apply_operations(images, codes[step], counts[step], self.tables)
            images = images.index_select(0, moves[step])
        images = ops.normalise(images, self.mean, self.std).view(-1, self.size, 3 * self.size)
        if self.sampler.erase_threshold:
            ops.erase(images, self._draws.erased[step, rows.start:rows.stop])
        paired = len(rows) // 2 * 2
        if self.sampler.mix_threshold and paired:
            mixes = slice(rows.start // self.rows_per_mix, -(-(rows.start + paired) // self.rows_per_mix))
            ops.mix(images[:paired], self._mixes.lam[step, mixes], self._mixes.pasted[step, mixes])
        return images

    def _plan(self, rows: range) -> _Plan:
        whole_pairs = rows.start % 2 == 0 and (rows.stop % 2 == 0 or rows.stop == self.batch_size)
        if rows.step != 1 or not whole_pairs or rows.start < 0 or rows.stop > self.batch_size:
            raise ValueError(f"cannot take {rows} of a batch of {self.batch_size}. give rows in a row, in whole pairs (2k, 2k+1)")
        part = slice(rows.start, rows.stop)
        top, left, mirror, codes, _ = (drawn[:, part] for drawn in self._draws)
        reading = mirror.int().argsort(dim=1, stable=True)
        # In an image that is mirrored before, the window is as far from the right edge as it was to be from the left.
        left = torch.where(mirror, 2 * self.sampler.crop_pad - left, left)
        width = self.size + 2 * self.sampler.crop_pad
        corners = (reading.argsort(1) * width + top) * width + left

        kinds = self.tables.kind[codes]
        orders = [*kinds.argsort(dim=1, stable=True).unbind(2), torch.arange(len(rows), device=codes.device).expand_as(top)]
        return _Plan(
            sources=self._sources[:, part].gather(1, reading),
            mirror_from=(~mirror).sum(1).tolist(),
            corners=corners.gather(1, orders[0]),
            codes=[code.gather(1, order) for code, order in zip(codes.unbind(2), orders)],
            counts=F.one_hot(kinds, KINDS).sum(1).transpose(0, 1).tolist(),
            moves=[here.argsort(1).gather(1, following) for here, following in zip(orders, orders[1:])])
