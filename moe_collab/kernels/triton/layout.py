"""How weights lie in GPU memory: fields of words, so that a tile of words is a run of whole 16-byte loads.

A *block* is as many times DEPTH columns as a word has fields. Word i of a row holds the block's columns i, DEPTH + i,
2 DEPTH + i...: field j of all words is a contiguous run of DEPTH columns, and meets as many contiguous activations.
Bits are split into *planes* of 8, 4, 2 or 1 bits with as many fields each: the widest in words of 32 bits, the others
in narrower ones. A plane is [blocks, rows, DEPTH] words; columns beyond the last are codes of zero.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        start = int(descriptor[Field.CODES])
        target = codes[start : start + self.num_codes(spec)]
        planes, first = self._planes(target, spec), 0
        for kept in cut.kept(spec, packed, codes.device):
            rows = slice(first, first + len(kept))
            if spec.num_bits == 16:
                planes[0][rows] = kept
            else:
                _write_fields(kept, self.stored_bits(spec), [plane[:, rows] for plane in planes])
            first += len(kept)

    def _planes(self, words: torch.Tensor, spec: TensorSpec) -> list[torch.Tensor]:
        """Views of a weight's words: [blocks, rows, DEPTH] each; of 16 bits, the weight [rows, columns] itself."""
        bits = self.stored_bits(spec)
        if bits == 16:
            return [words.view(torch.bfloat16)[: spec.rows * spec.columns].view(spec.rows, spec.columns)]
        found, start, size = [], 0, _blocks(spec, bits) * spec.rows * DEPTH
        for plane in _PLANES[bits]:
            dtype = _WORDS[32 // _PLANES[bits][0] * plane]
            count = size * dtype.itemsize // 4
            found.append(words[start : start + count].view(dtype).view(-1, spec.rows, DEPTH))
            start += count
        return found


def _write_fields(codes: torch.Tensor, num_bits: int, planes: Sequence[torch.Tensor]) -> None:
    """Signed int8 codes [rows, columns] into planes [blocks, rows, DEPTH]."""
    fields = 32 // _PLANES[num_bits][0]
    unsigned = codes.int() + (1 << (num_bits - 1))
    padded = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % (fields * DEPTH)), value=1 << (num_bits - 1))
    parts = padded.view(len(codes), -1, fields, DEPTH).permute(1, 0, 2, 3)
    low = 0
    for plane, bits in zip(planes, _PLANES[num_bits], strict=True):
        shifts = (torch.arange(fields, device=codes.device) * bits)[:, None]
        # int64 holds all 32 bits; the casts wrap, which keeps the bit pattern.
        plane.copy_((((parts >> low) & ((1 << bits) - 1)).long() << shifts).sum(2).to(plane.dtype))
        low += bits
