"""The fused path: batches by kernels/augment.py, in one or two launches each.  naive.py says what it computes."""
import torch

from augment import cpu
from augment.sampling import WORD, Sampler
from kernels import Targets
from kernels import augment as kernel
from kernels.augment_constants import CONTRAST, KINDS, SHARPNESS


class FusedBatches:
    """Makes batches of `images` on their device; the arguments are those of BatchAugmenter."""

    def __init__(self, images, labels, rows, sampler: Sampler, *, batch_size, mix_each, mean, std, dtype):
        policy, device, images = sampler.policy, images.device, images.contiguous() if rows is None else images[rows]
        if images.storage_offset() % 4:  # a part of other memory; the kernel reads whole words
            images = images.clone()
        parameters = kernel.Parameters(
            seed=(sampler.seed + 2 ** 63 & 2 ** 64 - 1) - 2 ** 63,  # its low 64 bits, as a signed number
            epoch=0, batch_size=batch_size, mix_each=int(mix_each), crop_pad=sampler.crop_pad, flip=int(sampler.flip),
            subpolicies=len(policy.codes), erase=sampler.erase_threshold, mix=sampler.mix_threshold,
            cutmix=sampler.cutmix_threshold)
        boxes = [sampler.erase_sizes, sampler.crop_sizes] if sampler.resized else [sampler.erase_sizes]
        blended = (policy.kind >= SHARPNESS) & (policy.kind <= CONTRAST)
        row = torch.where(blended, torch.arange(len(blended), device=device), policy.argument)
        operations = policy.kind + len(KINDS) * row
        every_byte = torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(-1, 3)
        self.size, self.dtype, self._steps = sampler.size, dtype, torch.arange(len(images) // batch_size, device=device)
        self.tables = kernel.Tables(
            images=images.view(*images.shape[:2], -1).view(torch.int32), labels=labels.contiguous(),
            order=torch.empty(len(images), dtype=torch.int64, device=device),
            parameters=torch.tensor(parameters, device=device),
            subpolicies=torch.cat([operations[policy.codes], policy.thresholds.unsqueeze(2)], 2),
            blends=torch.stack([policy.ratio, policy.complement], 1),
            maps=policy.maps, lookups=policy.lookups, stretch=policy.stretch,
            normalised=cpu.normalise(every_byte, torch.tensor(mean), torch.tensor(std)).T.contiguous().to(device),
            boxes=torch.cat(boxes).int(), lams=sampler.lams, half_sides=sampler.half_sides.int())

    def set_epoch(self, epoch: int, order: torch.Tensor) -> None:
        """Write the epoch where the kernel reads it, also from within a captured CUDA graph."""
        self.tables.order.copy_(order)
        self.tables.parameters[kernel.EPOCH.value] = epoch & WORD

    def batch(self, step: int | torch.Tensor, rows: range) -> tuple[torch.Tensor, Targets]:
        step = step if isinstance(step, torch.Tensor) else self._steps[step]
        images, *targets = kernel.augment_triton(step, rows, self.tables, self.size, self.dtype)
        return images, Targets(*targets)
