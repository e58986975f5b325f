"""The shipped recipes: valid, and with budgets that can be met on the real models' shapes."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moe_collab.allocation import CostTable, parse_bytes
from moe_collab.moe_model import describe
from moe_collab.pruning import wanted_num_experts, whole_groups

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.yaml"))
# Qwen3-30B-A3B and DeepSeek-V3 as their config.json files describe them.
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        norm_topk_prob=True,
    ),
    "deepseek_v3": DeepseekV3Config(num_nextn_predict_layers=0),
}


def modifiers(path):
    return {type(m).__name__: m for m in Recipe.create_instance(str(path)).modifiers}


@pytest.fixture
def build(monkeypatch):
    """Config -> the model without data, its experts linearized."""
    for module, name in ((modeling_qwen3_moe, "Qwen3MoeExperts"), (modeling_deepseek_v3, "DeepseekV3Experts")):
        monkeypatch.setattr(module, name, LinearExperts2D.get_linear_experts_cls(getattr(module, name)))

    def from_config(config, **changes):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **changes})).to(torch.bfloat16)

    return from_config


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_is_valid_and_feasible(path, build):
    found = modifiers(path)
    found.pop("RouterCalibrationModifier", None)
    assert list(found)[-1] in ("GPTQModifier", "FisherGPTQModifier") and "MixedBitAllocModifier" in found
    config, kept = CONFIGS[path.parent.name], {}
    if prune := found.get("ExpertPruningModifier"):
        moe = describe(build(config, num_hidden_layers=4))
        wanted = wanted_num_experts(moe.limits, prune.retention, prune.num_experts)
        kept = {moe.family.num_experts_keys[0]: whole_groups(moe.limits, wanted)}
    model, allocate = build(config, **kept), found["MixedBitAllocModifier"]
    assert all(list(match_named_modules(model, [f"re:.*{p}"])) for p in allocate.fixed)
    planner = allocate.planner(model)
    decision = planner.cheapest(CostTable(), None if allocate.pruning == "none" else {})
    if allocate.budget is not None:
        assert planner.file_bytes(decision) <= parse_bytes(allocate.budget)


def test_every_family_with_recipes_is_covered():
    assert {p.parent.name for p in RECIPES} == set(CONFIGS)
