"""`BatchAugmenter`: from uint8 images on a device to batches that are ready for the network."""
import functools
import re
from typing import NamedTuple

import torch

import kernels
from augment.cpu import CpuBatches
from augment.fused import FusedBatches
from augment.policy import build_tables
from augment.sampling import Sampler
from kernels import Targets
from kernels.augment_constants import SIZES

CROPS = "pad", "resized"
MIX_MODES = "batch", "elem"
_print_once = functools.cache(print)


class Batch(NamedTuple):
    """images: (B, 3, H, W) channels_last, normalised; targets: the labels they carry."""
    images: torch.Tensor
    targets: Targets


class BatchAugmenter:
    """Crop, flip, policy, normalise, erase and mix: `augmenter(step)` is batch `step` of the epoch that was set last, at first 0.

    images: uint8 (N, side, side, 3), side >= 8, on any device; labels: int64 (N,), on the same.  rows: int64 (N,), where only
    some images are meant.  An epoch is a permutation of the N images without the last incomplete batch.  What is drawn depends
    on (seed, epoch, position in the epoch) alone, on no global generator and not on the order of the calls; the bytes after the
    policy are those of torchvision's v1 transforms on tensors.  Where is_fused(images, image_size), one or two launches make the
    batch (fused.py), else plain PyTorch (cpu.py); both equal the specification in naive.py bit for bit.

    policy: a key of POLICIES.  flip: mirror half of the images.
    crop: "pad" crops the image with `crop_pad` pixels of zeros around it to its size.  "resized" resizes a random window to
    `image_size` pixels, by default the size of the images: torchvision's RandomResizedCrop, with its `scale` and `ratio`
    (Szegedy et al. 2014, arXiv 1409.4842), by bilinear interpolation without antialiasing; where ten draws fit no window, it is
    at a random place.
    random_erasing: share of the images with a box of zeros after normalising (Zhong et al. 2017, arXiv 1708.04896).
    mixup, cutmix: alpha of Beta(alpha, alpha) (Zhang et al. 2017, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899); 0 is off;
    with both on, each draw is one of them with probability one half.  mix_prob: share of the draws that mix at all.
    mix_mode: rows 2k and 2k+1 are mixed, by one draw for the "batch" or one for each row ("elem"); an odd last row stays unmixed.
    mean, std: three floats each, for images in [0, 1].  dtype: of the result, fp32, fp16 or bf16; rounded once.
    ValueError: images of another shape or type, an unknown name, fewer images than one batch.
    """

    def __init__(self, images, labels, rows=None, *, batch_size, seed, policy="autoaugment", crop="pad", crop_pad=4,
                 image_size=None, scale=(0.08, 1.0), ratio=(0.75, 1.3333), flip=True, random_erasing=0.25, mixup=0.8, cutmix=1.0,
                 mix_prob=1.0, mix_mode="batch", mean, std, dtype=torch.float32):
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[2:] != (images.shape[1], 3) or images.shape[1] < 8:
            raise ValueError(f"cannot augment images ({images.dtype} {tuple(images.shape)}). "
                             "give torch.uint8 (N, size, size, 3), size >= 8")
        for name, value, known in (("crop", crop, CROPS), ("mix_mode", mix_mode, MIX_MODES)):
            if value not in known:
                raise ValueError(f"unknown {name} ({value}). choose one of {', '.join(known)}")
        if len(labels) < batch_size:
            raise ValueError(f"fewer images than one batch ({len(labels)} < {batch_size}). use a smaller batch, or more images")
        side, resized = images.shape[1], crop == "resized"
        if image_size not in (None, side) and not resized:
            raise ValueError(f"images of {side} pixels are not resized to {image_size} by this crop ({crop}). choose resized")
        size = image_size or side
        self.batch_size, self.steps, self.mix_each = batch_size, len(labels) // batch_size, mix_mode == "elem"
        self.sampler = Sampler(size, build_tables(policy, size).to(images.device), seed=seed, crop_pad=crop_pad, flip=flip,
                               random_erasing=random_erasing, mixup=mixup, cutmix=cutmix, mix_prob=mix_prob,
                               stored=side if resized else None, scale=scale, ratio=ratio)
        self.fused, self._labels = is_fused(images, size), labels
        if kernels.use_triton(images) and not self.fused:
            _print_once(f"images of {size}x{size} are augmented in plain PyTorch: the fused kernels make sides of {SIZES[0]} to "
                        f"{SIZES[-1]} pixels, and they and the stored sides are multiples of {SIZES.step}")
        self._batches = (FusedBatches if self.fused else CpuBatches)(
            images, labels, rows, self.sampler, batch_size=batch_size, mix_each=self.mix_each, mean=mean, std=std, dtype=dtype)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of `epoch`; may wait for the device.  A captured CUDA graph follows, too, where the kernel runs."""
        self.epoch, self._order = epoch, self.sampler.order(epoch, len(self._labels))
        self._batches.set_epoch(epoch, self._order)

    def __call__(self, step: int | torch.Tensor, rows: range | None = None) -> Batch:
        """Batch `step`, or some `rows` of it, such as a shard or a micro-batch, just as they are in the whole batch.

        step may be a 0-dim int64 tensor on the device, not below 0 and below `steps`: in a captured CUDA graph the kernel then
        makes the batch that the tensor names when the graph is replayed.  Never waits for the device, except, without the
        kernel, for `rows` that are new in this epoch and for the value of a tensor.
        IndexError: no such step.  ValueError: rows that split a pair (2k, 2k+1), a tensor of another type.
        """
        if isinstance(step, torch.Tensor):
            if step.dtype != torch.int64 or step.dim():
                raise ValueError(f"not a step ({step.dtype} {tuple(step.shape)}). give an int or a 0-dim torch.int64 tensor")
        elif not 0 <= step < self.steps:
            raise IndexError(f"no such step in the epoch ({step}). choose one from 0 to {self.steps - 1}")
        rows = range(self.batch_size) if rows is None else rows
        whole_pairs = rows.start % 2 == 0 and (rows.stop % 2 == 0 or rows.stop == self.batch_size)
        if rows.step != 1 or not whole_pairs or rows.start < 0 or rows.stop > self.batch_size:
            raise ValueError(f"cannot take {rows} of a batch of {self.batch_size}. give rows in a row, in whole pairs (2k, 2k+1)")
        return Batch(*self._batches.batch(step, rows))

    def treatments(self, epoch: int, steps: range, rows: range) -> tuple[torch.Tensor, ...]:
        """Whether `rows` of the batches `steps` of any epoch see policy, erasing, Mixup and CutMix: bool (S, B) each."""
        first = torch.tensor(steps, device=self._labels.device)[:, None] * self.batch_size
        own = torch.arange(rows.start, rows.stop, device=first.device)
        draws = self.sampler.images(epoch, first + own)
        mixes = self.sampler.mixes(epoch, first + own * self.mix_each)
        mixed, cut = (mixes.share < 1) & ((own ^ 1) < self.batch_size), mixes.lam == 1  # an odd last row has no partner
        return (draws.codes != 0).any(2), draws.erased[..., 2] > draws.erased[..., 0], mixed & ~cut, mixed & cut

    def sources(self, step: int) -> torch.Tensor:
        """int64 (B,) on the CPU: which image each row of batch `step` is made of."""
        return self._order[step * self.batch_size:(step + 1) * self.batch_size]

    def describe(self, step: int) -> list[str]:
        """What is drawn for each row of batch `step`, such as "crop +1 -4, mirrored, shear y | cutmix 0.63".

        crop: by how many lines (down) and columns (to the right) the window is off the image.  window: height x width, then its
        top and left edge.  cutmix, mixup: the share of the row that is its own.
        """
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size, device=self._labels.device)
        draws = self.sampler.images(self.epoch, positions)
        mixes = self.sampler.mixes(self.epoch, positions if self.mix_each else positions[:1].expand(self.batch_size))
        names = [re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower() for name, _ in self.sampler.policy.operations]
        done = [self._placed(*place) + ["mirrored"] * mirror + [names[code] for code in codes if code]
                + ["erase"] * (bottom > top)
                for *place, mirror, codes, (top, _, bottom, _) in zip(*(drawn.tolist() for drawn in draws))]
        mixed = [f" | {'mixup' if lam < 1 else 'cutmix'} {share:.2f}" if share < 1 else ""
                 for lam, share in zip(mixes.lam.tolist(), mixes.share.tolist())]
        return [(", ".join(words) or "as it is") + (mixed[row] if row ^ 1 < self.batch_size else "")
                for row, words in enumerate(done)]

    def _placed(self, top: int, left: int, height: int, width: int) -> list[str]:
        """The crop in words; none for the whole image in its size."""
        if self.sampler.resized:
            whole = height == width == self.sampler.size == self.sampler.crop_from
            return [] if whole else [f"window {height}x{width} at {top} {left}"]
        pad = self.sampler.crop_pad
        return [] if top == left == pad else [f"crop {top - pad:+d} {left - pad:+d}"]


def is_fused(images, image_size: int) -> bool:
    """Whether the kernels make a batch of `image_size` pixels of these images; they then read the step on the device."""
    return kernels.use_triton(images) and image_size in SIZES and images.shape[1] % SIZES.step == 0
