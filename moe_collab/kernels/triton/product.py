"""A tile of weights [ROWS, columns] times activations [TOKENS, columns], of every kind of weights: for `kernels.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .fields import DEPTH, weights_of_field, words_of_field

__all__ = ["product"]

DENSE_COLUMNS = tl.constexpr(64)


@triton.jit
def _dense(x, at, factor, codes, start, columns, row, part, WHOLE: tl.constexpr,
           ON_INPUT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """As `product`, of bfloat16 weights."""
    weights = (codes + start).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    blocks = tl.cdiv(columns, DENSE_COLUMNS)
    share = tl.cdiv(blocks, SPLIT)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for block in range(part * share, tl.minimum(blocks, part * share + share)):
        column = block * DENSE_COLUMNS + tl.arange(0, DENSE_COLUMNS)
        if WHOLE:
            weight = tl.load(weights + row.to(tl.int64)[:, None] * columns + column[None, :])
            inputs = tl.load(x + at[:, None] + column[None, :])
        else:
            inside = (column < columns)[None, :]
            weight = tl.load(weights + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
            inputs = tl.load(x + at[:, None] + column[None, :], mask=inside, other=0.0)
        if ON_INPUT:
            inputs = (inputs.to(tl.float32) * factor[:, None]).to(inputs.dtype)
        total = tl.dot(weight.to(inputs.dtype), tl.trans(inputs), total, input_precision="ieee")
    return total


@triton.jit
def _packed(
    x, at, factor, codes, scales, zero_points, start, scale_start, zero_start, group_shift, rows, columns, row, part,
    NUM_BITS: tl.constexpr, ZEROS: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    ON_INPUT: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """As `product`, of weights in NUM_BITS."""
    UNITS: tl.constexpr = max(1, 16 * DEPTH // UNIT)
    IN_UNIT: tl.constexpr = 16 // UNITS
    blocks = tl.cdiv(columns, 16 * DEPTH)
    share = tl.cdiv(blocks, SPLIT)
    depth = tl.arange(0, DEPTH)
    has_zero = tl.where(zero_start < 0, rows, row) < rows
    first_plane = (codes + start).to(tl.pointer_type(tl.int16), bitcast=True)
    stride = rows * DEPTH
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for block in range(part * share, tl.minimum(blocks, part * share + share)):
        planes = first_plane + (block * (NUM_BITS * rows) + row)[:, None] * DEPTH + depth[None, :]
        words = tl.zeros((ROWS, DEPTH), tl.int16)
        above, spare = words, words
        for unit in tl.static_range(UNITS):
            first = (block * UNITS + unit) * (IN_UNIT * DEPTH)
            # Of a unit that is all padding any scale will do.
            place = (tl.minimum(first, columns - 1) >> group_shift) * rows + row
            scale = tl.load(scales + scale_start + place).to(tl.float32)
            offset = tl.full((ROWS,), 1 << (NUM_BITS - 1), tl.int32)
            if ZEROS:
                offset += tl.load(zero_points + zero_start + place, mask=has_zero, other=0).to(tl.int32)
            sums = tl.zeros((ROWS, TOKENS), tl.float32)
            for field in tl.static_range(IN_UNIT):
                column = first + field * DEPTH + depth
                if WHOLE:
                    inputs = tl.load(x + at[:, None] + column[None, :])
                else:
                    inputs = tl.load(x + at[:, None] + column[None, :], mask=(column < columns)[None, :], other=0.0)
                if ON_INPUT:
                    inputs = (inputs.to(tl.float32) * factor[:, None]).to(inputs.dtype)
                words, above, spare = words_of_field(
                    planes, stride, columns - block * (16 * DEPTH), words, above, spare, NUM_BITS,
                    unit * IN_UNIT + field, WHOLE, PTX,
                )  # fmt: skip
                weight = weights_of_field(words, above, offset, inputs, NUM_BITS, unit * IN_UNIT + field, PTX)
                sums = tl.dot(weight, tl.trans(inputs), sums, input_precision="ieee")
            total += sums * scale[:, None]
    return total


@triton.jit
def product(
    x, at, factor, codes, scales, zero_points, descriptor, row, part,
    KINDS: tl.constexpr, ZEROS: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    ON_INPUT: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Rows `row` of the weight times activations that begin `at` [TOKENS], the `part`-th of SPLIT shares of columns.

    float32 [ROWS, TOKENS]; of rows after the last, that one again: to load it costs less than a mask. KINDS has bit b
    set if weights of b bits occur; ZEROS: some have zero points; UNIT columns lie in one group; WHOLE: the columns fill
    whole blocks; ON_INPUT: activations are multiplied by `factor` first.
    """
    bits = tl.load(descriptor)
    group = tl.load(descriptor + 1)
    # The logarithm of a power of two is its exponent as a float; a group that is no power of two is the whole row.
    shift = (group.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    group_shift = tl.where((group & (group - 1)) == 0, shift, 31)
    start = tl.multiple_of(tl.load(descriptor + 2), 4)
    scale_start = tl.load(descriptor + 3)
    zero_start = tl.load(descriptor + 4)
    rows = tl.load(descriptor + 5).to(tl.int32)
    columns = tl.load(descriptor + 6).to(tl.int32)
    row = tl.minimum(row, rows - 1)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for b in tl.static_range(2, 9):
        if (KINDS >> b) & 1:  # noqa: SIM102 - decided when compiling; the next is not
            if bits == b:
                total = _packed(
                    x, at, factor, codes, scales, zero_points, start, scale_start, zero_start, group_shift,
                    rows, columns, row, part, b, ZEROS, UNIT, WHOLE, ON_INPUT, PTX, ROWS, TOKENS, SPLIT,
                )  # fmt: skip
    if (KINDS >> 16) & 1:  # noqa: SIM102
        if bits == 16:
            total = _dense(x, at, factor, codes, start, columns, row, part, WHOLE, ON_INPUT, ROWS, TOKENS, SPLIT)
    return total
