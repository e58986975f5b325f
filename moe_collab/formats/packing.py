"""Integers of 2 to 8 bits in int32 words, in the two layouts that `pack-quantized` has had.

*Dense* (compressed-tensors 0.19): codes lie back to back, 32 codes in exactly `num_bits` words. *Padded*
(0.17): `32 // num_bits` codes a word, the rest of the word unused. They agree for 2, 4 and 8 bits. We write
dense and read both; the packed width tells which it is. Where both have the same width (possible only below
160 codes, and never for multiples of 32) dense is assumed.
"""

from __future__ import annotations

import math

import torch

from ..errors import MoeCollabError

__all__ = ["pack", "packed_width", "unpack"]


def packed_width(num_codes: int, num_bits: int, *, padded: bool = False) -> int:
    """int32 words that `num_codes` codes of `num_bits` take."""
    return math.ceil(num_codes / (32 // num_bits)) if padded else math.ceil(num_codes * num_bits / 32)


def pack(codes: torch.Tensor, num_bits: int, packed_dim: int = 1) -> torch.Tensor:
    """Signed int8 codes [rows, columns] -> dense int32 words, along columns (or rows: `packed_dim=0`)."""
    _check_bits(num_bits)
    if packed_dim == 0:
        return pack(codes.T, num_bits).T.contiguous()
    rows, columns = codes.shape
    unsigned = codes.to(torch.int32) + (1 << (num_bits - 1))
    bits = (unsigned[..., None] >> torch.arange(num_bits, dtype=torch.int32, device=codes.device)) & 1
    words = packed_width(columns, num_bits)
    stream = torch.nn.functional.pad(bits.reshape(rows, -1), (0, 32 * words - columns * num_bits))
    shifts = torch.arange(32, dtype=torch.int64, device=codes.device)
    # int64 holds all 32 bits; the cast to int32 wraps, which keeps the bit pattern.
    return (stream.reshape(rows, words, 32).long() << shifts).sum(-1).to(torch.int32)


def unpack(packed: torch.Tensor, num_bits: int, shape: tuple[int, int], packed_dim: int = 1) -> torch.Tensor:
    """int32 words of either layout -> signed int8 codes of `shape`.

    Raises `MoeCollabError` when the words fit neither layout, as those of a truncated tensor.
    """
    _check_bits(num_bits)
    if packed_dim == 0:
        return unpack(packed.T, num_bits, (shape[1], shape[0])).T.contiguous()
    rows, columns = shape
    dense, padded = packed_width(columns, num_bits), packed_width(columns, num_bits, padded=True)
    if packed.ndim != 2 or packed.shape[0] != rows or packed.shape[1] not in (dense, padded):
        raise MoeCollabError(
            f"packed tensor of shape {list(packed.shape)} cannot hold {rows} x {columns} codes of {num_bits} bits: "
            f"expected [{rows}, {dense}] (or [{rows}, {padded}], the layout before compressed-tensors 0.18)."
        )
    column, per_word = torch.arange(columns, device=packed.device), 32 // num_bits
    is_dense = packed.shape[1] == dense
    first_bit = column * num_bits if is_dense else column // per_word * 32 + column % per_word * num_bits
    word, shift = first_bit // 32, (first_bit % 32).int()
    beyond = (shift + num_bits - 32).clamp(min=0)  # bits of a code that begin the next word
    codes = packed[:, word] >> shift & (1 << num_bits - beyond) - 1
    if 32 % num_bits:
        codes |= (packed[:, word + (beyond > 0)] & (1 << beyond) - 1) << num_bits - beyond
    return (codes - (1 << (num_bits - 1))).to(torch.int8)


def _check_bits(num_bits: int) -> None:
    if not 2 <= num_bits <= 8:
        raise MoeCollabError(f"num_bits: {num_bits} is not between 2 and 8.")
