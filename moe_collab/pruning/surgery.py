"""Changes to a live model: remove experts, change how many are activated. Safe under disk offload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from compressed_tensors import align_module_device
from loguru import logger
from torch import nn

from ..architectures import MASKED_BIAS, MTP_KEYS, TOP_K_ATTRIBUTES, text_config
from ..errors import MoeCollabError
from ..moe_model import MoELayer, MoEModel

__all__ = ["MaskedExpert", "activating", "keep_experts", "mask_experts", "set_top_k", "sync_config"]

_COUNT_ATTRIBUTES = ("num_experts", "n_experts", "n_routed_experts", "num_local_experts")
_ROUTER_TENSORS = ("weight", "bias", "e_score_correction_bias")


def keep_experts(layer: MoELayer, kept: list[int]) -> None:
    """Remove all experts but `kept` (ascending indices) from one layer, in place: modules, router rows, biases."""
    extras = {k: m for k, m in layer.experts._modules.items() if not k.isdigit()}
    experts = {str(new): layer.experts._modules[str(old)] for new, old in enumerate(kept)}
    layer.experts._modules.clear()
    layer.experts._modules.update(experts | extras)
    for holder in (layer.router, layer.block):
        _keep_rows(holder, kept, _ROUTER_TENSORS if holder is layer.router else ("e_score_correction_bias",))
    _set_ints((layer.block, layer.router, layer.experts), _COUNT_ATTRIBUTES, len(kept))
    if isinstance(getattr(layer.router, "out_features", None), int):
        layer.router.out_features = len(kept)


class MaskedExpert(nn.Module):
    """Stands in the place of a masked expert; it has no tensors to save."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros [tokens, hidden]."""
        return torch.zeros_like(hidden_states)


def mask_experts(layer: MoELayer, dropped: list[int]) -> None:
    """Take the experts `dropped` of one layer out of the router's choice, in place, and drop their tensors.

    Their selection bias becomes `MASKED_BIAS`; counts, router rows and groups stay as they are, so layers may differ.
    `pruning.check_mask` tells whether the router can then still choose enough. Raises `MoeCollabError` if the router
    has no selection bias or there is no such expert.
    """
    holder = layer.bias_holder
    if holder is None:
        raise MoeCollabError(f"{layer.name}: its router has no selection bias to mask experts by. Prune physically.")
    if wrong := [index for index in dropped if not 0 <= index < layer.num_experts]:
        raise MoeCollabError(f"{layer.name}: expert {wrong[0]} is none of its {layer.num_experts}.")
    with align_module_device(holder):
        bias = holder.e_score_correction_bias.detach().clone()
    bias[dropped] = MASKED_BIAS
    _assign(holder, "e_score_correction_bias", bias)
    for index in dropped:
        layer.experts._modules[str(index)] = MaskedExpert()


def _keep_rows(module: nn.Module, kept: list[int], names: tuple[str, ...]) -> None:
    with align_module_device(module):
        tensors = {name: getattr(module, name, None) for name in names}
        rows = {name: t.detach()[kept].contiguous() for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    for name, value in rows.items():
        _assign(module, name, value)


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    # Plain assignment goes through the offload cache, which then stores the new shape.
    setattr(module, name, nn.Parameter(value, requires_grad=False) if name in module._parameters else value)


def set_top_k(moe: MoEModel, top_k: int) -> None:
    """Let every router activate `top_k` experts per token."""
    for layer in moe.layers:
        _set_ints((layer.block, layer.router, layer.experts), TOP_K_ATTRIBUTES, top_k)


@contextmanager
def activating(moe: MoEModel, top_k: int) -> Iterator[None]:
    """Let every router activate `top_k` experts per token within the block."""
    before = moe.top_k
    set_top_k(moe, top_k)
    try:
        yield
    finally:
        set_top_k(moe, before)


def _set_ints(modules: tuple[nn.Module, ...], names: tuple[str, ...], value: int) -> None:
    for module in modules:
        for name in names:
            if isinstance(module.__dict__.get(name), int):
                setattr(module, name, value)


def sync_config(model: nn.Module, moe: MoEModel) -> dict[str, int]:
    """Write the present numbers of experts and of activated experts into `model.config`.

    Returns these numbers by every key that a saved config may use for them. Layers for multi-token prediction, which
    have as many experts as before, are not in the live model; the number of them becomes 0.
    """
    counts = {key: moe.num_experts for key in moe.family.num_experts_keys}
    counts |= {key: moe.top_k for key in moe.family.top_k_keys}
    config = text_config(model.config)
    if any(getattr(config, key, None) for key in MTP_KEYS):
        logger.warning("the layers for multi-token prediction are left out of the checkpoint: no speculative decoding")
    counts |= dict.fromkeys(MTP_KEYS, 0)
    for key, value in counts.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return counts
