"""A training batch from uint8 images in one launch: gather, crop, flip, policy, normalise, erase and mix, with its own draws.

A program makes rows 2k and 2k+1 of the batch, which are each other's partners in a mix.  For each it draws from Philox4x32-10,
under a 64-bit seed and with the counter (position in the epoch, epoch, stream, 0), what is to be done, and does it:

    window     size x size pixels of the image, padded with zeros, by two draws below 2 * pad + 1; mirrored, by one bit
               or a box of the image, of a size from a table, resized to size x size by bilinear interpolation in whole numbers
    policy     up to two operations, each of one kind; x is a byte of the image, f = ratio and 1 - f = complement, c a channel
        GEOMETRY      the pixel that a map names, or 0                 SHARPNESS   f * x + (1-f) * mean of 3 x 3, x five times
        COLOR         f * x + (1-f) * gray                             CONTRAST    f * x + (1-f) * mean of gray
        EQUALIZE      a table of 256 from the histogram of c           LOOKUP      a table of 256 that is given
        AUTOCONTRAST  (x - min c) * 255 / (max c - min c)
    normalise  (x / 255 - mean) / std, by a table;   erase   zeros in a box
    mix        w * row + (1-w) * partner, where w is 0 inside of a pasted box and lam outside

The specification is augment/naive.py.  The CPU path is augment/cpu.py; sampling.py makes the draws, and
policy.py fills the tables.  All agree bit for bit, since they take whole numbers and tables, and round every product and sum
by itself: the kernel is compiled without fused multiply-adds.  (For sm_120 the assembler in Triton 3.6 fuses some all the same;
that in 3.8 does not.)
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import augment_constants
from kernels.augment_constants import WARPS

NOTHING, GEOMETRY, SHARPNESS, COLOR, CONTRAST, EQUALIZE, AUTOCONTRAST, LOOKUP = map(tl.constexpr, augment_constants.KINDS)
CROP, POLICY, ERASE, MIX = map(tl.constexpr, augment_constants.STREAMS)
QUANTILE_BITS, BOX_BITS = tl.constexpr(augment_constants.QUANTILE_BITS), tl.constexpr(augment_constants.BOX_BITS)
BOXES = tl.constexpr(2 ** augment_constants.BOX_BITS)
ONE = tl.constexpr(2 ** augment_constants.PLACE_BITS)  # pixel, in the units of a place between two


class Parameters(NamedTuple):
    """Scalar parameters of the draws, int64.  A probability is a threshold: the event happens where a word is below it."""
    seed: int
    epoch: int
    batch_size: int
    mix_each: int  # 1: each row has its own draw; 0: the batch has one
    crop_pad: int
    flip: int  # 0 or 1
    subpolicies: int
    erase: int
    mix: int
    cutmix: int  # of one random bit


SEED, EPOCH, BATCH_SIZE, MIX_EACH, CROP_PAD, FLIP, SUBPOLICIES, ERASE_BELOW, MIX_BELOW, CUTMIX_BELOW = map(
    tl.constexpr, range(len(Parameters._fields)))


class Tables(NamedTuple):
    """The kernel's inputs, contiguous tensors on one device: N images, a policy for size x size pixels and distributions."""
    images: torch.Tensor  # int32 (N, side, 3*side/4): the bytes of NHWC images, four to a word
    labels: torch.Tensor  # int64 (N,)
    order: torch.Tensor  # int64 (N,), the image at each position of the epoch
    parameters: torch.Tensor  # int64, of Parameters
    subpolicies: torch.Tensor  # int64 (S, slots, 3): the operation for a negative and a positive sign, and its threshold;
    #                            an operation is kind + 8 * row, of `maps`, `lookups` or `blends`; 0 does nothing
    blends: torch.Tensor  # float32 (C, 2): ratio, complement
    maps: torch.Tensor  # int32 (G, size*size): the pixel that each pixel is from; size*size is fill, 0
    lookups: torch.Tensor  # uint8 (L, 256)
    stretch: torch.Tensor  # float32 (256,): AutoContrast's factor by the range of a channel
    normalised: torch.Tensor  # float32 (3, 256)
    boxes: torch.Tensor  # int32 (2**BOX_BITS, 2): heights and widths of erased boxes, and then as many of windows to resize
    lams: torch.Tensor  # float32 (2**QUANTILE_BITS,)
    half_sides: torch.Tensor  # int32 (2**QUANTILE_BITS,), of the pasted box


# --- the draws: see augment/sampling.py ---------------------------------------------------------------------------------
# Positions and what is drawn for them are tensors of two, one value per row: half of the work of a scalar for each.  The words
# of all streams are drawn at once, each by another thread of a warp.

@triton.jit
def _below(word, limit):
    return tl.umulhi(word, limit.to(tl.uint32)).to(tl.int32)


@triton.jit
def _draw_words(position, mix_position, tables):
    """Four words for each of STREAMS and each row, uint32 (4, 2)."""
    stream = tl.arange(0, 4)[:, None]
    position = tl.where(stream == MIX, mix_position[None, :], position[None, :])
    epoch = tl.load(tables.parameters + EPOCH).to(tl.int32)
    return tl.philox(tl.load(tables.parameters + SEED), position.to(tl.int32), epoch, stream, 0)


@triton.jit
def _of(stream, words):
    """The four words of one stream, uint32 (2,) each."""
    wanted = tl.arange(0, 4)[:, None] == stream
    return (tl.sum(tl.where(wanted, words[0], 0), 0), tl.sum(tl.where(wanted, words[1], 0), 0),
            tl.sum(tl.where(wanted, words[2], 0), 0), tl.sum(tl.where(wanted, words[3], 0), 0))


@triton.jit
def _draw_window(words, tables):
    """Top and left edge in the image without its padding, and whether to mirror."""
    top, left, mirror, _ = _of(CROP, words)
    pad = tl.load(tables.parameters + CROP_PAD).to(tl.int32)
    mirror = mirror.to(tl.int32) & tl.load(tables.parameters + FLIP).to(tl.int32)
    return _below(top, 2 * pad + 1) - pad, _below(left, 2 * pad + 1) - pad, mirror


@triton.jit
def _draw_resized(words, tables, SIDE: tl.constexpr):
    """Top and left edge, height and width of a window to resize, and whether to mirror the result."""
    top, left, mirror, quantile = _of(CROP, words)
    quantile = (quantile >> (32 - BOX_BITS)).to(tl.int32) + BOXES
    height, width = tl.load(tables.boxes + 2 * quantile), tl.load(tables.boxes + 2 * quantile + 1)
    mirror = mirror.to(tl.int32) & tl.load(tables.parameters + FLIP).to(tl.int32)
    return _below(top, SIDE + 1 - height), _below(left, SIDE + 1 - width), height, width, mirror


@triton.jit
def _draw_operation(subpolicy, word, sign, tables):
    wanted = tl.load(tables.subpolicies + subpolicy + sign)
    return tl.where(word.to(tl.int64) < tl.load(tables.subpolicies + subpolicy + 2), wanted, 0).to(tl.int32)


@triton.jit
def _draw_operations(words, tables, SLOTS: tl.constexpr):
    """The first and the second operation of each, 0 for nothing."""
    subpolicy, first_word, second_word, signs = _of(POLICY, words)
    subpolicy = _below(subpolicy, tl.load(tables.parameters + SUBPOLICIES)) * (3 * SLOTS)
    first = _draw_operation(subpolicy, first_word, (signs & 1).to(tl.int32), tables)
    second = first * 0
    if SLOTS == 2:
        second = _draw_operation(subpolicy + 3, second_word, ((signs >> 1) & 1).to(tl.int32), tables)
    return first, second


@triton.jit
def _draw_erased(words, tables, SIZE: tl.constexpr):
    """A box: top, left, bottom, right; empty where there is none."""
    fires, quantile, top, left = _of(ERASE, words)
    fires = (fires.to(tl.int64) < tl.load(tables.parameters + ERASE_BELOW)).to(tl.int32)
    quantile = (quantile >> (32 - BOX_BITS)).to(tl.int32)
    height = tl.load(tables.boxes + 2 * quantile) * fires
    width = tl.load(tables.boxes + 2 * quantile + 1) * fires
    top, left = _below(top, SIZE + 1 - height), _below(left, SIZE + 1 - width)
    return top, left, top + height, left + width


@triton.jit
def _draw_mix(words, alone, tables, SIZE: tl.constexpr):
    """The pasted box, the weight of the image outside of it, and its share in the whole; nothing is mixed where it is alone."""
    fires, quantile, line, column = _of(MIX, words)
    mixed = (fires.to(tl.int64) < tl.load(tables.parameters + MIX_BELOW)) & (alone == 0)
    cut = mixed & ((quantile & 1).to(tl.int64) < tl.load(tables.parameters + CUTMIX_BELOW))
    quantile = (quantile >> (32 - QUANTILE_BITS)).to(tl.int32)
    half_side = tl.where(cut, tl.load(tables.half_sides + quantile), 0)
    line, column = _below(line, half_side * 0 + SIZE), _below(column, half_side * 0 + SIZE)
    top, left = tl.maximum(line - half_side, 0), tl.maximum(column - half_side, 0)
    bottom, right = tl.minimum(line + half_side, SIZE), tl.minimum(column + half_side, SIZE)
    lam = tl.where(mixed & (cut == 0), tl.load(tables.lams + quantile), 1.0)
    area = ((bottom - top) * (right - left)).to(tl.float32)
    return (top, left, bottom, right), lam, tl.where(cut, 1.0 - area * (1.0 / (SIZE * SIZE)), lam)


@triton.jit
def _both(pair):
    """The two values of `pair` as scalars."""
    is_first = tl.arange(0, 2) == 0
    return tl.sum(tl.where(is_first, pair, 0), 0), tl.sum(tl.where(is_first, 0, pair), 0)


@triton.jit
def _both_boxes(pairs):
    top, next_top = _both(pairs[0])
    left, next_left = _both(pairs[1])
    bottom, next_bottom = _both(pairs[2])
    right, next_right = _both(pairs[3])
    return (top, left, bottom, right), (next_top, next_left, next_bottom, next_right)


# --- the arithmetic: see augment/cpu.py ---------------------------------------------------------------------------------
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
def _pixel(words, byte, inside, other: tl.constexpr):
    """The three bytes of a pixel from `byte` on: they lie in one word or in two that are neighbours."""
    low = tl.load(words + (byte >> 2), inside, other).to(tl.uint32)
    high = tl.load(words + ((byte + 2) >> 2), inside, other).to(tl.uint32)
    shift = 8 * (byte & 3).to(tl.uint32)
    return ((low >> shift) | ((high << 1) << (31 - shift))) & 0xFFFFFF


@triton.jit
def _read(index, top, left, mirror, tables, SIZE: tl.constexpr):
    """A window of image `index`, by address: cropping and mirroring cost nothing more."""
    pixel = tl.arange(0, SIZE * SIZE)
    line, column = pixel // SIZE + top, pixel % SIZE
    column = tl.where(mirror != 0, SIZE - 1 - column, column) + left
    inside = (line.to(tl.uint32) < SIZE) & (column.to(tl.uint32) < SIZE)  # what is negative is large without its sign
    words = tables.images + index * (3 * SIZE * SIZE // 4) + line * (3 * SIZE // 4)  # a line begins with a whole word
    return _pixel(words, 3 * column, inside, 0).to(tl.int32)


@triton.jit
def _between(number, start, length, SIZE: tl.constexpr):
    """The two lines or columns between which pixel `number` of a resized axis is read, and the weight of the second."""
    place = tl.maximum(((2 * number + 1) * length - SIZE) * ONE + SIZE, 0) // (2 * SIZE)
    place = tl.minimum(place, (length - 1) * ONE)
    before = place // ONE
    return start + before, start + tl.minimum(before + 1, length - 1), (place % ONE).to(tl.uint32)


@triton.jit
def _weigh(before, after, weight):
    return before * (ONE - weight) + after * weight


@triton.jit
def _squeeze_line(words, column, next_column, along):
    """A line between its columns: red in the lower and blue in the upper 16 bits, and green; in parts of ONE."""
    before, after = _pixel(words, 3 * column, None, None), _pixel(words, 3 * next_column, None, None)
    return (_weigh(before & 0xFF00FF, after & 0xFF00FF, along),
            _weigh((before >> 8) & 255, (after >> 8) & 255, along))


@triton.jit
def _round(above, below, down):
    return ((_weigh(above, below, down) + ONE * ONE // 2) // (ONE * ONE)).to(tl.int32)


@triton.jit
def _read_columns(words, number, top, left, height, width, mirror, SIZE: tl.constexpr, SIDE: tl.constexpr):
    """The columns `number`, (1, K), of a resized window: (SIZE, K)."""
    line, next_line, down = _between(tl.arange(0, SIZE)[:, None], top, height, SIZE)
    column, next_column, along = _between(tl.where(mirror != 0, SIZE - 1 - number, number), left, width, SIZE)
    above, green_above = _squeeze_line(words + line * (3 * SIDE // 4), column, next_column, along)
    below, green_below = _squeeze_line(words + next_line * (3 * SIDE // 4), column, next_column, along)
    return _pack(_round(above & 0xFFFF, below & 0xFFFF, down), _round(green_above, green_below, down),
                 _round(above >> 16, below >> 16, down))


@triton.jit
def _read_resized(index, top, left, height, width, mirror, tables, SIZE: tl.constexpr, SIDE: tl.constexpr):
    """A window of image `index`, resized: see `resized` in augment/naive.py."""
    words = tables.images + index * (3 * SIDE * SIDE // 4)
    number = 2 * tl.arange(0, SIZE // 2)[None, :]
    # In halves, which the barriers keep apart: to load all lines at once takes more registers than there are.
    even = _read_columns(words, number, top, left, height, width, mirror, SIZE, SIDE)
    tl.debug_barrier()
    odd = _read_columns(words, number + 1, top, left, height, width, mirror, SIZE, SIDE)
    tl.debug_barrier()
    return tl.reshape(tl.join(even, odd), [SIZE * SIZE])


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
def _operate(pixels, operation, tables, SIZE: tl.constexpr):
    """The image after `operation`, a scalar, so that a program branches as one."""
    PIXELS: tl.constexpr = SIZE * SIZE
    kind, row = operation & 7, operation >> 3
    if kind == GEOMETRY:
        # One entry at a time, so that a warp works on pixels side by side: then no two are in one bank of shared memory.
        source = tl.load(tables.maps + row * PIXELS + tl.max_contiguous(tl.arange(0, PIXELS), 1))
        pixels = tl.where(source < PIXELS, tl.gather(pixels, tl.minimum(source, PIXELS - 1), 0), 0)
    elif kind != NOTHING:
        red, green, blue = _unpack(pixels)
        if kind == LOOKUP:
            lookup = tables.lookups + row * 256
            red, green = tl.load(lookup + red).to(tl.int32), tl.load(lookup + green).to(tl.int32)
            blue = tl.load(lookup + blue).to(tl.int32)
        elif kind == EQUALIZE:
            red, green, blue = _equalize(red, PIXELS), _equalize(green, PIXELS), _equalize(blue, PIXELS)
        elif kind == AUTOCONTRAST:
            red, green, blue = _stretch(red, tables), _stretch(green, tables), _stretch(blue, tables)
        else:
            ratio, complement = tl.load(tables.blends + 2 * row), tl.load(tables.blends + 2 * row + 1)
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


@triton.jit
def _inside(box, SIZE: tl.constexpr):
    top, left, bottom, right = box
    pixel = tl.arange(0, SIZE * SIZE)
    line, column = (pixel // SIZE - top).to(tl.uint32), (pixel % SIZE - left).to(tl.uint32)
    return (line < (bottom - top).to(tl.uint32)) & (column < (right - left).to(tl.uint32))


@triton.jit
def _finish(channel: tl.constexpr, pixels, next_pixels, holes, weights, tables, DTYPE: tl.constexpr):
    """One channel of both images, normalised, erased and mixed."""
    table = tl.load(tables.normalised + 256 * channel + tl.arange(0, 256))
    index = (tl.join(pixels, next_pixels) >> (8 * channel)) & 255
    values = tl.gather(table, tl.reshape(index, [index.numel]), 0)  # of both at once: the table is laid out once
    own, partner = tl.split(tl.reshape(values, index.shape))
    own, partner = tl.where(holes[0], 0.0, own), tl.where(holes[1], 0.0, partner)
    return ((weights[0] * own + (1.0 - weights[0]) * partner).to(DTYPE),
            (weights[1] * partner + (1.0 - weights[1]) * own).to(DTYPE))


# The result is written as 32-bit words, of which three make a group a b c: red, green and blue of a pixel, or with 16-bit values
# those of two pixels.  A thread holds whole fours of groups, and stores each in three times four words:
#
#     a0 b0 c0 a1   b1 c1 a2 b2   c2 a3 b3 c3

@triton.jit
def _word(low, high):
    """One word of two 16-bit values."""
    low, high = low.to(tl.uint16, bitcast=True).to(tl.uint32), high.to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (high << 16)


@triton.jit
def _halves(values):
    """Every even one and every odd one."""
    return tl.split(tl.reshape(values, [values.numel // 2, 2]))


@triton.jit
def _quarters(words):
    even, odd = _halves(words)
    first, third = _halves(even)
    second, fourth = _halves(odd)
    return first, second, third, fourth


@triton.jit
def _store_four(place, first, second, third, fourth):
    words = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [first.numel, 4])
    tl.store(place + 12 * tl.arange(0, first.numel)[:, None] + tl.arange(0, 4)[None, :], words)


@triton.jit
def _write(out, row, red, green, blue):
    if out.dtype.element_ty.primitive_bitwidth == 16:
        even_red, odd_red = _halves(red)
        even_green, odd_green = _halves(green)
        even_blue, odd_blue = _halves(blue)
        a, b, c = _word(even_red, even_green), _word(even_blue, odd_red), _word(odd_green, odd_blue)
    else:
        a, b, c = red.to(tl.uint32, bitcast=True), green.to(tl.uint32, bitcast=True), blue.to(tl.uint32, bitcast=True)
    a0, a1, a2, a3 = _quarters(a)
    b0, b1, b2, b3 = _quarters(b)
    c0, c1, c2, c3 = _quarters(c)
    place = (out + row.to(tl.int64) * (3 * red.numel)).to(tl.pointer_type(tl.uint32))
    _store_four(place, a0, b0, c0, a1)
    _store_four(place + 4, b1, c1, a2, b2)
    _store_four(place + 8, c2, a3, b3, c3)


@triton.jit(do_not_specialize=["step", "first", "rows"])
def _augment_kernel(step, first, rows, tables, out, out_label, out_other, out_lam, SIZE: tl.constexpr, SLOTS: tl.constexpr,
                    RESIZED: tl.constexpr, SIDE: tl.constexpr):
    first_row = 2 * tl.program_id(0)
    alone = first_row + 1 == rows  # the last of an odd batch, which stands in for its partner
    row = first_row + tl.arange(0, 2)
    in_batch = first + tl.minimum(row, rows - 1)
    start = tl.load(step) * tl.load(tables.parameters + BATCH_SIZE)
    position = start + in_batch
    source = tl.load(tables.order + position)

    words = _draw_words(position, start + in_batch * tl.load(tables.parameters + MIX_EACH), tables)
    index, next_index = _both(source)
    if RESIZED:
        top, left, height, width, mirror = _draw_resized(words, tables, SIDE)
        height, next_height = _both(height)
        width, next_width = _both(width)
    else:
        top, left, mirror = _draw_window(words, tables)
    top, next_top = _both(top)
    left, next_left = _both(left)
    mirror, next_mirror = _both(mirror)
    if RESIZED:
        pixels = _read_resized(index, top, left, height, width, mirror, tables, SIZE, SIDE)
        next_pixels = _read_resized(next_index, next_top, next_left, next_height, next_width, next_mirror, tables, SIZE, SIDE)
    else:
        pixels = _read(index, top, left, mirror, tables, SIZE)
        next_pixels = _read(next_index, next_top, next_left, next_mirror, tables, SIZE)

    if SLOTS > 0:
        # The images take turns, so that the operations are compiled once and not four times.
        operation, later_operation = _draw_operations(words, tables, SLOTS)
        operation, next_operation = _both(operation)
        later_operation, last_operation = _both(later_operation)
        for _ in range(2 * SLOTS):
            changed = _operate(pixels, operation, tables, SIZE)
            pixels = next_pixels
            next_pixels = changed
            operation = next_operation
            next_operation = later_operation
            later_operation = last_operation

    erased, next_erased = _both_boxes(_draw_erased(words, tables, SIZE))
    pasted, lam, share = _draw_mix(words, alone, tables, SIZE)
    pasted, next_pasted = _both_boxes(pasted)
    lam, next_lam = _both(lam)
    holes = _inside(erased, SIZE), _inside(next_erased, SIZE)
    weights = tl.where(_inside(pasted, SIZE), 0.0, lam), tl.where(_inside(next_pasted, SIZE), 0.0, next_lam)
    red, next_red = _finish(0, pixels, next_pixels, holes, weights, tables, out.dtype.element_ty)
    green, next_green = _finish(1, pixels, next_pixels, holes, weights, tables, out.dtype.element_ty)
    blue, next_blue = _finish(2, pixels, next_pixels, holes, weights, tables, out.dtype.element_ty)
    _write(out, first_row, red, green, blue)
    if not alone:
        _write(out, first_row + 1, next_red, next_green, next_blue)

    partner_source = tl.load(tables.order + start + first + tl.minimum(row ^ 1, rows - 1))
    own, partner = tl.load(tables.labels + source), tl.load(tables.labels + partner_source)
    own = tl.where(share == 0.0, partner, own)
    unmixed = (share == 1.0) | (own == partner)
    exists = row < rows
    tl.store(out_label + row, own, exists)
    tl.store(out_other + row, tl.where(unmixed, own, partner), exists)
    tl.store(out_lam + row, tl.where(unmixed, 1.0, share), exists)


def augment_triton(step: torch.Tensor, rows: range, tables: Tables, size: int, dtype: torch.dtype):
    """`rows` of the batch with the number that is in `step`, a 0-dim int64 tensor: one launch, which reads it when it runs.

    rows: whole pairs (2k, 2k+1), of which the last may lack its second.  size: of the result; that of the images,
    where windows are not resized.  dtype: of 16 or 32 bits.  Nothing is checked.
    Returns images (rows, 3, size, size), channels_last, of `dtype`; int64 label, other and float32 lam, (rows,).
    """
    device = tables.images.device
    images = torch.empty(len(rows), size, size, 3, dtype=dtype, device=device)
    # Each by itself, so that all are aligned: one code for all batch sizes.
    label, other, lam = (torch.empty(len(rows), dtype=kind, device=device) for kind in (torch.int64, torch.int64, torch.float32))
    _augment_kernel[(triton.cdiv(len(rows), 2),)](
        step, rows.start, len(rows), tables, images, label, other, lam, SIZE=size, SLOTS=tables.subpolicies.shape[1],
        RESIZED=len(tables.boxes) > BOXES.value, SIDE=tables.images.shape[1],
        num_warps=WARPS[size], enable_fp_fusion=False)
    return images.permute(0, 3, 1, 2), label, other, lam
