"""What ActivationSmoothModifier refuses, and that a calibration that fails changes nothing."""

import pytest
import torch
from llmcompressor.recipe import Recipe
from torch.utils.data import DataLoader
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from integration.compress import recipe
from moe_collab import MoeCollabError

from .conftest import load, run, samples
from .smoothing_models import EVERYTHING, equal, smooth, state, unreadable


def shift_norm(layer):
    layer.post_attention_layernorm = Qwen3NextRMSNorm(128)


def read_norm(block):
    block.extra = torch.nn.Linear(128, 128)


@pytest.mark.parametrize(
    ("fields", "spoil", "message"),
    [
        ({"norm_strength": 0.5}, shift_norm, "multiply by 1 \\+ weight"),
        (
            {"norm_strength": 0.5},
            lambda layer: read_norm(layer.mlp),
            r"layers\.1\.mlp\.extra is no part of a MoE block",
        ),
    ],
)
def test_what_cannot_be_smoothed_exactly_is_refused(fields, spoil, message, tiny):
    model = load(tiny("qwen3_moe"))
    spoil(model.model.layers[1])
    with pytest.raises(MoeCollabError, match=message):
        smooth(model, data=unreadable(), **fields)
    smooth(model, ignore=[r"layers\.1\."], **fields, data=samples(4))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt_oss", {"strength": 0.5}, "clamp what up_proj puts out"),
        ("qwen3_next", {"norm_strength": 0.5}, "multiply by 1 \\+ weight"),
        ("phimoe", {"num_experts_per_tok": 1}, "always activate 2 experts"),
        ("phimoe", {"num_experts_per_tok": "auto", "max_kl": 1.0}, "always activate 2 experts"),
    ],
)
def test_families_that_forbid_it_are_refused(family, fields, message, tiny):
    with pytest.raises(MoeCollabError, match=message):
        smooth(tiny(family), data=unreadable(), **fields)


def test_calibration_that_is_not_finite_changes_nothing(tiny):
    model = load(tiny("qwen3_moe"))
    model.model.layers[1].mlp.experts[3].up_proj.weight.data[0] = float("nan")
    before = state(model)
    for fields in ({"strength": 0.5}, EVERYTHING, {"num_experts_per_tok": "auto", "max_kl": 1.0}):
        with pytest.raises(MoeCollabError, match="nothing was changed"):
            smooth(model, data=samples(8), **fields)
        assert equal(state(model), before)


def test_calibration_that_is_interrupted_changes_nothing(tiny):
    model = load(tiny("qwen3_moe"))
    before = state(model)
    rows = list(samples(8).dataset)

    class Interrupted(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            if index == 6:
                raise KeyboardInterrupt
            return rows[index]

    with pytest.raises(KeyboardInterrupt):
        smooth(model, data=DataLoader(Interrupted(), batch_size=1), **EVERYTHING)
    assert equal(state(model), before)


@pytest.mark.parametrize(
    ("family", "pruning", "message"),
    [
        ("qwen3_moe", {}, "can reach only 8 experts, not 9"),
        ("deepseek_v3", {}, "can reach only 4 experts, not 9"),
        ("deepseek_v3", {"num_experts": 4}, "can reach only 2 experts, not 3"),
        ("deepseek_v3", {"num_experts": 4, "pruning": "masked"}, "can reach only 4 experts, not 5"),
    ],
)
def test_more_experts_than_can_be_reached_are_refused_before_calibration(family, pruning, message, tiny):
    before = [{"ExpertPruningModifier": pruning}] if pruning else []
    with pytest.raises(MoeCollabError, match=message):
        smooth(tiny(family), *before, num_experts_per_tok=int(message[-1]), data=unreadable())


def test_a_shared_calibration_pass_is_refused(tiny):
    before = {"ExpertPruningModifier": {"retention": 0.5}}
    with pytest.raises(MoeCollabError, match=r"shares its calibration pass with \['ExpertPruningModifier'\]"):
        run(tiny("qwen3_moe"), before, {"ActivationSmoothModifier": {}}, pipeline="sequential")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 0}, "at least 1"),
        ({"num_experts_per_tok": -2}, "at least 1"),
        ({"num_experts_per_tok": -0.5}, "between 0 and 1"),
        ({"num_experts_per_tok": "half"}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 1.0}, "between 0 and 1"),
        ({"num_experts_per_tok": "auto"}, "need each other"),
        ({"num_experts_per_tok": 1, "max_kl": 0.1}, "need each other"),
        ({"strength": 2}, "less than or equal to 1"),
        ({"norm_strength": -1}, "greater than or equal to 0"),
    ],
)
def test_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        _ = Recipe.create_instance(recipe({"ActivationSmoothModifier": fields})).modifiers
