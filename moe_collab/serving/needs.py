"""Which checkpoints stock vLLM cannot serve on this platform."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from vllm.platforms import current_platform

from ..architectures import FAMILIES, text_config
from ..formats import TERNARY_PACKED

__all__ = ["has_stock_int4", "needs_this_package", "num_experts_of", "routes_in_groups"]


def needs_this_package(
    quantization: dict[str, Any], grouped_routing: bool = False, num_experts: int | None = None
) -> bool:
    """Whether stock vLLM lacks a kernel for something in this `quantization_config`, or would miss absent experts.

    It has none for experts that differ within a layer, and none for experts in packed integers other than 4 and 8
    bits. On CPUs it has one only for 4 bits in groups, routed without groups, and only where the CPU has AMX
    (vLLM 0.32, CPUExpertsInt4). Of other layers it has, on CPUs, a kernel for 4 bits alone, and not everywhere;
    on GPUs, for 4 and 8 bits. It knows no ternary.
    """
    groups = list(quantization.get("config_groups", {}).values())
    targets = [target for group in groups for target in group.get("targets", [])]
    if any(_format(group, quantization) == TERNARY_PACKED for group in groups):
        return True
    if _lacks_experts(targets + quantization.get("ignore", []), num_experts):
        return True
    schemes: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    others = set()
    for group in groups:
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
    on_cpu = current_platform.is_cpu()
    if others - ({4, 8} if not on_cpu else {4} if has_stock_int4() else set()):
        return True
    if all(len(found) == 1 and (16,) in found for found in schemes.values()):
        return False
    mixed = any(len(found) > 1 for found in schemes.values())
    bits = {found[0] for layer in schemes.values() for found in layer} - {16, None}
    stock = {4, 8}
    if on_cpu:
        strategies = {found[2] for layer in schemes.values() for found in layer if len(found) > 1}
        served = torch.cpu._is_amx_tile_supported() and strategies == {"group"} and not grouped_routing
        stock = {4} if served else set()
    return bool(bits) and (mixed or not bits <= stock)


def has_stock_int4() -> bool:
    """vLLM 0.32's build for CPUs with AVX2 alone lacks its 4-bit linear kernel, and fails at the first token."""
    import vllm._custom_ops  # noqa: F401 loads the kernels

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def _lacks_experts(targets: list[str], num_experts: int | None) -> bool:
    """Whether the targets of some layer leave out one of its experts, as those of masked experts do."""
    named: dict[str, set[int]] = defaultdict(set)
    for target in targets:
        layer = _expert_layer(target)
        if layer is None:
            continue
        match = re.search(r"experts\\?\.\(?(\d+(?:\|\d+)*)\)?\\?\.", target)
        if match is None:
            return False
        named[layer.removeprefix("re:^").replace("\\", "")] |= {int(index) for index in match[1].split("|")}
    return any(not set(range(num_experts or max(indices) + 1)) <= indices for indices in named.values())


def num_experts_of(hf_config: Any) -> int | None:
    """Routed experts of a layer, None where the config does not say."""
    keys = [key for family in FAMILIES for key in family.num_experts_keys]
    found = (getattr(text_config(hf_config), key, None) for key in keys)
    return next((count for count in found if isinstance(count, int)), None)


def _format(group: dict[str, Any], quantization: dict[str, Any]) -> str | None:
    return group.get("format") or quantization.get("format")


def routes_in_groups(hf_config: Any) -> bool:
    """Whether the router first chooses among groups of experts."""
    return (getattr(hf_config, "n_group", None) or 1) > 1


def _expert_layer(target: str) -> str | None:
    """The part of a target before `experts`, which tells layers apart; None if it names no routed expert."""
    match = re.search(r"(?<!shared_)experts\b", target)
    return target[: match.start()] or "*" if match else None
