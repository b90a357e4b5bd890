"""A training batch from uint8 images in one launch: gather, crop, flip, policy, normalise, erase and mix, with its own draws.

A program makes rows 2k and 2k+1 of the batch, which are each other's partners in a mix.  Of each it draws from Philox4x32-10,
under a 64-bit seed and with the counter (position in the epoch, epoch, stream, 0), what is to be done, and does it:

    window     size x size pixels of the image, padded with zeros, by two draws below 2 * pad + 1; mirrored, by one bit
    policy     up to two operations, each of one kind; x is a byte of the image, f = ratio and 1 - f = complement, c a channel
        GEOMETRY      the pixel that a map names, or 0                 SHARPNESS   f * x + (1-f) * mean of 3 x 3, x five times
        COLOR         f * x + (1-f) * gray                             CONTRAST    f * x + (1-f) * mean of gray
        EQUALIZE      a table of 256 from the histogram of c           LOOKUP      a table of 256 that is given
        AUTOCONTRAST  (x - min c) * 255 / (max c - min c)
    normalise  (x / 255 - mean) / std, by a table;   erase   zeros in a box
    mix        w * row + (1-w) * partner, where w is 0 inside of a pasted box and lam outside

The reference is the plain-PyTorch twin in augment/: ops.py has the arithmetic, sampling.py the draws, and policy.py fills the
tables.  The two agree bit for bit, since both take whole numbers and tables, and round every product and every sum by itself: the
kernel is compiled without fused multiply-adds.  (For sm_120 the assembler in Triton 3.6 fuses some all the same; that in 3.8 does
not.)
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

KINDS = NOTHING, GEOMETRY, SHARPNESS, COLOR, CONTRAST, EQUALIZE, AUTOCONTRAST, LOOKUP = tuple(map(tl.constexpr, range(8)))
STREAMS = CROP, POLICY, ERASE, MIX = tuple(map(tl.constexpr, range(4)))
QUANTILE_BITS = tl.constexpr(12)  # of the tables that stand for distributions
WARPS = {32: 8, 64: 16}  # by the sizes of image that the kernel takes
LINES = tl.constexpr(16)  # of an image, that are written at a time: more of them need more registers than there are


class Numbers(NamedTuple):
    """What the draws depend on besides tables, int64.  A probability is a threshold: it happens where a word is below."""
    seed: int
    epoch: int
    batch_size: int
    rows_per_mix: int  # how many rows share a draw
    crop_pad: int
    flip: int  # 0 or 1
    subpolicies: int
    erase: int
    mix: int
    cutmix: int  # of one random bit


SEED, EPOCH, BATCH_SIZE, ROWS_PER_MIX, CROP_PAD, FLIP, SUBPOLICIES, ERASE_BELOW, MIX_BELOW, CUTMIX_BELOW = map(
    tl.constexpr, range(len(Numbers._fields)))


class Tables(NamedTuple):
    """What the kernel reads, contiguous tensors on one device: N images of size x size pixels, a policy and distributions."""
    images: torch.Tensor  # uint8 (N, size, size, 3)
    labels: torch.Tensor  # int64 (N,)
    order: torch.Tensor  # int64 (N,), the image at each position of the epoch
    numbers: torch.Tensor  # int64, of Numbers
    subpolicies: torch.Tensor  # int64 (S, slots, 3): the operation for a negative and a positive sign, and its threshold
    operations: torch.Tensor  # int32 (C, 2): kind, and row of maps or lookups
    blends: torch.Tensor  # float32 (C, 2): ratio, complement
    maps: torch.Tensor  # int32 (G, size*size): the pixel that each pixel is from; size*size is fill, 0
    lookups: torch.Tensor  # uint8 (L, 256)
    stretch: torch.Tensor  # float32 (256,): AutoContrast's factor by the range of a channel
    normalised: torch.Tensor  # float32 (3, 256)
    erase_sizes: torch.Tensor  # int32 (2**QUANTILE_BITS, 2): heights and widths
    lams: torch.Tensor  # float32 (2**QUANTILE_BITS,)
    half_sides: torch.Tensor  # int32 (2**QUANTILE_BITS,), of the pasted box


# --- the draws: see augment/sampling.py ---------------------------------------------------------------------------------

@triton.jit
def _below(word, limit):
    return tl.umulhi(word, limit.to(tl.uint32)).to(tl.int32)


@triton.jit
def _words(position, stream, tables):
    epoch = tl.load(tables.numbers + EPOCH).to(tl.int32)
    return tl.philox(tl.load(tables.numbers + SEED), position.to(tl.int32), epoch, stream, 0)


@triton.jit
def _draw_window(position, tables):
    """Top and left edge in the image without its padding, and whether to mirror."""
    top, left, mirror, _ = _words(position, CROP, tables)
    pad = tl.load(tables.numbers + CROP_PAD).to(tl.int32)
    mirror = mirror.to(tl.int64) & tl.load(tables.numbers + FLIP)
    return _below(top, 2 * pad + 1) - pad, _below(left, 2 * pad + 1) - pad, mirror > 0


@triton.jit
def _draw_operation(subpolicy, word, sign, tables):
    wanted = tl.load(tables.subpolicies + subpolicy + sign)
    return tl.where(word.to(tl.int64) < tl.load(tables.subpolicies + subpolicy + 2), wanted, 0).to(tl.int32)


@triton.jit
def _draw_operations(position, tables, SLOTS: tl.constexpr):
    """Two codes, 0 for nothing."""
    subpolicy, first_word, second_word, signs = _words(position, POLICY, tables)
    subpolicy = _below(subpolicy, tl.load(tables.numbers + SUBPOLICIES)) * (3 * SLOTS)
    first = _draw_operation(subpolicy, first_word, (signs & 1).to(tl.int32), tables)
    second = first * 0
    if SLOTS == 2:
        second = _draw_operation(subpolicy + 3, second_word, ((signs >> 1) & 1).to(tl.int32), tables)
    return first, second


@triton.jit
def _draw_erased(position, tables, SIZE: tl.constexpr):
    """A box: top, left, bottom, right; empty where there is none."""
    fires, quantile, top, left = _words(position, ERASE, tables)
    fires = (fires.to(tl.int64) < tl.load(tables.numbers + ERASE_BELOW)).to(tl.int32)
    quantile = (quantile >> (32 - QUANTILE_BITS)).to(tl.int32)
    height = tl.load(tables.erase_sizes + 2 * quantile) * fires
    width = tl.load(tables.erase_sizes + 2 * quantile + 1) * fires
    top, left = _below(top, SIZE + 1 - height), _below(left, SIZE + 1 - width)
    return top, left, top + height, left + width


@triton.jit
def _draw_mix(position, alone, tables, SIZE: tl.constexpr):
    """The pasted box, the weight of the image outside of it, and its share in the whole; nothing is mixed where it is alone."""
    fires, quantile, line, column = _words(position, MIX, tables)
    mixed = (fires.to(tl.int64) < tl.load(tables.numbers + MIX_BELOW)) & (alone == 0)
    cut = mixed & ((quantile & 1).to(tl.int64) < tl.load(tables.numbers + CUTMIX_BELOW))
    quantile = (quantile >> (32 - QUANTILE_BITS)).to(tl.int32)
    half_side = tl.where(cut, tl.load(tables.half_sides + quantile), 0)
    line, column = _below(line, half_side * 0 + SIZE), _below(column, half_side * 0 + SIZE)
    top, left = tl.maximum(line - half_side, 0), tl.maximum(column - half_side, 0)
    bottom, right = tl.minimum(line + half_side, SIZE), tl.minimum(column + half_side, SIZE)
    lam = tl.where(mixed & (cut == 0), tl.load(tables.lams + quantile), 1.0)
    area = ((bottom - top) * (right - left)).to(tl.float32)
    return (top, left, bottom, right), lam, tl.where(cut, 1.0 - area * (1.0 / (SIZE * SIZE)), lam)


# --- the arithmetic: see augment/ops.py ---------------------------------------------------------------------------------
# An image is int32 (size*size,), a pixel is red + 256 * green + 65536 * blue.

@triton.jit
def _unpack(pixels):
    return pixels & 255, (pixels >> 8) & 255, (pixels >> 16) & 255


@triton.jit
def _pack(red, green, blue):
    return red | (green << 8) | (blue << 16)


@triton.jit
def _whole(values):
    return tl.minimum(tl.maximum(values, 0.0), 255.0).to(tl.int32)


@triton.jit
def _read(index, position, tables, SIZE: tl.constexpr):
    """A window of image `index`, by address: cropping and mirroring cost nothing more."""
    top, left, mirror = _draw_window(position, tables)
    pixel = tl.arange(0, SIZE * SIZE)
    line, column = pixel // SIZE + top, pixel % SIZE
    column = tl.where(mirror, SIZE - 1 - column, column) + left
    inside = (line >= 0) & (line < SIZE) & (column >= 0) & (column < SIZE)
    source = tables.images + index * (3 * SIZE * SIZE) + (line * SIZE + column) * 3
    return _pack(tl.load(source, inside, 0).to(tl.int32), tl.load(source + 1, inside, 0).to(tl.int32),
                 tl.load(source + 2, inside, 0).to(tl.int32))


@triton.jit
def _gray(red, green, blue):
    return (0.2989 * red.to(tl.float32) + 0.587 * green.to(tl.float32) + 0.114 * blue.to(tl.float32)).to(tl.int32)


@triton.jit
def _blend(channel, other, ratio, complement):
    return _whole(ratio * channel.to(tl.float32) + complement * other.to(tl.float32))


@triton.jit
def _smooth(channel, above, here, below):
    """Rounded (3 x 3 sum + 4 * centre) / 13, without ties; in each argument the low ten bits count."""
    return (2 * ((above & 1023) + (here & 1023) + (below & 1023) + 4 * channel) + 13) // 26


@triton.jit
def _blur(red, green, blue, SIZE: tl.constexpr):
    pixel = tl.arange(0, SIZE * SIZE)
    last = SIZE * SIZE - 1
    wide = red | (green << 10) | (blue << 20)  # ten bits hold the sum of three bytes
    wide += tl.gather(wide, tl.maximum(pixel - 1, 0), 0) + tl.gather(wide, tl.minimum(pixel + 1, last), 0)
    above, below = tl.gather(wide, tl.maximum(pixel - SIZE, 0), 0), tl.gather(wide, tl.minimum(pixel + SIZE, last), 0)
    line, column = pixel // SIZE, pixel % SIZE
    border = (line == 0) | (line == SIZE - 1) | (column == 0) | (column == SIZE - 1)
    return (tl.where(border, red, _smooth(red, above, wide, below)),
            tl.where(border, green, _smooth(green, above >> 10, wide >> 10, below >> 10)),
            tl.where(border, blue, _smooth(blue, above >> 20, wide >> 20, below >> 20)))


@triton.jit
def _equalize(channel, PIXELS: tl.constexpr):
    histogram = tl.histogram(channel, 256)
    brightest = tl.sum(tl.where(tl.arange(0, 256) == tl.max(channel, 0), histogram, 0), 0)
    step = (PIXELS - brightest) // 255
    darker = tl.cumsum(histogram, 0) - histogram
    lookup = tl.minimum((darker + step // 2) // tl.maximum(step, 1), 255)
    return tl.where(step > 0, tl.gather(lookup, channel, 0), channel)


@triton.jit
def _stretch(channel, tables):
    low, high = tl.min(channel, 0), tl.max(channel, 0)
    return _whole((channel - tl.where(low == high, 0, low)).to(tl.float32) * tl.load(tables.stretch + high - low))


@triton.jit
def _operate(pixels, code, tables, SIZE: tl.constexpr):
    """The image after operation `code`, a scalar, so that a program branches as one."""
    PIXELS: tl.constexpr = SIZE * SIZE
    kind, argument = tl.load(tables.operations + 2 * code), tl.load(tables.operations + 2 * code + 1)
    if kind == GEOMETRY:
        source = tl.load(tables.maps + argument * PIXELS + tl.arange(0, PIXELS))
        pixels = tl.where(source < PIXELS, tl.gather(pixels, tl.minimum(source, PIXELS - 1), 0), 0)
    elif kind != NOTHING:
        red, green, blue = _unpack(pixels)
        if kind == LOOKUP:
            lookup = tables.lookups + argument * 256
            red, green = tl.load(lookup + red).to(tl.int32), tl.load(lookup + green).to(tl.int32)
            blue = tl.load(lookup + blue).to(tl.int32)
        elif kind == EQUALIZE:
            red, green, blue = _equalize(red, PIXELS), _equalize(green, PIXELS), _equalize(blue, PIXELS)
        elif kind == AUTOCONTRAST:
            red, green, blue = _stretch(red, tables), _stretch(green, tables), _stretch(blue, tables)
        else:
            ratio, complement = tl.load(tables.blends + 2 * code), tl.load(tables.blends + 2 * code + 1)
            if kind == SHARPNESS:
                other_red, other_green, other_blue = _blur(red, green, blue, SIZE)
                red, green = _blend(red, other_red, ratio, complement), _blend(green, other_green, ratio, complement)
                blue = _blend(blue, other_blue, ratio, complement)
            else:
                gray = _gray(red, green, blue).to(tl.float32)
                if kind == CONTRAST:  # the mean is exact: a sum of whole numbers below 2^24, and a power of two
                    gray = tl.zeros([PIXELS], tl.float32) + tl.sum(gray, 0) * (1.0 / PIXELS)
                red, green = _blend(red, gray, ratio, complement), _blend(green, gray, ratio, complement)
                blue = _blend(blue, gray, ratio, complement)
        pixels = _pack(red, green, blue)
    return pixels


# From here on an image is worked on in tiles (LINES, WIDTH) of the values of its lines: a thread writes values that lie side by
# side, and line and column come without a division for each.  WIDTH is the next power of two after 3 * size.

@triton.jit
def _tile(first_line, WIDTH: tl.constexpr):
    return first_line + tl.arange(0, LINES)[:, None], tl.arange(0, WIDTH)[None, :]


@triton.jit
def _inside(line, byte, box):
    top, left, bottom, right = box
    return ((line >= top) & (line < bottom)) & ((byte // 3 >= left) & (byte // 3 < right))


@triton.jit
def _normalised(pixels, line, byte, erased, tables, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """float32 (LINES, WIDTH); what lies beyond 3 * size is arbitrary."""
    channel = byte % 3
    packed = tl.gather(pixels, tl.reshape(line * SIZE + tl.minimum(byte // 3, SIZE - 1), [LINES * WIDTH]), 0)
    values = tl.load(tables.normalised + channel * 256 + ((tl.reshape(packed, [LINES, WIDTH]) >> (8 * channel)) & 255))
    return tl.where(_inside(line, byte, erased), 0.0, values)


@triton.jit
def _write_mixed(out, row, own, partner, line, byte, pasted, lam, SIZE: tl.constexpr):
    weights = tl.where(_inside(line, byte, pasted), 0.0, lam)
    values = weights * own + (1.0 - weights) * partner
    place = out + row.to(tl.int64) * (3 * SIZE * SIZE) + line * (3 * SIZE) + byte
    tl.store(place, values.to(out.dtype.element_ty), byte < 3 * SIZE)


@triton.jit
def _write_targets(row, own, partner, share, label, other, lam):
    own = tl.where(share == 0.0, partner, own)
    unmixed = (share == 1.0) | (own == partner)
    tl.store(label + row, own)
    tl.store(other + row, tl.where(unmixed, own, partner))
    tl.store(lam + row, tl.where(unmixed, 1.0, share))


@triton.jit(do_not_specialize=["step", "first", "rows"])
def _augment_kernel(step, first, rows, tables, out, out_label, out_other, out_lam, SIZE: tl.constexpr, WIDTH: tl.constexpr,
                    SLOTS: tl.constexpr):
    row = 2 * tl.program_id(0)
    alone = row + 1 == rows  # the last of an odd batch, which stands in for its partner
    start = tl.load(step) * tl.load(tables.numbers + BATCH_SIZE)
    position = start + first + row
    next_position = tl.where(alone, position, position + 1)
    index, next_index = tl.load(tables.order + position), tl.load(tables.order + next_position)
    pixels, next_pixels = _read(index, position, tables, SIZE), _read(next_index, next_position, tables, SIZE)

    if SLOTS > 0:
        # The images take turns, so that the operations are compiled once and not four times.
        code, later_code = _draw_operations(position, tables, SLOTS)
        next_code, last_code = _draw_operations(next_position, tables, SLOTS)
        for _ in range(2 * SLOTS):
            changed = _operate(pixels, code, tables, SIZE)
            pixels = next_pixels
            next_pixels = changed
            code = next_code
            next_code = later_code
            later_code = last_code

    in_batch, rows_per_mix = first + row, tl.load(tables.numbers + ROWS_PER_MIX)
    pasted, lam, share = _draw_mix(start + in_batch - in_batch % rows_per_mix, alone, tables, SIZE)
    in_batch += 1
    next_pasted, next_lam, next_share = _draw_mix(start + in_batch - in_batch % rows_per_mix, alone, tables, SIZE)
    erased, next_erased = _draw_erased(position, tables, SIZE), _draw_erased(next_position, tables, SIZE)
    for first_line in range(0, SIZE, LINES):
        line, byte = _tile(first_line, WIDTH)
        values = _normalised(pixels, line, byte, erased, tables, SIZE, WIDTH)
        next_values = _normalised(next_pixels, line, byte, next_erased, tables, SIZE, WIDTH)
        _write_mixed(out, row, values, next_values, line, byte, pasted, lam, SIZE)
        if not alone:
            _write_mixed(out, row + 1, next_values, values, line, byte, next_pasted, next_lam, SIZE)

    own, partner = tl.load(tables.labels + index), tl.load(tables.labels + next_index)
    _write_targets(row, own, partner, share, out_label, out_other, out_lam)
    if not alone:
        _write_targets(row + 1, partner, own, next_share, out_label, out_other, out_lam)


def augment_triton(step: torch.Tensor, rows: range, tables: Tables, dtype: torch.dtype):
    """`rows` of the batch with the number that is in `step`, a 0-dim int64 tensor: one launch, which reads it when it runs.

    rows: whole pairs (2k, 2k+1), of which the last may lack its second.  Nothing is checked.
    Returns images (rows, 3, size, size), channels_last, of `dtype`; int64 label, other and float32 lam, (rows,).
    """
    size, device = tables.images.shape[1], tables.images.device
    images = torch.empty(len(rows), size, size, 3, dtype=dtype, device=device)
    # Each by itself, so that all are aligned: one code for all batch sizes.
    label, other, lam = (torch.empty(len(rows), dtype=kind, device=device) for kind in (torch.int64, torch.int64, torch.float32))
    _augment_kernel[(triton.cdiv(len(rows), 2),)](
        step, rows.start, len(rows), tables, images, label, other, lam, SIZE=size, WIDTH=triton.next_power_of_2(3 * size),
        SLOTS=tables.subpolicies.shape[1], num_warps=WARPS[size], enable_fp_fusion=False)
    return images.permute(0, 3, 1, 2), label, other, lam
