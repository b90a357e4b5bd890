"""The CPU path: batches in plain PyTorch, on CPUs, and on GPUs where the kernel does not run.  naive.py says what it computes."""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from augment import ops
from augment.sampling import Sampler
from kernels.augment_constants import KINDS
from losses.targets import Targets

CPU_BLOCK = 2 ** 18  # pixels that a CPU works on at a time: the memory of larger tensors is given back and mapped anew each time


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


class CpuBatches:
    """Makes batches of `images` on their device; the arguments are those of BatchAugmenter."""

    def __init__(self, images, labels, sampler: Sampler, *, batch_size, mix_each, mean, std, dtype):
        self.images, self.labels, self.sampler, self.batch_size, self.dtype = images, labels, sampler, batch_size, dtype
        self.size, self.steps, self.mix_each = sampler.size, len(images) // batch_size, mix_each
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).repeat(self.size ** 2).to(images.device)
                              for values in (mean, std))

    def set_epoch(self, epoch: int, order: torch.Tensor) -> None:
        """Draw all of `epoch` at once, so that a step only looks it up; waits for the device."""
        positions = torch.arange(self.steps * self.batch_size, device=self.images.device).view(self.steps, self.batch_size)
        self._sources = order[:positions.numel()].to(self.images.device).view_as(positions)
        self._draws = self.sampler.images(epoch, positions)
        self._mixes = self.sampler.mixes(epoch, positions if self.mix_each else positions[:, :1])

        paired = self.batch_size // 2 * 2
        share = self._mixes.share.expand_as(positions)
        label = self.labels[self._sources]
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
            result.copy_(self._augmented(step, block))
        return (images.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2),
                Targets(*(column[step, rows.start:rows.stop] for column in self._targets)))

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
            ops.apply_operations(images, codes[step], counts[step], self.sampler.policy)
            images = images.index_select(0, moves[step])
        images = ops.normalise(images, self.mean, self.std).view(-1, self.size, 3 * self.size)
        if self.sampler.erase_threshold:
            ops.erase(images, self._draws.erased[step, rows.start:rows.stop])
        paired = len(rows) // 2 * 2
        if self.sampler.mix_threshold and paired:
            mixes = slice(rows.start, rows.start + paired) if self.mix_each else slice(1)
            ops.mix(images[:paired], self._mixes.lam[step, mixes], self._mixes.pasted[step, mixes])
        return images

    def _plan(self, rows: range) -> _Plan:
        part = slice(rows.start, rows.stop)
        top, left, mirror, codes, _ = (drawn[:, part] for drawn in self._draws)
        reading = mirror.int().argsort(dim=1, stable=True)
        # In an image that is mirrored before, the window is as far from the right edge as it was to be from the left.
        left = torch.where(mirror, 2 * self.sampler.crop_pad - left, left)
        width = self.size + 2 * self.sampler.crop_pad
        corners = (reading.argsort(1) * width + top) * width + left

        kinds = self.sampler.policy.kind[codes]
        orders = [*kinds.argsort(dim=1, stable=True).unbind(2), torch.arange(len(rows), device=codes.device).expand_as(top)]
        return _Plan(
            sources=self._sources[:, part].gather(1, reading),
            mirror_from=(~mirror).sum(1).tolist(),
            corners=corners.gather(1, orders[0]),
            codes=[code.gather(1, order) for code, order in zip(codes.unbind(2), orders)],
            counts=F.one_hot(kinds, len(KINDS)).sum(1).transpose(0, 1).tolist(),
            moves=[here.argsort(1).gather(1, following) for here, following in zip(orders, orders[1:])])
