"""From planes of 16-bit words (see `layout.py`) to weights: on any GPU and, with fewer instructions, in PTX."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout

__all__ = ["DEPTH", "PTX_BITS", "SPARE_PTX", "field_ptx", "left_of", "weights_of_field", "words_of_field"]

DEPTH = tl.constexpr(layout.DEPTH)
PTX_BITS = (2, 3, 4, 5, 6)
"""Bits that `field_ptx` knows: more do not fit a bfloat16's mantissa."""
SPARE_PTX = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 1; lop3.b32 $0, $2, 0x80008000, t, 0xEA; }")
"""$0 = two halves $1, a bit to the right, with the last bits of $2 before them."""


@triton.constexpr_function
def left_of(num_bits: int, place: int, fp16: bool) -> int:
    """How far to the left a field that begins at bit `place` of its word may stay: mantissas have 7 or 10 bits."""
    return place % ((10 if fp16 else 7) - num_bits + 1)


@triton.constexpr_function
def field_ptx(num_bits: int, lower: int, place: int, above: int, left: int, fp16: bool) -> str:
    """PTX for two neighbouring weights of a field: $0 = two 16-bit floats, code - offset each.

    $1: two words, whose codes' `lower` bits begin at `place`; $2: minus (magic / 2^left + offset), twice; $3, if there
    are more bits: two words with them, beginning at `above`. Or-ed into the mantissa of 128 (in float16: of 1024),
    whose last bit counts one, a code is a float without a conversion. One that stays `left` of its place counts 2^left
    times as much, which the product takes back. All of it is exact.
    """
    mantissa, magic, one, kind = (10, 0x6400, 0x3C00, "f16x2") if fp16 else (7, 0x4300, 0x3F80, "bf16x2")

    def twice(half: int) -> str:
        return f"{half * 0x00010001:#010x}"

    def moved(source: str, by: int) -> str:
        return f"shl.b32 t, {source}, {-by};" if by < 0 else f"shr.u32 t, {source}, {by};"

    lines = [".reg .b32 t, u;", moved("$1", place - left)]
    lines.append(f"lop3.b32 u, t, {twice((1 << lower) - 1 << left)}, {twice(magic)}, 0xEA;")  # t & mask | magic
    if num_bits > lower:
        upper = (1 << num_bits - lower) - 1
        lines += [moved("$3", above - lower - left), f"lop3.b32 u, t, {twice(upper << lower + left)}, u, 0xEA;"]
    lines += [f"mov.b32 t, {twice(one - (left << mantissa))};", f"fma.rn.{kind} $0, u, t, $2;"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def words_of_field(planes, stride, columns, words, above, spare, NUM_BITS: tl.constexpr, FIELD: tl.constexpr,
                   WHOLE: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """(words of FIELD, words of its upper bits, last bits of 3-bit words so far); those of the field before are given.

    `planes`: where the block's first plane has each word, `stride` from one to the next; `columns`: from the block on.
    """
    LOWER: tl.constexpr = 4 if NUM_BITS == 5 or NUM_BITS == 6 else NUM_BITS
    UPPER: tl.constexpr = NUM_BITS - LOWER
    PER_WORD: tl.constexpr = 16 // LOWER
    if UPPER > 0 and FIELD * UPPER % 16 == 0:
        above = _plane(planes, stride, columns, FIELD * UPPER // 16, FIELD * DEPTH, WHOLE)
    if FIELD % PER_WORD == 0 and FIELD < 16 // PER_WORD * PER_WORD:
        words = _plane(planes, stride, columns, UPPER + FIELD // PER_WORD, FIELD * DEPTH, WHOLE)
        if NUM_BITS == 3:
            if PTX:
                spare = tl.inline_asm_elementwise(SPARE_PTX, "=r,r,r", [spare, words], tl.int16, is_pure=True, pack=2)
            else:
                spare = ((spare >> 1) & 0x7FFF) | (words & -0x8000)
    if NUM_BITS == 3 and FIELD == 15:
        words = spare
    return words, above, spare


@triton.jit
def _plane(planes, stride, columns, NUMBER: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr):
    """A plane whose first column is FIRST; zeros if that is beyond the last."""
    place = planes + NUMBER * stride
    return tl.load(place) if WHOLE else tl.load(place, mask=tl.full(planes.shape, FIRST, tl.int32) < columns, other=0)


@triton.jit
def weights_of_field(words, above, offset, like, NUM_BITS: tl.constexpr, FIELD: tl.constexpr, PTX: tl.constexpr):
    """code - offset in the type of `like`, exactly, for FIELD of its `words` [rows, DEPTH]; `offset` int32 [rows]."""
    LOWER: tl.constexpr = 4 if NUM_BITS == 5 or NUM_BITS == 6 else NUM_BITS
    UPPER: tl.constexpr = NUM_BITS - LOWER
    PLACE: tl.constexpr = 13 if NUM_BITS == 3 and FIELD == 15 else FIELD % (16 // LOWER) * LOWER
    ABOVE: tl.constexpr = FIELD * UPPER % 16
    if PTX and NUM_BITS <= 6:
        FP16: tl.constexpr = like.dtype == tl.float16
        LEFT: tl.constexpr = left_of(NUM_BITS, PLACE, FP16)
        minus = (-(((1024 if FP16 else 128) >> LEFT) + offset)).to(like.dtype)[:, None]
        if UPPER > 0:
            weights = tl.inline_asm_elementwise(
                field_ptx(NUM_BITS, LOWER, PLACE, ABOVE, LEFT, FP16), "=r,r,r,r", [words, minus, above], like.dtype,
                is_pure=True, pack=2,
            )  # fmt: skip
        else:
            weights = tl.inline_asm_elementwise(
                field_ptx(NUM_BITS, LOWER, PLACE, 0, LEFT, FP16), "=r,r,r", [words, minus], like.dtype,
                is_pure=True, pack=2,
            )  # fmt: skip
    else:
        codes = (words.to(tl.int32) >> PLACE) & ((1 << LOWER) - 1)
        if UPPER > 0:
            codes |= ((above.to(tl.int32) >> ABOVE) & ((1 << UPPER) - 1)) << LOWER
        weights = (codes - offset[:, None]).to(like.dtype)
    return weights
