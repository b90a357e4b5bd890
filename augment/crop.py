"""The crop of resized windows on the CPU path.  Its specification is naive.py."""
import torch
import torch.nn.functional as F

from kernels.augment_constants import PLACE_BITS


def resized_crop(images: torch.Tensor, windows: torch.Tensor, size: int, lines: int) -> torch.Tensor:
    """uint8 (rows, 3*size*size): windows of `images`, uint8 (rows, stored, stored, 3), resized as in naive.py and then mirrored.

    windows: int64 (rows, 5): top, left, height, width, and 1 to mirror, or 0.  lines: the sum of the heights.
    """
    rows, stored = images.shape[:2]
    top, left, height, width, mirror = windows.unsqueeze(2).unbind(1)
    *columns, along = (torch.where(mirror > 0, places.flip(1), places) for places in _between(width, size))
    image = torch.arange(rows, device=images.device).repeat_interleave(height.view(-1), output_size=lines)
    first = height.cumsum(0) - height  # line of each window among the lines of all
    to_stored = torch.arange(0, rows * stored, stored, device=images.device).unsqueeze(1) + top - first
    line = torch.arange(lines, device=images.device) + to_stored.view(-1).index_select(0, image)
    line = (line * stored).int().unsqueeze(1)
    places = ((left + column).int().index_select(0, image).add_(line).view(-1) for column in columns)
    before, after = (images.view(-1, 3).index_select(0, place).view(lines, 3 * size).to(torch.int16) for place in places)
    # Whole numbers below 2^16, in int16, whose products and sums wrap around: half the memory of int32.
    along = along.to(torch.int16).repeat_interleave(3, 1).index_select(0, image)
    squeezed = before.mul_(2 ** PLACE_BITS - along).add_(after.mul_(along)).add_(2 ** (PLACE_BITS - 1)).view(torch.uint16)
    # Sums below 2^24 are exact in float32. The two lines of each line are read, weighted and added in one pass.
    *between, down = _between(height, size)
    down = down / 2 ** (2 * PLACE_BITS)
    weighed = F.embedding_bag(torch.stack([first + line for line in between], 2).view(-1, 2), squeezed.float(), mode="sum",
                              per_sample_weights=torch.stack([2 ** -PLACE_BITS - down, down], 2).view(-1, 2))
    return weighed.to(torch.int16).to(torch.uint8).view(rows, -1)


def _between(length, size):
    """The two pixels between which each of `size` pixels is read, and the weight of the second in 256ths, int64 (rows, size)."""
    number = torch.arange(size, device=length.device)
    place = ((((2 * number + 1) * length - size) << PLACE_BITS) + size).clamp_(min=0) // (2 * size)
    place = torch.minimum(place, (length - 1) << PLACE_BITS)
    before = place >> PLACE_BITS
    return before, torch.minimum(before + 1, length - 1), place & 2 ** PLACE_BITS - 1
