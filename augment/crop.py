"""The crop of resized windows on the CPU path.  Its specification is naive.py."""
import torch

from kernels.augment_constants import PLACE_BITS


def resized_crop(images: torch.Tensor, windows: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (rows, 3*size*size): windows of `images`, uint8 (rows, stored, stored, 3), resized as in naive.py and then mirrored.

    windows: int64 (rows, 5): top, left, height, width, and 1 to mirror, or 0.
    """
    rows, stored = images.shape[:2]
    top, left, height, width, mirror = windows.unsqueeze(2).unbind(1)
    *lines, down = _between(top, height, size)
    *columns, along = (torch.where(mirror > 0, places.flip(1), places) for places in _between(left, width, size))
    first = torch.arange(0, rows * stored, stored, device=images.device).unsqueeze(1)
    flat = images.view(rows * stored, 3 * stored)
    above, below = (flat.index_select(0, (first + line).view(-1)).view(rows, size, -1).int() for line in lines)
    squeezed = _weigh(above, below, down.unsqueeze(2))
    channels = torch.arange(3, device=images.device)
    places = ((3 * column.unsqueeze(2) + channels).view(rows, 1, -1).expand(-1, size, -1) for column in columns)
    before, after = (squeezed.gather(2, place) for place in places)
    result = _weigh(before, after, along.repeat_interleave(3, 1).unsqueeze(1))
    return result.add_(2 ** (2 * PLACE_BITS - 1)).bitwise_right_shift_(2 * PLACE_BITS).to(torch.uint8).view(rows, -1)


def _between(start, length, size):
    """The two pixels between which each of `size` pixels is read, int64 (rows, size), and the weight of the second, int32."""
    number = torch.arange(size, device=start.device)
    place = ((((2 * number + 1) * length - size) << PLACE_BITS) + size).clamp_(min=0) // (2 * size)
    place = torch.minimum(place, (length - 1) << PLACE_BITS)
    before = place >> PLACE_BITS
    return start + before, start + torch.minimum(before + 1, length - 1), (place & 2 ** PLACE_BITS - 1).int()


def _weigh(before, after, weight):
    """A whole number of 2**PLACE_BITS parts, in place of `before`."""
    return before.mul_(2 ** PLACE_BITS - weight).add_(after.mul_(weight))
