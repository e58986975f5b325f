"""One arena per layer: all its weights in three flat buffers, and the table that says where each one lies."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from ..errors import MoeCollabError
from ..formats import TERNARY, unpack, unpack_ternary
from .descriptors import Field, TensorSpec

__all__ = ["Arena", "Layout", "allocate"]

_AT_ONCE = 4 << 20
"""About how many weights of a tensor are unpacked at a time."""
_HUGE_PAGE = 2 << 20


class Layout(Protocol):
    """How a backend wants weights to lie in memory."""

    codes_dtype: torch.dtype
    scales_dtype: torch.dtype
    """The type of scales, as long as it holds them exactly; otherwise they are kept in float32."""

    def stored_bits(self, spec: TensorSpec) -> int:
        """`Field.NUM_BITS` of the stored weight, which may be wider than the checkpoint's."""

    def num_codes(self, spec: TensorSpec) -> int:
        """Elements of `codes_dtype` that the weight takes."""

    def num_scales(self, spec: TensorSpec) -> int:
        """Scales of the weight, and as many zero points if it has any, padding included."""

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """Put scales or zero points [rows, groups] into the order in which the kernel reads them."""

    def write_codes(
        self, codes: torch.Tensor, descriptor: torch.Tensor, spec: TensorSpec, packed: torch.Tensor, cut: Cut
    ) -> None:
        """Write the part `cut` of the checkpoint tensor `packed` to the place in `codes` that `descriptor` gives."""


class Cut:
    """The part of a checkpoint tensor of `shape` that a rank keeps; it begins at (`row`, `column`)."""

    def __init__(self, shape: tuple[int, int], row: int = 0, column: int = 0) -> None:
        self.shape, self.row, self.column = shape, row, column

    def kept(self, spec: TensorSpec, packed: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
        """The kept part, as large as `spec`, of the checkpoint tensor `packed`.

        It comes as signed int8 codes (16 bits: as the weights) on `device`, in pieces [some rows, spec.columns], top to
        bottom, because unpacking takes many times their memory. Raises `MoeCollabError` if the tensor is too small.
        """
        rows_end, columns_end = self.row + spec.rows, self.column + spec.columns
        width = self.shape[1] if spec.is_packed else packed.shape[-1]
        if packed.ndim != 2 or rows_end > len(packed) or columns_end > width:
            raise MoeCollabError(
                f"shape {list(packed.shape)} does not hold rows {self.row} to {rows_end}, columns {self.column} to "
                f"{columns_end} of {list(self.shape)} weights."
            )
        step = max(1, _AT_ONCE // self.shape[1])
        for first in range(0, spec.rows, step):
            rows = min(step, spec.rows - first)
            stored = packed[self.row + first : self.row + first + rows].to(device)
            if spec.num_bits == TERNARY:
                stored = unpack_ternary(stored, (rows, self.shape[1]), spec.group_size)
            elif spec.is_packed:
                stored = unpack(stored, spec.num_bits, (rows, self.shape[1]))
            yield stored[:, self.column : columns_end]


class Arena:
    """Codes, scales and zero points of `specs`, one after the other, and their table int64 [len(specs), 7].

    The table stays in host memory, where it is read as weights are written to `device`.
    """

    def __init__(self, specs: Sequence[TensorSpec], layout: Layout, device: torch.device | str = "cpu") -> None:
        self.specs, self.device = list(specs), torch.device(device)
        self.table = torch.zeros(len(specs), len(Field), dtype=torch.int64, device="cpu")
        scales = zeros = 0
        for row, spec in zip(self.table, self.specs, strict=True):
            zero = zeros if spec.is_packed and not spec.symmetric else -1
            row.copy_(torch.tensor([0, spec.group_size, 0, scales, zero, spec.rows, spec.columns], device="cpu"))
            scales += layout.num_scales(spec)
            zeros += layout.num_scales(spec) if zero >= 0 else 0
        self.use(layout)
        self.scales = torch.zeros(scales, dtype=layout.scales_dtype, device=self.device)
        self.zero_points = torch.zeros(zeros, dtype=torch.int8, device=self.device)

    def use(self, layout: Layout) -> None:
        """Allocate memory for the codes as `layout` stores them; codes written before are lost."""
        self.layout = layout
        codes = 0
        for row, spec in zip(self.table, self.specs, strict=True):
            row[Field.NUM_BITS], row[Field.CODES] = layout.stored_bits(spec), codes
            codes += layout.num_codes(spec)
        self.codes = allocate(codes, layout.codes_dtype, self.device)

    def write_codes(self, index: int, packed: torch.Tensor, cut: Cut | None = None) -> None:
        """Store the codes (or the bfloat16 weight) of weight `index`. Raises `MoeCollabError` if they do not fit."""
        spec = self.specs[index]
        self.layout.write_codes(
            self.codes, self.table[index], spec, packed.contiguous(), cut or Cut((spec.rows, spec.columns))
        )

    def write_scales(self, index: int, scales: torch.Tensor) -> None:
        """Store scales [rows, groups] exactly: all scales of the arena become float32 if their type would round any."""
        if self.scales.dtype != torch.float32 and not torch.equal(
            scales.to(self.scales.dtype).double(), scales.double()
        ):
            self.scales = self.scales.float()
        self._write(self.scales, int(self.table[index, Field.SCALES]), scales)

    def write_zero_points(self, index: int, zero_points: torch.Tensor) -> None:
        """Store signed zero points int8 [rows, groups]."""
        self._write(self.zero_points, int(self.table[index, Field.ZERO_POINTS]), zero_points)

    def _write(self, buffer: torch.Tensor, start: int, values: torch.Tensor) -> None:
        arranged = self.layout.arrange(values).flatten()
        buffer[start : start + arranged.numel()] = arranged.to(buffer.dtype)


def allocate(count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Zeroed memory. Host memory takes space only as it is written, and consists of huge pages if the system has them.

    Kernels stream through it: with pages of 4 KiB address translation costs several percent of their time.
    """
    size = count * dtype.itemsize
    if size < _HUGE_PAGE or torch.device(device).type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype, device=device)
    # Private, because shared memory gets no huge pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count)
