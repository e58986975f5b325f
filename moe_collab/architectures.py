"""The only model-specific knowledge: where routers, experts and their counts live, per model family.

Adding a family: add a `Family` to `FAMILIES`, or from outside pass one to `register_family`; a tiny model to
integration/tiny_models.py; a row to integration/families.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import MoeCollabError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FAMILIES",
    "MASKED_BIAS",
    "MTP_KEYS",
    "PROJECTIONS",
    "TOP_K_ATTRIBUTES",
    "Family",
    "StackedExperts",
    "family_of",
    "find_family",
    "is_masked",
    "logits_scaling",
    "register_family",
    "text_config",
]

MASKED_BIAS = -1e4
"""Selection bias of an expert that is gone: no score makes up for it, and it is finite in float16."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Names of an expert's three matrices once llm-compressor has linearized it."""


MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""What configs call the number of layers for multi-token prediction; transformers loads none of them."""

TOP_K_ATTRIBUTES = ("top_k", "num_experts_per_tok")
"""What routers and MoE blocks call the number of experts activated per token."""


def is_masked(bias: torch.Tensor) -> torch.Tensor:
    """Which experts a selection bias [experts] rules out; the threshold leaves room for rounding to bfloat16."""
    return bias <= MASKED_BIAS / 2


@dataclass(frozen=True)
class StackedExperts:
    """How a family's own checkpoints stack the experts of a layer, where those we write store each by itself.

    Names are relative to the MoE block; biases, if there are any, have them with `_bias` appended.
    """

    gate_up: str = "experts.gate_up_proj"
    """[experts, 2 * intermediate, hidden]"""
    down: str = "experts.down_proj"
    """[experts, hidden, intermediate]"""
    transposed: bool = False
    """Each matrix lies the other way round, [experts, columns, rows]."""
    interleaved: bool = False
    """Rows of gate and up take turns; otherwise gate's come first."""


@dataclass(frozen=True)
class Family:
    """How one family of `model_type`s names its MoE parts, in the model and in `config.json`."""

    model_types: tuple[str, ...]
    router: str = "gate"
    """The MoE block's attribute whose `weight` has a row for each expert."""
    experts: str = "experts"
    """The MoE block's attribute that llm-compressor turns into a list of experts."""
    norm: str = "post_attention_layernorm"
    """The norm beside the MoE block whose output the block, and nothing else, reads."""
    router_output: tuple[str, ...] = ("logits", "weights", "indices")
    """What the router returns, in order."""
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    fixed_top_k: bool = False
    """The router activates as many experts as it was trained to, whatever the config says."""
    linear_in_up: bool = True
    """An expert's output is proportional to that of its up_proj."""
    weighs_inputs: bool = False
    """The router's weights multiply what experts see, not what they put out."""
    grouped: bool = False
    """The router first chooses `topk_group` of `n_group` groups, unless the config's `topk_method` is `greedy`."""
    group_scores: int = 2
    """How many of its experts' best scores make a group's score; a group needs so many to be chosen as before."""
    checkpoint_projections: tuple[str, str, str] = PROJECTIONS
    """What checkpoints call an expert's gate_proj, up_proj and down_proj."""
    stacked: StackedExperts | None = None
    architecture: str | None = None
    """What vLLM calls the model's class, where it takes transformers' name for a model it does not know."""


_N_ROUTED = ("n_routed_experts", "num_local_experts", "num_experts")
_W1_W3_W2 = ("w1", "w3", "w2")

FAMILIES = [
    Family(("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe")),
    # Its own checkpoints are transposed; transformers takes both ways, and square matrices only so.
    Family(("qwen3_vl_moe", "qwen3_vl_moe_text"), stacked=StackedExperts()),
    Family(("mixtral", "minimax_m2"), checkpoint_projections=_W1_W3_W2),
    Family(
        ("phimoe",),
        router="router",
        fixed_top_k=True,
        checkpoint_projections=_W1_W3_W2,
        architecture="PhiMoEForCausalLM",
    ),
    Family(("deepseek_v2",), num_experts_keys=_N_ROUTED, grouped=True, group_scores=1),
    Family(("deepseek_v3", "glm4_moe"), num_experts_keys=_N_ROUTED, grouped=True),
    Family(
        ("granitemoe",),
        router="router",
        router_output=("indices", "weights", "logits"),
        stacked=StackedExperts("input_linear.weight", "output_linear.weight"),
    ),
    Family(
        ("gpt_oss",), router="router", linear_in_up=False, stacked=StackedExperts(transposed=True, interleaved=True)
    ),
    Family(
        ("llama4", "llama4_text"),
        router="router",
        router_output=("scores", "logits"),
        weighs_inputs=True,
        stacked=StackedExperts(transposed=True),
    ),
]


def register_family(family: Family) -> None:
    """Make `family` known in this process, ahead of what was known of its `model_type`s before."""
    FAMILIES.insert(0, family)


def find_family(model_type: str | None) -> Family | None:
    """The family of a `model_type`, None if we know none."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises `MoeCollabError` for a family we do not know."""
    text = text_config(config)
    family = find_family(config.model_type) or find_family(text.model_type)
    if family is None:
        raise MoeCollabError(_unknown(text))
    for what, keys in (("experts per layer", family.num_experts_keys), ("activated experts", family.top_k_keys)):
        if not any(isinstance(getattr(text, key, None), int) for key in keys):
            raise MoeCollabError(f"config.json: the number of {what} is under none of the keys {', '.join(keys)}.")
    return family


def _unknown(config: Any) -> str:
    known = ", ".join(dict.fromkeys(name for family in FAMILIES for name in family.model_types))
    keys = dict.fromkeys(key for family in FAMILIES for key in (*family.num_experts_keys, *family.top_k_keys))
    found = [f"{key} = {getattr(config, key)}" for key in keys if getattr(config, key, None) is not None]
    return (
        f"config.json: model_type {config.model_type!r} is no MoE family moe-collab knows ({known}). Describe it "
        f"before oneshot(): moe_collab.architectures.register_family(Family(({config.model_type!r},), router=..., "
        f"num_experts_keys=..., top_k_keys=...)). Of the usual keys {', '.join(keys)} its config has "
        f"{', '.join(found) or 'none'}."
    )


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model (multimodal configs nest it)."""
    return getattr(config, "text_config", None) or config


def logits_scaling(config: Any) -> float:
    """What a model divides the output of its lm_head by."""
    return float(getattr(text_config(config), "logits_scaling", None) or 1.0)
