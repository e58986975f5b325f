"""The Triton kernels: gate, up and activation; down; the sum over a token's experts; and a linear layer.

All multiply a tile of weights [ROWS, columns], one expert's, by the activations of a few of its (token, expert) *pairs*
[TOKENS, columns]. Weights become integers in the activations' type, exactly; scales are applied to each group's sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .product import product

__all__ = ["combine_kernel", "down_kernel", "gate_up_kernel", "linear_kernel"]

BATCH = ("num_pairs", "num_tokens")
"""What differs from call to call; Triton would compile anew for 1 and for multiples of 16."""
FIELDS = tl.constexpr(7)
"""Columns of the descriptor table (`descriptors.Field`)."""


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
        up = product(
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
    result = product(
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
    result = product(
        x, tl.minimum(token, num_tokens - 1).to(tl.int64) * columns, token, codes, scales, zero_points,
        table + piece * FIELDS, row, 0, KINDS, ZEROS, UNIT, WHOLE, False, PTX, ROWS, TOKENS, 1,
    )  # fmt: skip
    if bias is not None:
        result += tl.load(bias + before + row, mask=row < rows, other=0.0)[:, None]
    target = output + token.to(tl.int64)[None, :] * num_rows + (before + row)[:, None]
    tl.store(target, result.to(output.dtype.element_ty), mask=(row < rows)[:, None] & (token < num_tokens)[None, :])
