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
    padding, half = -columns % 32, 1 << (num_bits - 1)
    # What lies beyond the columns is to be zero once it is made unsigned.
    whole = torch.nn.functional.pad(codes, (0, padding), value=-half)
    places = whole.reshape(rows, (columns + padding) // 32, 32).permute(2, 0, 1).contiguous()
    words = torch.zeros(num_bits, *places.shape[1:], dtype=torch.int32, device=codes.device)
    for place, own in enumerate(places):
        (word, shift), unsigned = divmod(place * num_bits, 32), (own.int() + half) & 2 * half - 1
        words[word] |= unsigned << shift
        if shift + num_bits > 32:  # the code begins in one word and ends in the next
            words[word + 1] |= unsigned >> (32 - shift)
    return words.permute(1, 2, 0).flatten(1)[:, : packed_width(columns, num_bits)].contiguous()


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
    half = 1 << (num_bits - 1)
    if packed.shape[1] != dense:
        per_word = 32 // num_bits
        shifts = torch.arange(per_word, dtype=torch.int32, device=packed.device) * num_bits
        codes = (packed[..., None] >> shifts & 2 * half - 1).reshape(rows, -1)
        return (codes[:, :columns] - half).to(torch.int8)
    whole = torch.nn.functional.pad(packed, (0, -dense % num_bits))
    words = whole.reshape(rows, whole.shape[1] // num_bits, num_bits).permute(2, 0, 1).contiguous()
    places = torch.empty(32, *words.shape[1:], dtype=torch.int8, device=packed.device)
    for place, own in enumerate(places):
        word, shift = divmod(place * num_bits, 32)
        code = words[word] >> shift
        if shift + num_bits > 32:  # the code begins in one word and ends in the next
            code = code & (1 << 32 - shift) - 1 | words[word + 1] << 32 - shift
        own.copy_((code & 2 * half - 1) - half)
    return places.permute(1, 2, 0).flatten(1)[:, :columns].contiguous()


def _check_bits(num_bits: int) -> None:
    if not 2 <= num_bits <= 8:
        raise MoeCollabError(f"num_bits: {num_bits} is not between 2 and 8.")
