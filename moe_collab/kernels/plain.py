"""The plain layout, which the reference reads: codes packed row by row as the checkpoint packs them."""

from __future__ import annotations

import torch

from ..formats import TERNARY, pack, pack_ternary, packed_width, ternary_width
from .arena import Cut
from .descriptors import Field, TensorSpec

__all__ = ["PLAIN", "PlainLayout", "row_words"]


def row_words(num_bits: int, columns: int, group_size: int) -> int:
    """int32 words of one row."""
    if num_bits == TERNARY:
        return -(-ternary_width(columns, group_size) // 4)
    return packed_width(columns, num_bits) if num_bits else 0


class PlainLayout:
    """int32 codes and float32 scales in row order."""

    codes_dtype = torch.int32
    scales_dtype = torch.float32

    def stored_bits(self, spec: TensorSpec) -> int:
        """As in the checkpoint."""
        return spec.num_bits

    def num_codes(self, spec: TensorSpec) -> int:
        """Words."""
        return spec.rows * row_words(spec.num_bits, spec.columns, spec.group_size)

    def num_scales(self, spec: TensorSpec) -> int:
        """One per group."""
        return spec.rows * spec.num_groups

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """The values unchanged."""
        return values

    def write_codes(
        self, codes: torch.Tensor, descriptor: torch.Tensor, spec: TensorSpec, packed: torch.Tensor, cut: Cut
    ) -> None:
        """Unpack the tensor, cut out the kept part, and pack that again."""
        start = int(descriptor[Field.CODES])
        for kept in cut.kept(spec, packed, codes.device):
            if spec.num_bits == 16:
                words = kept.contiguous().view(torch.int32)
            elif spec.num_bits == TERNARY:
                trits = pack_ternary(kept, spec.group_size)
                words = torch.nn.functional.pad(trits, (0, -trits.shape[1] % 4)).view(torch.int32)
            else:
                words = pack(kept, spec.num_bits)
            codes[start : start + words.numel()] = words.flatten()
            start += words.numel()


PLAIN = PlainLayout()
