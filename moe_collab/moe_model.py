"""The MoE layers of a live model: blocks, routers, experts, and what the routers choose from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .architectures import PROJECTIONS, TOP_K_ATTRIBUTES, Family, family_of, text_config
from .errors import MoeCollabError
from .routers import RouterLimits

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["MoELayer", "MoEModel", "describe"]


@dataclass(frozen=True)
class MoELayer:
    """One MoE block: its qualified name, its router, and its experts container."""

    name: str
    block: nn.Module
    router: Any
    experts: Any
    experts_name: str
    router_output: tuple[str, ...] = ("logits", "weights", "indices")

    @property
    def num_experts(self) -> int:
        """Experts the router chooses from, masked ones included."""
        # Not the rows of the router's weight: on a model that is offloaded to disk, to look at them is to read them.
        return sum(name.isdigit() for name in self.experts._modules)

    @property
    def top_k(self) -> int:
        """Experts activated per token."""
        holders = ((module, name) for module in (self.router, self.block) for name in TOP_K_ATTRIBUTES)
        found = (getattr(module, name, None) for module, name in holders)
        top_k = next((value for value in found if isinstance(value, int)), None)
        if top_k is None:
            raise MoeCollabError(
                f"{self.name}: neither its router nor the block has one of {', '.join(TOP_K_ATTRIBUTES)}, so how many "
                "experts are activated is not known."
            )
        return top_k

    def routing(self, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, indices), [tokens, top_k] each, of what a router returned that returns them."""
        weights, indices = (output[self.router_output.index(what)] for what in ("weights", "indices"))
        return weights, indices

    def expert(self, index: int) -> Any:
        """Expert `index`, a module with `gate_proj`, `up_proj` and `down_proj` unless it is masked."""
        return self.experts[index]

    @property
    def live_experts(self) -> list[int]:
        """Indices of the experts that have weights: all but the masked ones."""
        return [index for index in range(self.num_experts) if hasattr(self.expert(index), PROJECTIONS[0])]

    @property
    def bias_holder(self) -> Any:
        """The module with the selection bias `e_score_correction_bias` [experts], if the router has one."""
        holders = (self.router, self.block)
        return next((m for m in holders if getattr(m, "e_score_correction_bias", None) is not None), None)

    def projections(self) -> Iterable[tuple[str, int, str, nn.Linear]]:
        """(qualified name, expert index, projection, module) of every expert matrix in this layer; masked have none."""
        for index in self.live_experts:
            for projection in PROJECTIONS:
                name = f"{self.experts_name}.{index}.{projection}"
                yield name, index, projection, getattr(self.expert(index), projection)


@dataclass(frozen=True)
class MoEModel:
    """The MoE layers of a model and the constraints its routers share."""

    family: Family
    layers: tuple[MoELayer, ...]
    n_group: int
    topk_group: int
    routed_scaling_factor: float

    @property
    def num_experts(self) -> int:
        """Experts per layer (equal in all layers)."""
        return self.layers[0].num_experts

    @property
    def top_k(self) -> int:
        """Experts activated per token (equal in all layers)."""
        return self.layers[0].top_k

    @property
    def limits(self) -> RouterLimits:
        """What the routers choose from as the model stands now."""
        return RouterLimits(self.num_experts, self.top_k, self.n_group, self.topk_group, self.family.group_scores)


def describe(model: nn.Module, ignore: Iterable[str] = ()) -> MoEModel:
    """Find the MoE layers of a linearized model, leaving out names that match a regex of `ignore`.

    Raises `MoeCollabError` when the family is unknown or no MoE layer is left.
    """
    family = family_of(model.config)
    layers = tuple(_layers(model, family, tuple(ignore)))
    if not layers:
        raise MoeCollabError(
            f"no MoE layer found in {type(model).__name__}: no module has both `{family.router}` and linearized "
            f"`{family.experts}` (after `ignore`). Load the model with llmcompressor's load_context()."
        )
    config = text_config(model.config)
    grouped = family.grouped and getattr(config, "topk_method", None) != "greedy"
    return MoEModel(
        family=family,
        layers=layers,
        n_group=int(getattr(config, "n_group", None) or 1) if grouped else 1,
        topk_group=int(getattr(config, "topk_group", None) or 1) if grouped else 1,
        routed_scaling_factor=float(getattr(config, "routed_scaling_factor", None) or 1.0),
    )


def _layers(model: nn.Module, family: Family, ignore: tuple[str, ...]) -> Iterable[MoELayer]:
    for name, block in model.named_modules():
        router, experts = getattr(block, family.router, None), getattr(block, family.experts, None)
        # Only linearized experts (a list of modules) can be hooked and sliced one by one.
        if router is None or experts is None or not hasattr(experts, "__getitem__"):
            continue
        if not any(re.search(pattern, name) for pattern in ignore):
            yield MoELayer(name, block, router, experts, f"{name}.{family.experts}", family.router_output)
