"""How weights lie in GPU memory: fields of words, so that a tile of words is a run of whole 16-byte loads.

A *block* is as many times DEPTH columns as a word has fields. Word i of a row holds the block's columns i, DEPTH + i,
2 DEPTH + i...: field j of all words is a contiguous run of DEPTH columns, and meets as many contiguous activations.
Bits are split into *planes* of 8, 4, 2 or 1 bits with as many fields each: the widest in words of 32 bits, the others
in narrower ones. A plane is [blocks, rows, DEPTH] words; columns beyond the last are codes of zero.
"""

from __future__ import annotations

import torch

from ...errors import MoeCollabError
from ...formats import TERNARY
from ..arena import Cut
from ..descriptors import Field, TensorSpec

__all__ = ["DEPTH", "WIDEST_BLOCK", "FieldLayout"]

DEPTH = 16
"""Columns of one matrix instruction."""
WIDEST_BLOCK = 16 * DEPTH

# Bits of each plane, from the lowest bits of a code up; `kernels._packed` goes by the same rule.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
_WORDS = {32: torch.int32, 16: torch.int16, 8: torch.int8}


def _blocks(spec: TensorSpec, num_bits: int) -> int:
    return -(-spec.columns // (32 // _PLANES[num_bits][0] * DEPTH))


class FieldLayout:
    """int32 words; scales [groups, rows], bfloat16 while exact. Ternary is stored in 2 bits, 7 bits in 8."""

    codes_dtype = torch.int32
    scales_dtype = torch.bfloat16

    def stored_bits(self, spec: TensorSpec) -> int:
        """See the class."""
        return self.stored(spec.num_bits)

    @staticmethod
    def stored(num_bits: int) -> int:
        """What weights of `num_bits` are stored in."""
        return {TERNARY: 2, 7: 8}.get(num_bits, num_bits)

    def num_codes(self, spec: TensorSpec) -> int:
        """Words."""
        bits = self.stored_bits(spec)
        if bits in (0, 16):
            return -(-spec.rows * spec.columns * bits // 32 // 4) * 4
        return _blocks(spec, bits) * spec.rows * DEPTH * bits // _PLANES[bits][0]

    def num_scales(self, spec: TensorSpec) -> int:
        """One per group. Raises `MoeCollabError` for group sizes that the kernels do not know."""
        group = spec.group_size
        if spec.is_packed and group != spec.columns and (group < DEPTH or group & (group - 1)):
            raise MoeCollabError(
                f"group size {group}: the Triton kernels know whole rows and powers of two from {DEPTH} on. Use fewer "
                "tensor-parallel ranks, or MOE_COLLAB_BACKEND=reference."
            )
        return spec.rows * spec.num_groups

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, groups] -> [groups, rows]: neighbouring programs' threads read neighbouring rows."""
        return values.T

    def write_codes(
        self, codes: torch.Tensor, descriptor: torch.Tensor, spec: TensorSpec, packed: torch.Tensor, cut: Cut
    ) -> None:
        """Unpack, cut, sort into fields."""
        kept = cut.kept(spec, packed)
        is_dense = spec.num_bits == 16
        words = kept.contiguous().view(torch.int32) if is_dense else _fields(kept, self.stored_bits(spec))
        start = int(descriptor[Field.CODES])
        codes[start : start + words.numel()] = words.flatten()


def _fields(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Signed int8 codes [rows, columns] -> int32 words of all planes, one after the other."""
    planes = _PLANES[num_bits]
    fields, rows = 32 // planes[0], codes.shape[0]
    unsigned = codes.int() + (1 << (num_bits - 1))
    width = fields * DEPTH
    padded = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % width), value=1 << (num_bits - 1))
    parts = padded.view(rows, -1, fields, DEPTH).permute(1, 0, 2, 3)
    found, low = [], 0
    for bits in planes:
        shifts = (torch.arange(fields, device=codes.device) * bits)[:, None]
        # int64 holds all 32 bits; the casts wrap, which keeps the bit pattern.
        plane = (((parts >> low) & ((1 << bits) - 1)).long() << shifts).sum(2)
        found.append(plane.to(_WORDS[bits * fields]).contiguous().view(-1).view(torch.int32))
        low += bits
    return torch.cat(found)
