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
    on GPUs, for 4 and 8 bits, alike in all parts it fuses: where other layers differ at all, that is looked at layer
    by layer. It knows no ternary.
    """
    groups = list(quantization.get("config_groups", {}).values())
    targets = [target for group in groups for target in group.get("targets", [])]
    if any(_format(group, quantization) == TERNARY_PACKED for group in groups):
        return True
    if _lacks_experts(targets + quantization.get("ignore", []), num_experts):
        return True
    schemes: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    others: set[tuple[Any, ...]] = set()
    for group in groups:
        weights = group.get("weights") or {}
        if _format(group, quantization) != "pack-quantized":
            weights = {}
        keys = ("num_bits", "type", "strategy", "group_size", "symmetric")
        scheme = tuple(weights.get(key) for key in keys)
        for layer in map(_expert_layer, group.get("targets", [])):
            if layer:
                schemes[layer].add(scheme)
            elif weights.get("type") == "int":
                others.add(scheme)
    for target in quantization.get("ignore", []):
        if layer := _expert_layer(target):
            schemes[layer].add((16,))
        elif "_proj" in target and others:
            others.add((16,))
    return not _has_stock_linears(others) or not _has_stock_experts(list(schemes.values()), grouped_routing)


def _has_stock_linears(schemes: set[tuple[Any, ...]]) -> bool:
    if not current_platform.is_cpu():
        return len(schemes) < 2 and {scheme[0] for scheme in schemes} <= {4, 8}
    return {scheme[0] for scheme in schemes} <= ({4, 16} if has_stock_int4() else {16})


def _has_stock_experts(layers: list[set[tuple[Any, ...]]], grouped_routing: bool) -> bool:
    packed = {scheme for schemes in layers for scheme in schemes if scheme[0] not in (16, None)}
    if not packed:
        return True
    if any(len(schemes) > 1 for schemes in layers):
        return False
    stock = {4, 8}
    if current_platform.is_cpu():
        in_groups = all(strategy == "group" for _, _, strategy, *_ in packed)
        stock = {4} if torch.cpu._is_amx_tile_supported() and in_groups and not grouped_routing else set()
    return {bits for bits, *_ in packed} <= stock


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
