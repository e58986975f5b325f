"""The only model-specific knowledge: where routers, experts and their counts live, per model family.

Adding a family: add a `Family` to `FAMILIES`, a tiny model to the tests, and a recipe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import MoeCollabError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

__all__ = [
    "FAMILIES",
    "MASKED_BIAS",
    "PROJECTIONS",
    "Family",
    "MoELayer",
    "MoEModel",
    "describe",
    "family_of",
    "is_masked",
    "text_config",
]

MASKED_BIAS = -1e4
"""Selection bias of an expert that is gone: no score makes up for it, and it is finite in float16."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Names of an expert's three matrices once llm-compressor has linearized it."""


def is_masked(bias: torch.Tensor) -> torch.Tensor:
    """Which experts a selection bias [experts] rules out; the threshold leaves room for rounding to bfloat16."""
    return bias <= MASKED_BIAS / 2


@dataclass(frozen=True)
class Family:
    """How one family of `model_type`s names its MoE parts, in the model and in `config.json`."""

    model_types: tuple[str, ...]
    router: str = "gate"
    experts: str = "experts"
    norm: str = "post_attention_layernorm"
    """The norm beside the MoE block whose output the block, and nothing else, reads."""
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    grouped: bool = False
    """The router first chooses `topk_group` of `n_group` groups by the sum of each group's top 2 scores."""
    checkpoint_projections: tuple[str, str, str] = PROJECTIONS
    """What checkpoints call an expert's gate_proj, up_proj and down_proj."""


FAMILIES = (
    Family(("qwen2_moe", "qwen3_moe", "olmoe")),
    Family(("mixtral",), checkpoint_projections=("w1", "w3", "w2")),
    Family(
        ("deepseek_v3", "glm4_moe"),
        num_experts_keys=("n_routed_experts", "num_local_experts", "num_experts"),
        grouped=True,
    ),
)


@dataclass(frozen=True)
class MoELayer:
    """One MoE block: its qualified name, its router, and its experts container."""

    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    experts_name: str

    @property
    def num_experts(self) -> int:
        """Experts the router chooses from (rows of its weight)."""
        return int(self.router.weight.shape[0])  # type: ignore[index]

    @property
    def top_k(self) -> int:
        """Experts activated per token."""
        return int(self.router.top_k)  # type: ignore[arg-type]

    def expert(self, index: int) -> nn.Module:
        """Expert `index`, a module with `gate_proj`, `up_proj` and `down_proj` unless it is masked."""
        return self.experts[index]  # type: ignore[index]

    @property
    def live_experts(self) -> list[int]:
        """Indices of the experts that have weights: all but the masked ones."""
        return [index for index in range(self.num_experts) if hasattr(self.expert(index), PROJECTIONS[0])]

    @property
    def bias_holder(self) -> nn.Module | None:
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

    def reachable(self, num_experts: int) -> int:
        """How many of `num_experts` experts per layer one token can reach through its routing groups."""
        return num_experts // self.n_group * self.topk_group


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises `MoeCollabError` for a family we do not know."""
    model_type = text_config(config).model_type
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise MoeCollabError(
        f"config.json: model_type {model_type!r} is no MoE family moe-collab knows ({known}). "
        "Describe it with a Family in moe_collab/architectures.py."
    )


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model (multimodal configs nest it)."""
    return getattr(config, "text_config", None) or config


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
    return MoEModel(
        family=family,
        layers=layers,
        n_group=int(getattr(config, "n_group", None) or 1) if family.grouped else 1,
        topk_group=int(getattr(config, "topk_group", None) or 1) if family.grouped else 1,
        routed_scaling_factor=float(getattr(config, "routed_scaling_factor", None) or 1.0),
    )


def _layers(model: nn.Module, family: Family, ignore: tuple[str, ...]) -> Iterable[MoELayer]:
    for name, block in model.named_modules():
        router, experts = getattr(block, family.router, None), getattr(block, family.experts, None)
        # Only linearized experts (a list of modules) can be hooked and sliced one by one.
        if router is None or experts is None or not hasattr(experts, "__getitem__"):
            continue
        if not any(re.search(pattern, name) for pattern in ignore):
            yield MoELayer(name, block, router, experts, f"{name}.{family.experts}")
