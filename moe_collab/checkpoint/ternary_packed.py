"""The format `ternary-packed`, made known to compressed-tensors 0.17 to 0.19.

A module has `weight_packed` uint8 [rows, 26 bytes per group of 128], `weight_scale` [rows, groups] and `weight_shape`
int64 [2]; its scheme says `num_bits: 2`, symmetric, for compressed-tensors has no name for 1.6 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from ..errors import MoeCollabError
from ..formats import TERNARY_PACKED, dequantize, pack_ternary, ternary_width, unpack_ternary

__all__ = ["TernaryCompressor", "register", "ternary_codes"]


def register() -> None:
    """Make `format: ternary-packed` valid in schemes and configs; may be called more than once."""
    if TERNARY_PACKED not in CompressionFormat._value2member_map_:
        _extend(CompressionFormat, TERNARY_PACKED)
        # Pydantic compiled the enumeration's members into these two.
        QuantizationScheme.model_rebuild(force=True)
        QuantizationConfig.model_rebuild(force=True)
    if TERNARY_PACKED not in BaseCompressor.registered_names():
        BaseCompressor.register_value(TernaryCompressor, name=TERNARY_PACKED)


def _extend(enumeration: Any, value: str) -> None:
    """Add a member to a closed string enumeration: compressed-tensors has no other door."""
    name = value.replace("-", "_")
    member = str.__new__(enumeration, value)
    member._name_, member._value_, member.__objclass__ = name, value, enumeration
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = enumeration._value2member_map_[value] = member
    type.__setattr__(enumeration, name, member)


def ternary_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 codes [rows, columns] of a weight that is exactly `scale` [rows, groups] times -1, 0 or 1.

    Raises `MoeCollabError` for any other weight: nothing is rounded here.
    """
    signs = scale.sign().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    codes = (weight.sign() * signs).to(torch.int8)
    if not torch.equal(dequantize(codes, scale, dtype=weight.dtype), weight):
        raise MoeCollabError(
            "the weight is not its scales times -1, 0 or 1, so it cannot be stored ternary. Round it with a quantizer "
            "that knows ternary; GPTQ at 2 bits does not."
        )
    return codes


class TernaryCompressor(BaseCompressor):
    """Packs by `formats.pack_ternary`; chosen only through `scheme.format`, never inferred."""

    @classmethod
    def can_compress(cls, module_type: type, scheme: QuantizationScheme) -> bool:
        """Never unasked."""
        return False

    @classmethod
    def compression_param_names(cls, scheme: QuantizationScheme) -> tuple[str, ...]:
        """Suffixes of a module's tensors."""
        return ("weight_packed", "weight_scale", "weight_shape")

    @classmethod
    def compress(cls, state_dict: dict[str, torch.Tensor], scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
        """`weight` and `weight_scale` -> the three tensors. Raises `MoeCollabError` if the weight is not ternary."""
        state = {name: tensor for name, tensor in state_dict.items() if name != "weight_zero_point"}
        weight = state.pop("weight")
        rows, columns = weight.shape
        group = _group_size(scheme, columns)
        if weight.device.type == "meta":
            packed = torch.empty(rows, ternary_width(columns, group), dtype=torch.uint8, device="meta")
        else:
            packed = pack_ternary(ternary_codes(weight, state["weight_scale"]), group)
        return state | {"weight_packed": packed, "weight_shape": torch.tensor([rows, columns])}

    @classmethod
    def decompress(cls, state_dict: dict[str, torch.Tensor], scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
        """The inverse; `weight` gets the dtype of its scales."""
        state = dict(state_dict)
        packed, scale = state.pop("weight_packed"), state["weight_scale"]
        if packed.device.type == "meta":
            # Channels that five does not divide come out too wide; what is on meta is only validated, then dropped.
            columns = scale.shape[1] * _group_size(scheme, 5 * packed.shape[1])
            return state | {"weight": torch.empty(packed.shape[0], columns, dtype=scale.dtype, device="meta")}
        rows, columns = (int(size) for size in state["weight_shape"])
        codes = unpack_ternary(packed, (rows, columns), _group_size(scheme, columns))
        return state | {"weight": dequantize(codes, scale)}


def _group_size(scheme: QuantizationScheme, columns: int) -> int:
    weights = scheme.weights
    if weights is None or weights.num_bits != 2 or not weights.symmetric:
        raise MoeCollabError(
            f"format {TERNARY_PACKED} needs weights of num_bits 2, symmetric; the scheme has {weights}."
        )
    return columns if weights.group_size in (None, -1) else int(weights.group_size)
