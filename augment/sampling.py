"""What is drawn for each image: a function of (seed, epoch, position in the epoch) alone, in whole numbers and tables.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns the counter (position, epoch, stream, 0)
under the 64-bit seed into four words in [0, 2^32).  No logarithm, root or power is taken of them, so every device draws the same.
"""
import math
from typing import NamedTuple

import torch

from augment.policy import PolicyTables
from kernels.augment_constants import BOX_BITS, CROP, ERASE, MIX, POLICY, QUANTILE_BITS, STREAMS

ORDER = len(STREAMS)  # drawn on the host alone
QUANTILES = 2 ** QUANTILE_BITS  # entries of a table that stands for a distribution
FINE = 256  # parts of a pixel that the law of erased boxes is integrated in
GRID = 1024  # parts of the shares of the area, and of the ratios, that the law of windows is counted in
ATTEMPTS = 10  # of torchvision, to draw a box that fits
WORD = 0xFFFFFFFF


def philox(seed: int, *counter) -> tuple:
    """Four words in [0, 2^32) for a counter of four words, ints or int64 tensors that broadcast; of the seed, 64 bits count."""
    first, second, third, fourth = (word & WORD for word in counter)
    low, high = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        # A product may reach into the sign bit; the shift copies that bit, and the mask drops the copies.
        left, right = first * 0xD2511F53, third * 0xCD9E8D57
        first, third = (right >> 32 & WORD) ^ second ^ low, (left >> 32 & WORD) ^ fourth ^ high
        second, fourth = right & WORD, left & WORD
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return first, second, third, fourth


def below(word: torch.Tensor, limit) -> torch.Tensor:
    """A whole number in [0, limit), by the high bits of a word."""
    return word * limit >> 32


def beta_quantiles(alpha: float) -> torch.Tensor:
    """float32 (QUANTILES,): the quantiles of Beta(alpha, alpha) at (k + 0.5) / QUANTILES."""
    # Integrates the density up to 1/2, symmetry gives the rest. In u, x = u^(1/alpha) / 2, it has no pole at 0 where alpha < 1.
    power = min(alpha, 1.0)
    u = torch.linspace(0, 1, 2 ** 16 + 1, dtype=torch.float64)
    x = u ** (1 / power) / 2
    density = (2 - 2 * x if alpha < 1 else 4 * x * (1 - x)) ** (alpha - 1)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), (density[1:] + density[:-1]).cumsum(0)])
    mass /= 2 * mass[-1]
    wanted = (torch.arange(QUANTILES // 2, dtype=torch.float64) + 0.5) / QUANTILES
    right = torch.searchsorted(mass, wanted)
    share = (wanted - mass[right - 1]) / (mass[right] - mass[right - 1])
    lower = torch.lerp(u[right - 1], u[right], share) ** (1 / power) / 2
    return torch.cat([lower, 1 - lower.flip(0)]).float()


def erase_sizes(size: int) -> torch.Tensor:
    """int64 (2**BOX_BITS, 2): heights and widths of boxes, each as often as torchvision's RandomErasing erases it in size x size.

    It draws a share of the area, uniform in [0.02, 0.33], and a ratio h / w, log-uniform in [0.3, 3.3]; rounds h and w; and draws
    again where one is not below `size`.  In (h, w) that is a uniform density between two hyperbolas and two lines, so a size's
    chance is what it cuts out of that region.  After ten draws in vain torchvision erases nothing: a chance below 1e-9, left out.
    """
    h = ((torch.arange(size * FINE, dtype=torch.float64) + 0.5) / FINE - 0.5).clamp(min=0.1 / FINE)
    least, most = torch.maximum(0.02 * size * size / h, h / 3.3), torch.minimum(0.33 * size * size / h, h / 0.3)
    edges = torch.arange(size, dtype=torch.float64) - 0.5
    inside = torch.minimum(most[:, None], edges + 1) - torch.maximum(least[:, None], edges)
    law = inside.clamp(min=0).view(size, FINE, size).sum(1)
    return _table(law / law.sum())


def crop_sizes(size: int, scale, ratio) -> torch.Tensor:
    """int64 (2**BOX_BITS, 2): heights and widths, each as often as torchvision's RandomResizedCrop cuts it out of size x size.

    It draws a share of the area, uniform in `scale`, and a ratio w / h, log-uniform in `ratio`; rounds h and w; and draws again
    where one is above `size`.  After ten draws in vain it takes the largest window with the ratio in `ratio` that is next to 1.
    Szegedy et al. 2014, arXiv 1409.4842.
    """
    grid = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    area = (size * size * (scale[0] + (scale[1] - scale[0]) * grid))[:, None]
    ratios = (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * grid).exp()
    height, width = (area / ratios).sqrt().round().long(), (area * ratios).sqrt().round().long()
    fits = (height > 0) & (width > 0) & (height <= size) & (width <= size)
    law = torch.bincount((height * (size + 1) + width)[fits], minlength=(size + 1) ** 2).view(size + 1, -1) / float(GRID ** 2)
    rejected = float(1 - law.sum())
    law *= sum(rejected ** attempt for attempt in range(ATTEMPTS))
    nearest = min(max(1.0, ratio[0]), ratio[1])
    law[round(size / max(nearest, 1)), round(size * min(nearest, 1))] += rejected ** ATTEMPTS
    return _table(law)


def _table(law: torch.Tensor) -> torch.Tensor:
    """int64 (2**BOX_BITS, 2): rows and columns of `law`, each as often as it has it; largest remainders are rounded up."""
    wanted = law.flatten() * 2 ** BOX_BITS
    counts = wanted.long()
    counts[(wanted - counts).argsort(descending=True, stable=True)[:2 ** BOX_BITS - counts.sum()]] += 1
    chosen = torch.arange(law.numel()).repeat_interleave(counts)
    return torch.stack([chosen // law.shape[1], chosen % law.shape[1]], 1)


class ImageDraws(NamedTuple):
    """What happens to each image; a box is top, left, bottom, right, and empty where there is none."""
    top: torch.Tensor  # int64 (...), of the window in the padded image, or in the image that it is resized from
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    mirror: torch.Tensor  # bool (...), after the crop
    codes: torch.Tensor  # int64 (..., slots), of PolicyTables
    erased: torch.Tensor  # int64 (..., 4)


class MixDraws(NamedTuple):
    pasted: torch.Tensor  # int64 (..., 4), the box that shows the partner
    lam: torch.Tensor  # float32 (...), the weight of the image outside of that box
    share: torch.Tensor  # float32 (...), of the image in the whole: what its label is worth


class Sampler:
    """Draws for results of size x size pixels, on the device of `policy`; the options are those of BatchAugmenter.

    stored: side of the images, of which windows are resized to `size`; None: images of `size` are padded and cropped.
    """

    def __init__(self, size: int, policy: PolicyTables, *, seed, crop_pad, flip, random_erasing, mixup, cutmix, mix_prob,
                 stored=None, scale=None, ratio=None):
        self.size, self.policy, self.seed, self.crop_pad, self.flip = size, policy, seed, crop_pad, flip
        self.resized = stored is not None
        self.crop_from = stored if self.resized else size + 2 * crop_pad
        self.erase_threshold = int(random_erasing * 2 ** 32)
        self.mix_threshold = int(mix_prob * 2 ** 32) if mixup or cutmix else 0
        self.cutmix_threshold = 0 if not cutmix else 1 if mixup else 2  # to be compared with one random bit
        device = policy.codes.device
        self.pixels = torch.tensor(float(size * size), device=device)  # see cpu._constants
        self.crop_sizes = crop_sizes(stored, scale, ratio).to(device) if self.resized else torch.full((1, 2), size, device=device)
        self.erase_sizes = erase_sizes(size).to(device)
        self.lams = beta_quantiles(mixup or 1.0).to(device)  # of what is off, any table will do
        self.half_sides = (0.5 * (1 - beta_quantiles(cutmix or 1.0).double()).sqrt() * size).long().to(device)

    def order(self, epoch: int, images: int) -> torch.Tensor:
        """int64 (images,) on the CPU: the permutation of the epoch."""
        word = philox(self.seed, 0, epoch, ORDER, 0)[0]  # one is enough: a CPU generator keeps 32 bits of its seed
        return torch.randperm(images, generator=torch.Generator().manual_seed(word))

    def images(self, epoch: int, positions: torch.Tensor) -> ImageDraws:
        """What happens to the images at `positions`, int64 (...), of the epoch."""
        top, left, mirror, quantile = philox(self.seed, positions, epoch, CROP, 0)
        sides = self.crop_sizes[below(quantile, len(self.crop_sizes))]
        height, width = sides.unbind(-1)
        window = below(torch.stack([top, left], -1), self.crop_from + 1 - sides)
        mirror = (mirror & int(self.flip)).bool()

        slots = self.policy.codes.shape[1]
        subpolicy, first, second, signs = philox(self.seed, positions, epoch, POLICY, 0)
        subpolicy = below(subpolicy, len(self.policy.codes))
        applied = torch.stack([first, second], -1)[..., :slots] < self.policy.thresholds[subpolicy]
        signs = torch.stack([signs & 1, signs >> 1 & 1], -1)[..., :slots]
        codes = self.policy.codes[subpolicy].gather(-1, signs.unsqueeze(-1)).squeeze(-1) * applied

        fires, quantile, top, left = philox(self.seed, positions, epoch, ERASE, 0)
        sides = self.erase_sizes[below(quantile, 2 ** BOX_BITS)] * (fires < self.erase_threshold).unsqueeze(-1)
        corner = below(torch.stack([top, left], -1), self.size + 1 - sides)
        return ImageDraws(window[..., 0], window[..., 1], height, width, mirror, codes, torch.cat([corner, corner + sides], -1))

    def mixes(self, epoch: int, positions: torch.Tensor) -> MixDraws:
        """How the images are mixed that share a draw, where the first of them are at `positions`, int64 (...), of the epoch."""
        fires, quantile, line, column = philox(self.seed, positions, epoch, MIX, 0)
        mixed, cut = fires < self.mix_threshold, (quantile & 1) < self.cutmix_threshold
        quantile = below(quantile, QUANTILES)
        half_side = (self.half_sides[quantile] * (mixed & cut)).unsqueeze(-1)
        centre = below(torch.stack([line, column], -1), self.size)
        pasted = torch.cat([centre - half_side, centre + half_side], -1).clamp_(0, self.size)
        area = (pasted[..., 2] - pasted[..., 0]) * (pasted[..., 3] - pasted[..., 1])
        lam = torch.where(mixed & ~cut, self.lams[quantile], 1.0)
        return MixDraws(pasted, lam, torch.where(cut, 1 - area.float() / self.pixels, lam))
