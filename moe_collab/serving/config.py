"""Which checkpoints are ours, and which layers of them."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.platforms import current_platform

from ..formats import TERNARY_PACKED
from ..kernels.backends import backend
from .experts import ExpertSchemes, MixedBitMoEMethod
from .linear import SERVED, MixedBitLinearMethod
from .weights import is_packed, stored_scheme

__all__ = ["NAME", "MoeCollabConfig", "needs_this_package"]

NAME = "moe_collab"


class MoeCollabConfig(CompressedTensorsConfig):
    """compressed-tensors with routed experts of any mix of bits; every other layer is vLLM's own."""

    def get_name(self) -> str:
        """The registry name."""
        return NAME

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a checkpoint only if stock vLLM cannot serve it on this platform, or the user asks for us."""
        if hf_quant_cfg.get("quant_method") != "compressed-tensors":
            return None
        if user_quant not in (None, "compressed-tensors", NAME):
            return None
        return NAME if user_quant == NAME or needs_this_package(hf_quant_cfg, _routes_in_groups(hf_config)) else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Our methods for routed experts, for ternary and, on CPUs, for linear layers in packed integers.

        Else the parent's: stock vLLM has only a 4-bit linear kernel for CPUs, which is slower than ours but faster than
        the reference.
        """
        if isinstance(layer, RoutedExperts):
            return MixedBitMoEMethod(layer.moe_config, self._expert_schemes(layer, prefix))
        if type(layer) in SERVED:
            names = self._parts(prefix)
            schemes = [self._scheme(layer, name) for name in names]
            if _serves_linear(schemes):
                return MixedBitLinearMethod(names, [stored_scheme(n, s) for n, s in zip(names, schemes, strict=True)])
        return super().get_quant_method(layer, prefix)

    def _parts(self, prefix: str) -> list[str]:
        """Checkpoint names of the modules that vLLM fuses into `prefix`."""
        parent, _, name = prefix.rpartition(".")
        return [f"{parent}.{part}" for part in self.packed_modules_mapping.get(name, [])] or [prefix]

    def _scheme(self, layer: torch.nn.Module, name: str) -> dict[str, Any] | None:
        """None where the module is ignored or no target names it."""
        try:
            return self.get_scheme_dict(layer, name)
        except ValueError:
            return None

    def _expert_schemes(self, layer: RoutedExperts, prefix: str) -> ExpertSchemes:
        self._add_fused_moe_to_target_scheme_map()
        projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        table = []
        for expert in range(layer.moe_config.num_logical_experts):
            names = [f"{prefix}.{expert}.{p}" for p in projections]
            table.append(tuple(stored_scheme(name, self.get_scheme_dict(layer, name)) for name in names))
        return ExpertSchemes(prefix, projections, table)


def _serves_linear(parts: list[dict[str, Any] | None]) -> bool:
    """Whether a linear layer with these parts (None = unquantized) is ours."""
    bits = {part["weights"].num_bits if is_packed(part) else part and 0 for part in parts}
    if not bits - {None} or 0 in bits:
        return False
    if any(part and part["format"] == TERNARY_PACKED for part in parts):
        return True
    return current_platform.is_cpu() and (bits != {4} or backend().is_fast)


def needs_this_package(quantization: dict[str, Any], grouped_routing: bool = False) -> bool:
    """Whether stock vLLM lacks a kernel for something in this `quantization_config`.

    It has none for experts that differ within a layer, and none for experts in packed integers other than 4 and 8
    bits. On CPUs it has one only for 4 bits in groups, routed without groups, and only where the CPU has AMX
    (vLLM 0.32, CPUExpertsInt4). Of other layers it has, on CPUs, a kernel for 4 bits alone. It knows no ternary.
    """
    if any(_format(group, quantization) == TERNARY_PACKED for group in quantization.get("config_groups", {}).values()):
        return True
    schemes: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    others = set()
    for group in quantization.get("config_groups", {}).values():
        weights = group.get("weights") or {}
        if _format(group, quantization) != "pack-quantized":
            weights = {}
        keys = ("num_bits", "type", "strategy", "group_size", "symmetric")
        for layer in map(_expert_layer, group.get("targets", [])):
            if layer:
                schemes[layer].add(tuple(weights.get(key) for key in keys))
            elif weights.get("type") == "int":
                others.add(weights["num_bits"])
    for layer in filter(None, map(_expert_layer, quantization.get("ignore", []))):
        schemes[layer].add((16,))
    if current_platform.is_cpu() and others - {4}:
        return True
    if all(len(found) == 1 and (16,) in found for found in schemes.values()):
        return False
    mixed = any(len(found) > 1 for found in schemes.values())
    bits = {found[0] for layer in schemes.values() for found in layer} - {16, None}
    stock = {4, 8}
    if current_platform.is_cpu():
        strategies = {found[2] for layer in schemes.values() for found in layer if len(found) > 1}
        served = torch.cpu._is_amx_tile_supported() and strategies == {"group"} and not grouped_routing
        stock = {4} if served else set()
    return bool(bits) and (mixed or not bits <= stock)


def _format(group: dict[str, Any], quantization: dict[str, Any]) -> str | None:
    return group.get("format") or quantization.get("format")


def _routes_in_groups(hf_config: Any) -> bool:
    return (getattr(hf_config, "n_group", None) or 1) > 1


def _expert_layer(target: str) -> str | None:
    """The part of a target before `experts`, which tells layers apart; None if it names no routed expert."""
    match = re.search(r"(?<!shared_)experts\b", target)
    return target[: match.start()] or "*" if match else None
