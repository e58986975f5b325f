"""The Triton kernels: gate, up and activation; down; the sum over a token's experts; and a linear layer.

All multiply a tile of weights [ROWS, columns], one expert's, by the activations of a few of its (token, expert) *pairs*
[TOKENS, columns]. Weights become integers in the activations' type, exactly; scales are applied to each group's sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fields import DEPTH, weights_of_field, words_of_field

__all__ = ["combine_kernel", "down_kernel", "gate_up_kernel", "linear_kernel"]

BATCH = ("num_pairs", "num_tokens")
"""What differs from call to call; Triton would compile anew for 1 and for multiples of 16."""
FIELDS = tl.constexpr(7)
"""Columns of the descriptor table (`descriptors.Field`)."""
DENSE_COLUMNS = tl.constexpr(64)


@triton.jit
def _local_expert(ids, expert_map, table):
    """This rank's number of each expert; -1 if it is on another rank, was pruned, or there is none."""
    local = ids.to(tl.int32)
    if expert_map is not None:
        local = tl.where(local < 0, -1, tl.load(expert_map + tl.maximum(local, 0)).to(tl.int32))
    bits = tl.load(table + tl.maximum(local, 0).to(tl.int64) * (3 * FIELDS))
    return tl.where(bits > 0, local, -1)


@triton.jit
def _pairs_of_program(
    block, ids, order, block_expert, block_start, block_end, expert_map, table, num_pairs,
    PAIRS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """(expert, pairs [TOKENS], -1 = none) of a program; expert -1 = nothing to do.

    With `order`: as `routing.sort_pairs` laid them out. Else every pair has a program, and of an expert's pairs, every
    TOKENS-th, which finds the next ones by looking through all: no launch is spent on sorting.
    """
    slots = tl.arange(0, TOKENS)
    if order is not None:
        expert = _local_expert(tl.load(block_expert + block), None, table)
        position = tl.load(block_start + block) + slots
        pairs = tl.load(order + position, mask=position < tl.load(block_end + block), other=-1)
    else:
        everyone = tl.arange(0, PAIRS)
        chosen = tl.load(ids + everyone, mask=everyone < num_pairs, other=-1).to(tl.int32)
        mine = tl.load(ids + block).to(tl.int32)
        same = (chosen == mine).to(tl.int32)
        rank = tl.cumsum(same) - same
        my_rank = tl.sum(tl.where(everyone == block, rank, 0))
        expert = _local_expert(mine, expert_map, table)
        expert = tl.where((mine >= 0) & (my_rank % TOKENS == 0), expert, -1)
        hits = (same[None, :] != 0) & (rank[None, :] == my_rank + slots[:, None])
        pairs = tl.sum(tl.where(hits, everyone[None, :] + 1, 0), axis=1) - 1
    return expert, pairs


@triton.jit
def _dense(x, at, factor, codes, start, columns, row, part, WHOLE: tl.constexpr,
           ON_INPUT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """As `_product`, of bfloat16 weights."""
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
    """As `_product`, of weights in NUM_BITS."""
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
def _product(
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


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        result = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        result = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        result = gate * tl.sigmoid(2 * inner) * up
    else:
        tl.static_assert(ACTIVATION == "swigluoai")
        gate, up = tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0)
        result = gate * tl.sigmoid(1.702 * gate) * (up + 1)
    return result


@triton.jit(do_not_specialize=BATCH)
def gate_up_kernel(
    x, factors, ids, order, block_expert, block_start, block_end, expert_map, codes, scales, zero_points, table, bias,
    inner, num_pairs, top_k, hidden, width, bias_stride,
    ON_INPUT: tl.constexpr, ACTIVATION: tl.constexpr, PAIRS: tl.constexpr, KINDS: tl.constexpr, ZEROS: tl.constexpr,
    UNIT: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """inner [pairs, width] = act(gate x) * up x; grid (blocks of rows, pairs or sorted blocks)."""
    expert, pairs = _pairs_of_program(
        tl.program_id(1), ids, order, block_expert, block_start, block_end, expert_map, table, num_pairs,
        PAIRS, TOKENS,
    )  # fmt: skip
    if expert < 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    descriptor = table + expert.to(tl.int64) * (3 * FIELDS)
    there = tl.maximum(pairs, 0)
    at = (there // top_k).to(tl.int64) * hidden
    factor = tl.load(factors + there) if ON_INPUT else there
    # A loop, so that what is compiled twice as long otherwise is compiled once.
    gate = tl.zeros((ROWS, TOKENS), tl.float32)
    up = tl.zeros((ROWS, TOKENS), tl.float32)
    for _ in range(2):
        gate = up
        up = _product(
            x, at, factor, codes, scales, zero_points, descriptor, row, 0,
            KINDS, ZEROS, UNIT, WHOLE, ON_INPUT, PTX, ROWS, TOKENS, 1,
        )  # fmt: skip
        descriptor += FIELDS
    if bias is not None:
        place = bias + expert.to(tl.int64) * bias_stride + row
        gate += tl.load(place, mask=row < width, other=0.0)[:, None]
        up += tl.load(place + width, mask=row < width, other=0.0)[:, None]
    result = _activate(gate, up, ACTIVATION).to(inner.dtype.element_ty)
    target = inner + pairs.to(tl.int64)[None, :] * width + row[:, None]
    tl.store(target, result, mask=(row < width)[:, None] & (pairs >= 0)[None, :])


@triton.jit(do_not_specialize=BATCH)
def down_kernel(
    inner, ids, order, block_expert, block_start, block_end, expert_map, codes, scales, zero_points, table, partial,
    num_pairs, hidden, width,
    PAIRS: tl.constexpr, KINDS: tl.constexpr, ZEROS: tl.constexpr, UNIT: tl.constexpr,
    WHOLE: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """partial [SPLIT, pairs, hidden] = shares of down inner; grid (blocks of rows, pairs or sorted blocks, SPLIT)."""
    expert, pairs = _pairs_of_program(
        tl.program_id(1), ids, order, block_expert, block_start, block_end, expert_map, table, num_pairs,
        PAIRS, TOKENS,
    )  # fmt: skip
    if expert < 0:
        return
    part = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    descriptor = table + expert.to(tl.int64) * (3 * FIELDS) + 2 * FIELDS
    result = _product(
        inner, tl.maximum(pairs, 0).to(tl.int64) * width, pairs, codes, scales, zero_points, descriptor, row, part,
        KINDS, ZEROS, UNIT, WHOLE, False, PTX, ROWS, TOKENS, SPLIT,
    )  # fmt: skip
    target = partial + (part.to(tl.int64) * num_pairs + pairs)[None, :] * hidden + row[:, None]
    tl.store(target, result, mask=(row < hidden)[:, None] & (pairs >= 0)[None, :])


@triton.jit(do_not_specialize=BATCH)
def combine_kernel(
    partial, factors, ids, expert_map, table, bias, output, num_pairs, hidden, width, bias_stride,
    ON_INPUT: tl.constexpr, TOP_K: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """output [tokens, hidden] = a token's sum of weight * (shares + bias); grid (tokens, blocks of rows)."""
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = row < hidden
    total = tl.zeros((ROWS,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = _local_expert(tl.load(ids + pair), expert_map, table)
        found = tl.where(expert < 0, hidden, row) < hidden
        result = tl.zeros((ROWS,), tl.float32)
        for part in tl.static_range(SPLIT):
            place = (part * num_pairs + pair).to(tl.int64) * hidden
            result += tl.load(partial + place + row, mask=found, other=0.0)
        if bias is not None:
            place = tl.maximum(expert, 0).to(tl.int64) * bias_stride + 2 * width
            result += tl.load(bias + place + row, mask=found, other=0.0)
        if not ON_INPUT:
            result *= tl.load(factors + pair).to(tl.float32)
        total += tl.where(found, result, 0.0)
    tl.store(output + token.to(tl.int64) * hidden + row, total.to(output.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=BATCH)
def linear_kernel(
    x, codes, scales, zero_points, table, bias, output, num_tokens, columns, num_rows,
    PIECES: tl.constexpr, KINDS: tl.constexpr, ZEROS: tl.constexpr, UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    PTX: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """output [tokens, num_rows] = x W^T + bias of a weight in PIECES; grid (blocks of rows of pieces, of tokens)."""
    block = tl.program_id(0)
    piece, first, before = -1, 0, 0
    blocks, rows_before, rows = 0, 0, 0
    for p in tl.static_range(PIECES):
        size = tl.load(table + p * FIELDS + 5).to(tl.int32)
        if (block >= blocks) & (block < blocks + tl.cdiv(size, ROWS)):
            piece, first, before, rows = p, block - blocks, rows_before, size
        blocks += tl.cdiv(size, ROWS)
        rows_before += size
    if piece < 0:
        return
    row = first * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    result = _product(
        x, tl.minimum(token, num_tokens - 1).to(tl.int64) * columns, token, codes, scales, zero_points,
        table + piece * FIELDS, row, 0, KINDS, ZEROS, UNIT, WHOLE, False, PTX, ROWS, TOKENS, 1,
    )  # fmt: skip
    if bias is not None:
        result += tl.load(bias + before + row, mask=row < rows, other=0.0)[:, None]
    target = output + token.to(tl.int64)[None, :] * num_rows + (before + row)[:, None]
    tl.store(target, result.to(output.dtype.element_ty), mask=(row < rows)[:, None] & (token < num_tokens)[None, :])
