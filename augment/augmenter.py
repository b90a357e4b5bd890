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
from kernels.augment_constants import WARPS

MIX_MODES = "batch", "elem"


class Batch(NamedTuple):
    """images: (B, 3, H, W) channels_last, normalised; targets: the labels they carry."""
    images: torch.Tensor
    targets: Targets


class Treatments(NamedTuple):
    """What is done to images besides crop and flip: bool (S, B), for S batches."""
    policy: torch.Tensor
    erased: torch.Tensor
    mixup: torch.Tensor
    cutmix: torch.Tensor


class BatchAugmenter:
    """Crop, flip, policy, normalise, erase and mix: `augmenter(step)` is batch `step` of the epoch that was set last, at first 0.

    images: uint8 (N, size, size, 3), size >= 8, on any device; labels: int64 (N,), on the same.  An epoch is a permutation of the
    images without the last incomplete batch.  What is drawn depends on (seed, epoch, position in the epoch) alone, on no global
    generator and not on the order of the calls; the bytes after the policy are those of torchvision's v1 transforms on tensors.
    Where kernels.use_triton(images) and size is 32 or 64, one launch makes the batch (fused.py), else plain PyTorch (cpu.py);
    both equal the specification in naive.py bit for bit.

    policy: a key of POLICIES.  crop_pad: pixels of zeros around the image that is cropped.  flip: mirror half of the images.
    random_erasing: share of the images with a box of zeros after normalising (Zhong et al. 2017, arXiv 1708.04896).
    mixup, cutmix: alpha of Beta(alpha, alpha) (Zhang et al. 2017, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899); 0 is off;
    with both on, each draw is one of them with probability one half.  mix_prob: share of the draws that mix at all.
    mix_mode: rows 2k and 2k+1 are mixed, by one draw for the "batch" or one for each row ("elem"); an odd last row stays unmixed.
    mean, std: three floats each, for images in [0, 1].  dtype: of the result, fp32, fp16 or bf16; rounded once.
    ValueError: images of another shape or type, an unknown name, fewer images than one batch.
    """

    def __init__(self, images, labels, *, batch_size, seed, policy="autoaugment", crop_pad=4, flip=True, random_erasing=0.25,
                 mixup=0.8, cutmix=1.0, mix_prob=1.0, mix_mode="batch", mean, std, dtype=torch.float32):
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[2:] != (images.shape[1], 3) or images.shape[1] < 8:
            raise ValueError(f"cannot augment images ({images.dtype} {tuple(images.shape)}). "
                             "give torch.uint8 (N, size, size, 3), size >= 8")
        if mix_mode not in MIX_MODES:
            raise ValueError(f"unknown mix_mode ({mix_mode}). choose one of {', '.join(MIX_MODES)}")
        if len(images) < batch_size:
            raise ValueError(f"fewer images than one batch ({len(images)} < {batch_size}). use a smaller batch, or more images")
        size = images.shape[1]
        self.batch_size, self.steps, self.mix_each = batch_size, len(images) // batch_size, mix_mode == "elem"
        self.sampler = Sampler(size, build_tables(policy, size).to(images.device), seed=seed, crop_pad=crop_pad, flip=flip,
                               random_erasing=random_erasing, mixup=mixup, cutmix=cutmix, mix_prob=mix_prob)
        self.fused, self._images = is_fused(images), images
        if kernels.use_triton(images) and not self.fused:
            _print_once(f"images of {size}x{size} are augmented in plain PyTorch: the fused kernel takes "
                        + " and ".join(f"{size}x{size}" for size in WARPS))
        self._batches = (FusedBatches if self.fused else CpuBatches)(
            images, labels, self.sampler, batch_size=batch_size, mix_each=self.mix_each, mean=mean, std=std, dtype=dtype)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of `epoch`; may wait for the device.  A captured CUDA graph follows, too, where the kernel runs."""
        self.epoch = epoch
        self._batches.set_epoch(epoch, self.sampler.order(epoch, len(self._images)))

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

    def treatments(self, epoch: int, steps: range, rows: range) -> Treatments:
        """What is done to `rows` of the batches `steps` of an epoch, which need not be the one that is set."""
        first = torch.tensor(steps, device=self._images.device)[:, None] * self.batch_size
        own = torch.arange(rows.start, rows.stop, device=first.device)
        draws = self.sampler.images(epoch, first + own)
        mixes = self.sampler.mixes(epoch, first + own * self.mix_each)
        mixed, cut = (mixes.share < 1) & ((own ^ 1) < self.batch_size), mixes.lam == 1  # an odd last row has no partner
        return Treatments((draws.codes != 0).any(2), draws.erased[..., 2] > draws.erased[..., 0], mixed & ~cut, mixed & cut)

    def describe(self, step: int) -> list[str]:
        """What is drawn for each row of batch `step`, such as "shear y, posterize | cutmix 0.63": 0.63 of it is its own."""
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size, device=self._images.device)
        draws = self.sampler.images(self.epoch, positions)
        mixes = self.sampler.mixes(self.epoch, positions if self.mix_each else positions[:1].expand(self.batch_size))
        names = [re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower() for name, _ in self.sampler.policy.operations]
        done = [[names[code] for code in codes if code] + ["erase"] * (bottom > top)
                for codes, (top, _, bottom, _) in zip(draws.codes.tolist(), draws.erased.tolist())]
        mixed = [f" | {'mixup' if lam < 1 else 'cutmix'} {share:.2f}" if share < 1 else ""
                 for lam, share in zip(mixes.lam.tolist(), mixes.share.tolist())]
        return [(", ".join(words) or "as it is") + (mixed[row] if row ^ 1 < self.batch_size else "")
                for row, words in enumerate(done)]


def is_fused(images) -> bool:
    """Whether one launch makes a batch of these images; it then reads the step on the device."""
    return kernels.use_triton(images) and images.shape[1] in WARPS


@functools.cache
def _print_once(sentence: str) -> None:
    print(sentence)
