"""A training batch from uint8 images: gather, crop, flip, policy, normalise, erase and mix, with its own draws.

Images of 32 or 64 pixels take one launch: a program makes rows 2k and 2k+1 of the batch, which are each other's partners in a
mix, in registers.  Other sizes take two launches, with the images in memory in between.  For each row a program draws from
Philox4x32-10, under a 64-bit seed and with the counter (position in the epoch, epoch, stream, 0), what is to be done, and
does it:

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
by itself: the kernels are compiled without fused multiply-adds.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import augment_constants, on_device_of
from kernels.augment_constants import WARPS

NOTHING, GEOMETRY, SHARPNESS, COLOR, CONTRAST, EQUALIZE, AUTOCONTRAST, LOOKUP = map(tl.constexpr, augment_constants.KINDS)
CROP, POLICY, ERASE, MIX = map(tl.constexpr, augment_constants.STREAMS)
QUANTILE_BITS, BOX_BITS = tl.constexpr(augment_constants.QUANTILE_BITS), tl.constexpr(augment_constants.BOX_BITS)
POLICY_TILE, MIX_TILE = 2048, 1024  # pixels that a program of the first and the second launch works on at a time
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
def _of(stream, words):
    """The four words of one stream, uint32 (2,) each."""
    wanted = tl.arange(0, 4)[:, None] == stream
    return (tl.sum(tl.where(wanted, words[0], 0), 0), tl.sum(tl.where(wanted, words[1], 0), 0),
            tl.sum(tl.where(wanted, words[2], 0), 0), tl.sum(tl.where(wanted, words[3], 0), 0))


@triton.jit
def _draw_window(words, tables, SIZE: tl.constexpr, RESIZED: tl.constexpr, SIDE: tl.constexpr):
    """Top and left edge in the image without its padding, height and width, and whether to mirror the result."""
    top, left, mirror, quantile = _of(CROP, words)
    if RESIZED:
        quantile = (quantile >> (32 - BOX_BITS)).to(tl.int32) + BOXES
        height, width = tl.load(tables.boxes + 2 * quantile), tl.load(tables.boxes + 2 * quantile + 1)
        top, left = _below(top, SIDE + 1 - height), _below(left, SIDE + 1 - width)
    else:
        pad = tl.load(tables.parameters + CROP_PAD).to(tl.int32)
        top, left = _below(top, 2 * pad + 1) - pad, _below(left, 2 * pad + 1) - pad
        height, width = top * 0 + SIZE, top * 0 + SIZE
    return top, left, height, width, mirror.to(tl.int32) & tl.load(tables.parameters + FLIP).to(tl.int32)


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
    share = 1.0 - _part((bottom - top) * (right - left), SIZE * SIZE)
    return (top, left, bottom, right), lam, tl.where(cut, share, lam)


@triton.jit
def _draw_pair(step, first, first_row, rows, tables):
    """The words that are drawn for two rows of the batch, the images that they are made of, and where the batch starts.

    Words: four for each of STREAMS and each row, uint32 (4, 2).
    """
    in_batch = first + tl.minimum(first_row + tl.arange(0, 2), rows - 1)
    start = tl.load(step) * tl.load(tables.parameters + BATCH_SIZE)
    position = start + in_batch
    source = tl.load(tables.order + position)
    stream, mix_position = tl.arange(0, 4)[:, None], start + in_batch * tl.load(tables.parameters + MIX_EACH)
    counter = tl.where(stream == MIX, mix_position[None, :], position[None, :]).to(tl.int32)
    epoch = tl.load(tables.parameters + EPOCH).to(tl.int32)
    return tl.philox(tl.load(tables.parameters + SEED), counter, epoch, stream, 0), source, start


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
def _part(count, WHOLE: tl.constexpr):
    """count / WHOLE, of whole numbers below 2^24 and up to 2^16, rounded once to float32.

    A division itself would be compiled to fused multiply-adds.
    """
    if WHOLE & (WHOLE - 1) == 0:
        part = count.to(tl.float32) * (1.0 / WHOLE)
    else:  # the quotient is at least 2^-41 of its size away from the middle of two float32 numbers; the error is below 2^-51
        part = (count.to(tl.float64) * (1.0 / WHOLE)).to(tl.float32)
    return part


@triton.jit
def _pixel(words, byte, inside, other: tl.constexpr):
    """The three bytes of a pixel from `byte` on: they lie in one word or in two that are neighbours."""
    low = tl.load(words + (byte >> 2), inside, other).to(tl.uint32)
    high = tl.load(words + ((byte + 2) >> 2), inside, other).to(tl.uint32)
    shift = 8 * (byte & 3).to(tl.uint32)
    return ((low >> shift) | ((high << 1) << (31 - shift))) & 0xFFFFFF


@triton.jit
def _read(pixel, index, top, left, mirror, tables, SIZE: tl.constexpr):
    """The pixels with numbers `pixel` of a window of image `index`, by address: cropping and mirroring cost nothing more."""
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
def _read_between(words, line, column, top, left, height, width, mirror, SIZE: tl.constexpr, SIDE: tl.constexpr):
    """The pixels at `line` and `column`, which broadcast, of a resized window."""
    line, next_line, down = _between(line, top, height, SIZE)
    column, next_column, along = _between(tl.where(mirror != 0, SIZE - 1 - column, column), left, width, SIZE)
    above, green_above = _squeeze_line(words + line * (3 * SIDE // 4), column, next_column, along)
    below, green_below = _squeeze_line(words + next_line * (3 * SIDE // 4), column, next_column, along)
    return _pack(_round(above & 0xFFFF, below & 0xFFFF, down), _round(green_above, green_below, down),
                 _round(above >> 16, below >> 16, down))


@triton.jit
def _read_resized(index, top, left, height, width, mirror, tables, SIZE: tl.constexpr, SIDE: tl.constexpr):
    """A window of image `index`, resized: see `resized` in augment/naive.py."""
    words = tables.images + index * (3 * SIDE * SIDE // 4)
    line, column = tl.arange(0, SIZE)[:, None], 2 * tl.arange(0, SIZE // 2)[None, :]
    # In halves, which the barriers keep apart: to load all lines at once takes more registers than there are.
    even = _read_between(words, line, column, top, left, height, width, mirror, SIZE, SIDE)
    tl.debug_barrier()
    odd = _read_between(words, line, column + 1, top, left, height, width, mirror, SIZE, SIDE)
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
def _is_border(pixel, SIZE: tl.constexpr):
    line, column = pixel // SIZE, pixel % SIZE
    return (line == 0) | (line == SIZE - 1) | (column == 0) | (column == SIZE - 1)


@triton.jit
def _blur(red, green, blue, above, here, below, border):
    """above, here, below: sums of three neighbours in a line, ten bits for each channel."""
    return (tl.where(border, red, _smooth(red, above, here, below)),
            tl.where(border, green, _smooth(green, above >> 10, here >> 10, below >> 10)),
            tl.where(border, blue, _smooth(blue, above >> 20, here >> 20, below >> 20)))


@triton.jit
def _widen(red, green, blue):
    return red | (green << 10) | (blue << 20)  # ten bits hold the sum of three bytes


@triton.jit
def _blur_all(red, green, blue, SIZE: tl.constexpr):
    pixel = tl.arange(0, SIZE * SIZE)
    last = SIZE * SIZE - 1
    wide = _widen(red, green, blue)
    wide += tl.gather(wide, tl.maximum(pixel - 1, 0), 0) + tl.gather(wide, tl.minimum(pixel + 1, last), 0)
    above, below = tl.gather(wide, tl.maximum(pixel - SIZE, 0), 0), tl.gather(wide, tl.minimum(pixel + SIZE, last), 0)
    return _blur(red, green, blue, above, wide, below, _is_border(pixel, SIZE))


@triton.jit
def _equalizing(histogram, highest, PIXELS: tl.constexpr):
    """The step, and the table for a channel whose highest value is `highest`; where the step is 0, the channel stays."""
    brightest = tl.sum(tl.where(tl.arange(0, 256) == highest, histogram, 0), 0)
    step = (PIXELS - brightest) // 255
    darker = tl.cumsum(histogram, 0) - histogram
    return step, tl.minimum((darker + step // 2) // tl.maximum(step, 1), 255)


@triton.jit
def _equalize(channel, PIXELS: tl.constexpr):
    step, lookup = _equalizing(tl.histogram(channel, 256), tl.max(channel, 0), PIXELS)
    return tl.where(step > 0, tl.gather(lookup, channel, 0), channel)


@triton.jit
def _stretch(channel, low, high, tables):
    return _whole((channel - tl.where(low == high, 0, low)).to(tl.float32) * tl.load(tables.stretch + high - low))


@triton.jit
def _stretch_all(channel, tables):
    return _stretch(channel, tl.min(channel, 0), tl.max(channel, 0), tables)


@triton.jit
def _blend_pixels(red, green, blue, others, ratio, complement):
    return (_blend(red, others[0], ratio, complement), _blend(green, others[1], ratio, complement),
            _blend(blue, others[2], ratio, complement))


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
            red, green, blue = _stretch_all(red, tables), _stretch_all(green, tables), _stretch_all(blue, tables)
        else:
            ratio, complement = tl.load(tables.blends + 2 * row), tl.load(tables.blends + 2 * row + 1)
            if kind == SHARPNESS:
                others = _blur_all(red, green, blue, SIZE)
                red, green, blue = _blend_pixels(red, green, blue, others, ratio, complement)
            else:
                gray = _gray(red, green, blue).to(tl.float32)
                if kind == CONTRAST:  # the mean is exact: a sum of whole numbers below 2^24, and a power of two
                    gray = tl.zeros([PIXELS], tl.float32) + tl.sum(gray, 0) * (1.0 / PIXELS)
                red, green, blue = _blend_pixels(red, green, blue, (gray, gray, gray), ratio, complement)
        pixels = _pack(red, green, blue)
    return pixels


@triton.jit
def _inside(pixel, box, SIZE: tl.constexpr):
    top, left, bottom, right = box
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
def _store_four(place, first, second, third, fourth, exists):
    words = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [first.numel, 4])
    tl.store(place + 12 * tl.arange(0, first.numel)[:, None] + tl.arange(0, 4)[None, :], words, exists)


@triton.jit
def _write(place, red, green, blue, left):
    """To `place` on; of an image of which so many pixels are `left`, None: all that there are, whole groups of four."""
    if place.dtype.element_ty.primitive_bitwidth == 16:
        even_red, odd_red = _halves(red)
        even_green, odd_green = _halves(green)
        even_blue, odd_blue = _halves(blue)
        a, b, c = _word(even_red, even_green), _word(even_blue, odd_red), _word(odd_green, odd_blue)
    else:
        a, b, c = red.to(tl.uint32, bitcast=True), green.to(tl.uint32, bitcast=True), blue.to(tl.uint32, bitcast=True)
    a0, a1, a2, a3 = _quarters(a)
    b0, b1, b2, b3 = _quarters(b)
    c0, c1, c2, c3 = _quarters(c)
    exists = None if left is None else (tl.arange(0, a0.numel) * (red.numel // a0.numel) < left)[:, None]
    place = place.to(tl.pointer_type(tl.uint32))
    _store_four(place, a0, b0, c0, a1, exists)
    _store_four(place + 4, b1, c1, a2, b2, exists)
    _store_four(place + 8, c2, a3, b3, c3, exists)


@triton.jit
def _finish_pair(out, first_row, alone, first_pixel, left, pixels, next_pixels, words, tables, SIZE: tl.constexpr):
    """Normalise, erase, mix and write the pixels of both rows from `first_pixel` on -> the share of each row in itself, (2,)."""
    pixel = first_pixel + tl.arange(0, pixels.numel)
    erased, next_erased = _both_boxes(_draw_erased(words, tables, SIZE))
    pasted, lam, share = _draw_mix(words, alone, tables, SIZE)
    pasted, next_pasted = _both_boxes(pasted)
    lam, next_lam = _both(lam)
    holes = _inside(pixel, erased, SIZE), _inside(pixel, next_erased, SIZE)
    weights = (tl.where(_inside(pixel, pasted, SIZE), 0.0, lam), tl.where(_inside(pixel, next_pasted, SIZE), 0.0, next_lam))
    red, next_red = _finish(0, pixels, next_pixels, holes, weights, tables, out.dtype.element_ty)
    green, next_green = _finish(1, pixels, next_pixels, holes, weights, tables, out.dtype.element_ty)
    blue, next_blue = _finish(2, pixels, next_pixels, holes, weights, tables, out.dtype.element_ty)
    place = out + first_row.to(tl.int64) * (3 * SIZE * SIZE) + 3 * first_pixel
    _write(place, red, green, blue, left)
    if not alone:
        _write(place + 3 * SIZE * SIZE, next_red, next_green, next_blue, left)
    return share


@triton.jit
def _write_labels(out_label, out_other, out_lam, start, first, first_row, rows, source, share, tables):
    row = first_row + tl.arange(0, 2)
    partner_source = tl.load(tables.order + start + first + tl.minimum(row ^ 1, rows - 1))
    own, partner = tl.load(tables.labels + source), tl.load(tables.labels + partner_source)
    own = tl.where(share == 0.0, partner, own)
    unmixed = (share == 1.0) | (own == partner)
    exists = row < rows
    tl.store(out_label + row, own, exists)
    tl.store(out_other + row, tl.where(unmixed, own, partner), exists)
    tl.store(out_lam + row, tl.where(unmixed, 1.0, share), exists)


@triton.jit(do_not_specialize=["step", "first", "rows"])
def _augment_kernel(step, first, rows, tables, out, out_label, out_other, out_lam, SIZE: tl.constexpr, SLOTS: tl.constexpr,
                    RESIZED: tl.constexpr, SIDE: tl.constexpr):
    first_row = 2 * tl.program_id(0)
    alone = first_row + 1 == rows  # the last of an odd batch, which stands in for its partner
    words, source, start = _draw_pair(step, first, first_row, rows, tables)

    index, next_index = _both(source)
    top, left, height, width, mirror = _draw_window(words, tables, SIZE, RESIZED, SIDE)
    top, next_top = _both(top)
    left, next_left = _both(left)
    height, next_height = _both(height)
    width, next_width = _both(width)
    mirror, next_mirror = _both(mirror)
    if RESIZED:
        pixels = _read_resized(index, top, left, height, width, mirror, tables, SIZE, SIDE)
        next_pixels = _read_resized(next_index, next_top, next_left, next_height, next_width, next_mirror, tables, SIZE, SIDE)
    else:
        pixels = _read(tl.arange(0, SIZE * SIZE), index, top, left, mirror, tables, SIZE)
        next_pixels = _read(tl.arange(0, SIZE * SIZE), next_index, next_top, next_left, next_mirror, tables, SIZE)

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

    share = _finish_pair(out, first_row, alone, 0, None, pixels, next_pixels, words, tables, SIZE)
    _write_labels(out_label, out_other, out_lam, start, first, first_row, rows, source, share, tables)


# --- images of other sizes, in two launches -----------------------------------------------------------------------------
# The first has a program for each image, which works through its pixels in tiles: it crops them into memory and applies the
# operations there.  Two copies take turns where an operation reads other pixels than it writes; the last one writes the
# first copy.  A barrier lets all threads see what the others wrote.  The second has a program for each tile of a pair of images.

@triton.jit
def _own(pair, number):
    """The value of row `number` of `pair`, as a scalar."""
    return tl.sum(tl.where(tl.arange(0, 2) == number, pair, 0), 0)


@triton.jit
def _tile(first_pixel, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The numbers of its pixels, and which exist.  One to a thread and not four: then a warp works on pixels side by side."""
    pixel = tl.max_contiguous(first_pixel + tl.arange(0, TILE), 1)
    return pixel, pixel < SIZE * SIZE


@triton.jit
def _moves(operation):
    """1 for an operation that reads other pixels than it writes, else 0."""
    kind = operation & 7
    return ((kind == GEOMETRY) | (kind == SHARPNESS)).to(tl.int32)


@triton.jit
def _load_wide(image, pixel, inner):
    """Three neighbours in a line, added up as in _blur."""
    wide = tl.zeros_like(pixel)
    for beside in tl.static_range(-1, 2):
        red, green, blue = _unpack(tl.load(image + pixel + beside, inner, 0))
        wide += _widen(red, green, blue)
    return wide


@triton.jit
def _make_lookup(lookup, image, kind, ratio, complement, tables, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Write the tables, uint8 (3, 256), by which CONTRAST, EQUALIZE or AUTOCONTRAST changes each channel of an image."""
    PIXELS: tl.constexpr = SIZE * SIZE
    level = tl.arange(0, 256)
    if kind == CONTRAST:
        total = tl.zeros([TILE], tl.int32)
        for first_pixel in range(0, PIXELS, TILE):
            pixel, exists = _tile(first_pixel, SIZE, TILE)
            red, green, blue = _unpack(tl.load(image + pixel, exists, 0))
            total += _gray(red, green, blue)
        mean = _part(tl.sum(total, 0), PIXELS)
        changed = _blend(level, mean, ratio, complement).to(tl.uint8)
        for channel in range(3):
            tl.store(lookup + 256 * channel + level, changed)
    else:
        for channel in range(3):
            histogram = tl.zeros([256], tl.int32)
            for first_pixel in range(0, PIXELS, TILE):
                pixel, exists = _tile(first_pixel, SIZE, TILE)
                histogram += tl.histogram((tl.load(image + pixel, exists, 0) >> (8 * channel)) & 255, 256, exists)
            low, high = tl.min(tl.where(histogram > 0, level, 255), 0), tl.max(tl.where(histogram > 0, level, 0), 0)
            if kind == EQUALIZE:
                step, changed = _equalizing(histogram, high, PIXELS)
                changed = tl.where(step > 0, changed, level)
            else:
                changed = _stretch(level, low, high, tables)
            tl.store(lookup + 256 * channel + level, changed.to(tl.uint8))


@triton.jit
def _operate_in_tiles(image, at, own_lookup, operation, tables, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Apply `operation` to the copy at `at` of an image -> where the result is."""
    PIXELS: tl.constexpr = SIZE * SIZE
    kind, row = operation & 7, operation >> 3
    source, target = image + at, image + (PIXELS - at)
    ratio, complement = tl.load(tables.blends + 2 * row), tl.load(tables.blends + 2 * row + 1)
    if kind > COLOR:
        lookup, channel = tables.lookups + row * 256, 0
        if kind != LOOKUP:
            _make_lookup(own_lookup, source, kind, ratio, complement, tables, SIZE, TILE)
            lookup, channel = own_lookup, 256
            tl.debug_barrier()
        for first_pixel in range(0, PIXELS, TILE):
            pixel, exists = _tile(first_pixel, SIZE, TILE)
            red, green, blue = _unpack(tl.load(source + pixel, exists, 0))
            red, green = tl.load(lookup + red).to(tl.int32), tl.load(lookup + channel + green).to(tl.int32)
            blue = tl.load(lookup + 2 * channel + blue).to(tl.int32)
            tl.store(source + pixel, _pack(red, green, blue), exists)
    elif kind == GEOMETRY:
        for first_pixel in range(0, PIXELS, TILE):
            pixel, exists = _tile(first_pixel, SIZE, TILE)
            moved = tl.load(tables.maps + row * PIXELS + pixel, exists, PIXELS)
            tl.store(target + pixel, tl.load(source + moved, moved < PIXELS, 0), exists)
    elif kind == SHARPNESS:
        for first_pixel in range(0, PIXELS, TILE):
            pixel, exists = _tile(first_pixel, SIZE, TILE)
            border = _is_border(pixel, SIZE)
            inner = exists & (border == 0)
            red, green, blue = _unpack(tl.load(source + pixel, exists, 0))
            others = _blur(red, green, blue, _load_wide(source, pixel - SIZE, inner), _load_wide(source, pixel, inner),
                           _load_wide(source, pixel + SIZE, inner), border)
            red, green, blue = _blend_pixels(red, green, blue, others, ratio, complement)
            tl.store(target + pixel, _pack(red, green, blue), exists)
    elif kind == COLOR:
        for first_pixel in range(0, PIXELS, TILE):
            pixel, exists = _tile(first_pixel, SIZE, TILE)
            red, green, blue = _unpack(tl.load(source + pixel, exists, 0))
            gray = _gray(red, green, blue)
            red, green, blue = _blend_pixels(red, green, blue, (gray, gray, gray), ratio, complement)
            tl.store(source + pixel, _pack(red, green, blue), exists)
    return tl.where(_moves(operation) != 0, PIXELS - at, at)


@triton.jit(do_not_specialize=["step", "first", "rows"])
def _augment_policy_kernel(step, first, rows, tables, copies, lookups, SIZE: tl.constexpr, SLOTS: tl.constexpr,
                          RESIZED: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr):
    """Crop, flip and policy for each row; copies: int32 (rows, 2, SIZE*SIZE), lookups: uint8 (rows, 768), to be written."""
    row = tl.program_id(0)
    words, source, _ = _draw_pair(step, first, row // 2 * 2, rows, tables)
    number = row % 2
    index = _own(source, number)
    top, left, height, width, mirror = _draw_window(words, tables, SIZE, RESIZED, SIDE)
    top, left, height, width = _own(top, number), _own(left, number), _own(height, number), _own(width, number)
    mirror = _own(mirror, number)

    operation, later_operation = 0, 0
    if SLOTS > 0:
        operation, later_operation = _draw_operations(words, tables, SLOTS)
        operation, later_operation = _own(operation, number), _own(later_operation, number)
    image = copies + row.to(tl.int64) * (2 * SIZE * SIZE)
    at = (_moves(operation) ^ _moves(later_operation)) * (SIZE * SIZE)
    for first_pixel in range(0, SIZE * SIZE, TILE):
        pixel, exists = _tile(first_pixel, SIZE, TILE)
        if RESIZED:
            place = tl.where(exists, pixel, 0)
            pixels = _read_between(tables.images + index * (3 * SIDE * SIDE // 4), place // SIZE, place % SIZE, top, left, height,
                                   width, mirror, SIZE, SIDE)
        else:
            pixels = _read(pixel, index, top, left, mirror, tables, SIZE)
        tl.store(image + at + pixel, pixels, exists)

    for _ in range(SLOTS):
        tl.debug_barrier()
        at = _operate_in_tiles(image, at, lookups + row * 768, operation, tables, SIZE, TILE)
        operation = later_operation


@triton.jit(do_not_specialize=["step", "first", "rows"])
def _augment_mix_kernel(step, first, rows, tables, copies, out, out_label, out_other, out_lam, SIZE: tl.constexpr,
                        TILE: tl.constexpr):
    """Normalise, erase and mix the bytes in `copies`, and the labels."""
    PIXELS: tl.constexpr = SIZE * SIZE
    TILES: tl.constexpr = (PIXELS + TILE - 1) // TILE
    first_row, first_pixel = 2 * (tl.program_id(0) // TILES), tl.program_id(0) % TILES * TILE
    alone = first_row + 1 == rows
    words, source, start = _draw_pair(step, first, first_row, rows, tables)
    pixel = first_pixel + tl.arange(0, TILE)
    image = copies + first_row.to(tl.int64) * (2 * PIXELS) + pixel
    pixels = tl.load(image, pixel < PIXELS, 0)
    next_pixels = tl.load(image + 2 * PIXELS, pixel < tl.where(alone, 0, PIXELS), 0)
    share = _finish_pair(out, first_row, alone, first_pixel, PIXELS - first_pixel, pixels, next_pixels, words, tables, SIZE)
    if first_pixel == 0:
        _write_labels(out_label, out_other, out_lam, start, first, first_row, rows, source, share, tables)


def augment_triton(step: torch.Tensor, rows: range, tables: Tables, size: int, dtype: torch.dtype):
    """`rows` of the batch with the number that is in `step`, a 0-dim int64 tensor, which the kernels read when they run.

    rows: whole pairs (2k, 2k+1), of which the last may lack its second.  size: of the result; that of the images,
    where windows are not resized.  dtype: of 16 or 32 bits.  Nothing is checked.
    Returns images (rows, 3, size, size), channels_last, of `dtype`; int64 label, other and float32 lam, (rows,).
    """
    device, count, pairs = tables.images.device, len(rows), triton.cdiv(len(rows), 2)
    images = torch.empty(count, size, size, 3, dtype=dtype, device=device)
    # Each by itself, so that all are aligned: one code for all batch sizes.
    label, other, lam = (torch.empty(count, dtype=kind, device=device) for kind in (torch.int64, torch.int64, torch.float32))
    batch, results = (step, rows.start, count, tables), (images, label, other, lam)
    image = {"SIZE": size, "SLOTS": tables.subpolicies.shape[1], "RESIZED": len(tables.boxes) > BOXES.value,
             "SIDE": tables.images.shape[1]}
    with on_device_of(images):
        if size in WARPS:
            _augment_kernel[(pairs,)](*batch, *results, **image, num_warps=WARPS[size], enable_fp_fusion=False)
        else:
            copies = torch.empty(count, 2, size * size, dtype=torch.int32, device=device)
            lookups = torch.empty(count, 3 * 256, dtype=torch.uint8, device=device)
            # Without a limit the assembler aims at two programs on a multiprocessor, and spills registers for that.
            _augment_policy_kernel[(count,)](*batch, copies, lookups, **image, TILE=POLICY_TILE, num_warps=POLICY_TILE // 128,
                                             maxnreg=128, enable_fp_fusion=False)
            _augment_mix_kernel[(pairs * triton.cdiv(size * size, MIX_TILE),)](
                *batch, copies, *results, SIZE=size, TILE=MIX_TILE, num_warps=MIX_TILE // 256, enable_fp_fusion=False)
    return images.permute(0, 3, 1, 2), label, other, lam
