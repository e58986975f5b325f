"""From fields of words (see `layout.py`) to weights: on any GPU and, with fewer instructions, in PTX."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["PTX_BITS", "field_ptx", "weights_of_field"]

PTX_BITS = (2, 3, 4)
"""Bits that `field_ptx` knows: those at which instructions, not bytes, would bound the speed."""


@triton.constexpr_function
def field_ptx(num_bits: int, field: int, fp16: bool) -> str:
    """PTX for two neighbouring weights of a field: $0 = two 16-bit floats, code - offset each.

    $1, $2: words of the plane of the lower two (or four) bits; $3: minus (magic + offset), twice; and of 3 bits, $4:
    both words of the third bit's plane. Or-ed into the mantissa of 128 (in float16: of 1024), whose last bit counts
    one, a code is a float without a conversion; taking off the magic number and the offset is exact.
    """
    lower = 2 if num_bits == 3 else num_bits
    fields_in_half = 16 // lower
    half = "0x5410" if field < fields_in_half else "0x7632"
    mask = ((1 << lower) - 1) * 0x00010001
    magic, one, kind = (0x64006400, 0x3C003C00, "f16x2") if fp16 else (0x43004300, 0x3F803F80, "bf16x2")
    lines = [
        ".reg .b32 t, u;",
        f"prmt.b32 t, $1, $2, {half};",
        f"shr.u32 t, t, {field % fields_in_half * lower};",
        f"lop3.b32 t, t, {mask:#010x}, {magic:#010x}, 0xEA;",  # (t & mask) | magic
    ]
    if num_bits == 3:
        lines.append(f"shr.u32 u, $4, {field - 2};" if field >= 2 else f"shl.b32 u, $4, {2 - field};")
        lines.append("lop3.b32 t, u, 0x00040004, t, 0xEA;")
    lines += [f"mov.b32 u, {one:#010x};", f"fma.rn.{kind} $0, t, u, $3;"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def weights_of_field(lower, upper, offset, like, NUM_BITS: tl.constexpr, FIELD: tl.constexpr, PTX: tl.constexpr):
    """code - offset in the type of `like`, exactly, for FIELD of `lower` [rows, DEPTH] words.

    `upper`: words of the plane of the upper bits; any tensor where there is none. `offset` int32 [rows].
    """
    if PTX and (NUM_BITS == 2 or NUM_BITS == 3 or NUM_BITS == 4):
        FP16: tl.constexpr = like.dtype == tl.float16
        MAGIC: tl.constexpr = 1024 if FP16 else 128
        minus = (-(MAGIC + offset)).to(like.dtype)[:, None]
        if NUM_BITS == 3:
            weights = tl.inline_asm_elementwise(
                field_ptx(NUM_BITS, FIELD, FP16), "=r,r,r,r,r", [lower, minus, upper], like.dtype, is_pure=True, pack=2
            )
        else:
            weights = tl.inline_asm_elementwise(
                field_ptx(NUM_BITS, FIELD, FP16), "=r,r,r,r", [lower, minus], like.dtype, is_pure=True, pack=2
            )
    else:
        LOWER: tl.constexpr = 2 if NUM_BITS < 4 else (8 if NUM_BITS == 8 else 4)
        UPPER: tl.constexpr = NUM_BITS - LOWER
        codes = (lower >> (FIELD * LOWER)) & ((1 << LOWER) - 1)
        if UPPER > 0:
            codes |= ((upper.to(tl.int32) >> (FIELD * UPPER)) & ((1 << UPPER) - 1)) << LOWER
        weights = (codes - offset[:, None]).to(like.dtype)
    return weights
