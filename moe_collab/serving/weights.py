"""From checkpoint tensors to an arena: schemes to specs, placing, completeness. Shared by experts and linear layers."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, TypeGuard

import torch

from ..errors import MoeCollabError
from ..formats import DENSE, PRUNED, TERNARY, TERNARY_PACKED, Scheme, pack_ternary, unpack, unpack_ternary
from ..kernels.arena import Arena, Cut
from ..kernels.backends import backend
from ..kernels.descriptors import TensorSpec

__all__ = ["BUFFERS", "KINDS", "CheckpointArena", "is_packed", "make_spec", "stored_scheme"]

KINDS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
"""Suffixes of a module's tensors in the checkpoint."""

BUFFERS = ("codes", "scales", "zero_points", "table", "bias")


def is_packed(described: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether a compressed-tensors scheme is weight-only, in integers of 2 to 8 bits or ternary, as we can serve it."""
    weights = described and described.get("weights")
    if not described or not weights or described.get("input_activations") is not None:
        return False
    is_int = str(getattr(weights.type, "value", weights.type)) == "int"
    if described.get("format") == TERNARY_PACKED:
        return is_int and weights.num_bits == 2 and bool(weights.symmetric)
    return is_int and described.get("format") == "pack-quantized" and 2 <= weights.num_bits <= 8


def stored_scheme(name: str, described: dict[str, Any] | None) -> Scheme:
    """How a module is stored; None = unquantized. Raises `MoeCollabError` for a scheme that is not `is_packed`."""
    if described is None:
        return DENSE
    weights = described["weights"]
    if not is_packed(described):
        raise MoeCollabError(
            f"{name}: {described.get('format')} of {weights.num_bits}-bit {weights.type} is not served beside packed "
            "weights. Pack it too (pack-quantized or ternary-packed, weights only), or leave it unquantized."
        )
    if weights.actorder == "group":
        raise MoeCollabError(f"{name}: actorder `group` (weight_g_idx) is not served. Quantize with `static`.")
    return Scheme.described(weights.num_bits, weights.group_size, weights.symmetric, described["format"])


def make_spec(name: str, scheme: Scheme, shape: tuple[int, int], full_columns: int) -> TensorSpec:
    """The spec of this rank's `shape`; a stored group that straddles ranks is cut into smaller equal ones."""
    rows, columns = shape
    if not scheme.is_packed:
        return TensorSpec(scheme.num_bits, rows, columns)
    try:
        group = math.gcd(scheme.group_of(full_columns), columns)
        return TensorSpec(scheme.num_bits, rows, columns, group, scheme.symmetric)
    except MoeCollabError as error:
        raise MoeCollabError(f"{name}: {error}") from error


class CheckpointArena(Arena):
    """An arena filled tensor by tensor as the checkpoint is read.

    `names` and `schemes` are those of the modules behind `specs`, each of which has a bias if `biases`: float32, one
    after the other.
    """

    def __init__(self, specs: list[TensorSpec], names: list[str], schemes: list[Scheme], biases: bool = False) -> None:
        # vLLM creates weights where the default device is the one that serves.
        super().__init__(specs, backend().layout, torch.get_default_device())
        self.names, self.schemes = names, schemes
        self._starts = list(accumulate((spec.rows for spec in specs), initial=0))
        self.bias = torch.zeros(self._starts[-1], dtype=torch.float32) if biases else None
        self._loaded: set[tuple[int, str]] = set()

    def place(self, index: int, kind: str, tensor: torch.Tensor, cut: Cut) -> None:
        """Write this rank's `cut` of one checkpoint tensor. Raises `MoeCollabError` naming the tensor."""
        name, scheme = f"{self.names[index]}.{kind}", self.schemes[index]
        fits = scheme != PRUNED and (kind == "bias" or (kind == "weight") == (scheme == DENSE))
        if not fits or kind == "weight_g_idx":
            raise MoeCollabError(f"{name}: contradicts config.json, which stores this module as {scheme}.")
        try:
            if kind == "weight":
                self._place_dense(index, tensor, cut)
            elif kind == "weight_packed":
                self._place_packed(index, tensor, cut)
            elif kind == "weight_shape":
                _expect(tensor.tolist(), cut.shape)
            elif kind == "bias":
                self._place_bias(index, tensor, cut)
            else:
                self._place_groups(index, kind, tensor, cut, scheme.group_of(cut.shape[1]))
        except (MoeCollabError, RuntimeError, ValueError) as error:
            raise MoeCollabError(f"{name}: {error} The checkpoint is truncated or its config wrong.") from error
        self._loaded.add((index, kind))

    def _place_dense(self, index: int, weight: torch.Tensor, cut: Cut) -> None:
        _expect(weight.shape, cut.shape)
        if weight.dtype != torch.bfloat16:
            raise MoeCollabError(f"unquantized experts are served in bfloat16, not {weight.dtype}.")
        self.write_codes(index, weight, cut)

    def _place_bias(self, index: int, bias: torch.Tensor, cut: Cut) -> None:
        """Ranks that hold other columns of a weight add their results, so the first of them alone adds the bias."""
        _expect(bias.shape, cut.shape[:1])
        if cut.column == 0:
            start, rows = self._starts[index], self.specs[index].rows
            self.bias[start : start + rows] = bias[cut.row : cut.row + rows]  # type: ignore[index]

    def _place_packed(self, index: int, packed: torch.Tensor, cut: Cut) -> None:
        _expect([packed.shape[0]], [cut.shape[0]])
        spec, group = self.specs[index], self.schemes[index].group_of(cut.shape[1])
        if spec.num_bits == TERNARY and spec.group_size != group:
            # Ternary groups each begin a byte, so cutting a group moves all that comes after it.
            codes = unpack_ternary(packed, cut.shape, group)
            packed = pack_ternary(codes, spec.group_size)
        self.write_codes(index, packed, cut)

    def _place_groups(self, index: int, kind: str, tensor: torch.Tensor, cut: Cut, stored_group: int) -> None:
        spec = self.specs[index]
        shape = (cut.shape[0], cut.shape[1] // stored_group)
        if kind == "weight_zero_point":
            tensor = unpack(tensor, spec.num_bits, shape, packed_dim=0)
        _expect(tensor.shape, shape)
        groups = tensor[cut.row : cut.row + spec.rows].repeat_interleave(stored_group // spec.group_size, dim=1)
        first = cut.column // spec.group_size
        write = self.write_zero_points if kind == "weight_zero_point" else self.write_scales
        write(index, groups[:, first : first + spec.num_groups])

    def check(self, what: str) -> None:
        """Raises `MoeCollabError` if the checkpoint lacked a tensor of `what` that this rank needs."""
        missing = [
            f"{self.names[index]}.{kind}"
            for index, spec in enumerate(self.specs)
            for kind in _needed(spec, self.bias is not None)
            if (index, kind) not in self._loaded
        ]
        if missing:
            raise MoeCollabError(
                f"the checkpoint lacks {len(missing)} tensors of {what}, the first {missing[0]}. Copy or make it again."
            )

    def register(self, layer: torch.nn.Module) -> None:
        """Make the arena buffers of `layer`."""
        for name in BUFFERS:
            buffer = getattr(self, name)
            buffer = buffer if buffer is None else buffer.to(self.device)
            layer.register_buffer(f"arena_{name}", buffer, persistent=False)


def _needed(spec: TensorSpec, bias: bool) -> list[str]:
    if spec.num_bits == 0:
        return []
    needed = ["weight"] if spec.num_bits == 16 else ["weight_packed", "weight_scale"]
    return needed + ["weight_zero_point"] * (not spec.symmetric) + ["bias"] * bias


def _expect(shape: object, expected: object) -> None:
    if list(shape) != list(expected):  # type: ignore[call-overload]
        raise MoeCollabError(f"shape {list(shape)}, expected {list(expected)}.")  # type: ignore[call-overload]
