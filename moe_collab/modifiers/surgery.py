"""Changes to a live model: remove experts, change how many are activated. Safe under disk offload."""

from __future__ import annotations

import torch
from compressed_tensors import align_module_device
from torch import nn

from ..architectures import MoELayer, MoEModel, text_config

__all__ = ["keep_experts", "set_top_k", "sync_config"]

_COUNT_ATTRIBUTES = ("num_experts", "n_experts", "n_routed_experts", "num_local_experts")
_TOP_K_ATTRIBUTES = ("top_k", "num_experts_per_tok")
_ROUTER_TENSORS = ("weight", "bias", "e_score_correction_bias")


def keep_experts(layer: MoELayer, kept: list[int]) -> None:
    """Keep the experts `kept` (ascending indices) of one layer, in place: modules, router rows, bias."""
    extras = {k: m for k, m in layer.experts._modules.items() if not k.isdigit()}
    experts = {str(new): layer.experts._modules[str(old)] for new, old in enumerate(kept)}
    layer.experts._modules.clear()
    layer.experts._modules.update(experts | extras)
    for holder in (layer.router, layer.block):
        _keep_rows(holder, kept, _ROUTER_TENSORS if holder is layer.router else ("e_score_correction_bias",))
    _set_ints((layer.block, layer.router, layer.experts), _COUNT_ATTRIBUTES, len(kept))
    if isinstance(getattr(layer.router, "out_features", None), int):
        layer.router.out_features = len(kept)


def _keep_rows(module: nn.Module, kept: list[int], names: tuple[str, ...]) -> None:
    with align_module_device(module):
        tensors = {name: getattr(module, name, None) for name in names}
        rows = {name: t.detach()[kept].contiguous() for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    for name, value in rows.items():
        is_parameter = name in module._parameters
        # Plain assignment goes through the offload cache, which then stores the new shape.
        setattr(module, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def set_top_k(moe: MoEModel, top_k: int) -> None:
    """Let every router activate `top_k` experts per token."""
    for layer in moe.layers:
        _set_ints((layer.block, layer.router, layer.experts), _TOP_K_ATTRIBUTES, top_k)


def _set_ints(modules: tuple[nn.Module, ...], names: tuple[str, ...], value: int) -> None:
    for module in modules:
        for name in names:
            if isinstance(module.__dict__.get(name), int):
                setattr(module, name, value)


def sync_config(model: nn.Module, moe: MoEModel) -> dict[str, int]:
    """Write the live expert counts into `model.config`; returns every key a saved config may call them by."""
    counts = {key: moe.num_experts for key in moe.family.num_experts_keys}
    counts |= {key: moe.top_k for key in moe.family.top_k_keys}
    config = text_config(model.config)
    for key, value in counts.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return counts
