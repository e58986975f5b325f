"""How weights lie in GPU memory: planes of 16-bit words, so that a tile of words is a run of whole 16-byte loads.

A *block* is 16 times DEPTH columns of a weight: 16 *fields*, field f its columns f DEPTH, f DEPTH + 1... Word i of a
row holds column i of as many fields as fit, so a field of all words is a contiguous run of columns and meets as many
contiguous activations; two neighbouring words, as one register holds them, are two neighbouring weights at each place.
A block takes as many planes of words [rows, DEPTH] as weights have bits:

    2, 4, 8 bits   8, 4 or 2 fields a plane
    3 bits         5 fields a plane; the three bits of field 15 are the last of each
    5, 6 bits      before planes of the lower 4 bits, one or two with the upper bits of 16 or 8 fields

Columns beyond the last are codes of zero; planes of nothing else, at the end, are not stored.
"""

from __future__ import annotations

import torch

from ...errors import MoeCollabError
from ...formats import TERNARY
from ..arena import Cut
from ..descriptors import Field, TensorSpec

__all__ = ["BLOCK", "DEPTH", "FieldLayout"]

DEPTH = 16
"""Columns of a field, as of one matrix instruction."""
BLOCK = 16 * DEPTH
"""Columns of a block."""
_WORD = 16
"""Bits."""


class FieldLayout:
    """int32 words, two of 16 bits each; scales [groups, rows], bfloat16 while exact.

    Ternary is stored in 2 bits, 7 bits in 8.
    """

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
        whole, rest = divmod(spec.columns, BLOCK)
        lower = _lower(bits)
        planes = min(bits, bits - lower + -(-rest // (_WORD // lower * DEPTH))) if rest else 0
        return (whole * bits + planes) * spec.rows * DEPTH // 2

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
        start, first = int(descriptor[Field.CODES]), 0
        words = codes[start : start + self.num_codes(spec)]
        for kept in cut.kept(spec, packed, codes.device):
            rows = slice(first, first + len(kept))
            if spec.num_bits == 16:
                dense = words.view(torch.bfloat16)[: spec.rows * spec.columns]
                dense.view(spec.rows, spec.columns)[rows] = kept
            else:
                planes = words.view(torch.int16).view(-1, spec.rows, DEPTH)
                planes[:, rows] = _planes(kept, self.stored_bits(spec))[: len(planes)]
            first += len(kept)


def _lower(num_bits: int) -> int:
    """Bits that a field has in the planes that come last; `fields.py` goes by the same rule."""
    return 4 if num_bits in (5, 6) else num_bits


def _planes(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Signed int8 codes [rows, columns] -> all planes, int16 [blocks * num_bits, rows, DEPTH]."""
    lower, zero = _lower(num_bits), 1 << (num_bits - 1)
    padded = torch.nn.functional.pad(codes.int() + zero, (0, -codes.shape[1] % BLOCK), value=zero)
    fields = padded.view(len(codes), -1, 16, DEPTH).permute(2, 1, 0, 3)  # [16, blocks, rows, DEPTH]

    def words(parts: torch.Tensor, bits: int) -> list[torch.Tensor]:
        """Of all parts [16, ...], as many as fit in each."""
        return [sum(part << bits * i for i, part in enumerate(some)) for some in parts.split(_WORD // bits)]

    found = words(fields >> lower, num_bits - lower) if num_bits > lower else []
    if num_bits == 3:
        found += [word | (fields[15] >> p & 1) << 15 for p, word in enumerate(words(fields[:15], 3))]
    else:
        found += words(fields & (1 << lower) - 1, lower)
    return torch.stack(found, 1).flatten(0, 1).to(torch.int16)  # the cast wraps, which keeps the bit pattern
