"""Masked pruning of a live model: saved without its dead experts, and never selecting one."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor.modeling.moe.context import moe_calibration_context
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import moe_collab
from integration.tiny_models import tiny_config
from moe_collab import MoeCollabError
from moe_collab.architectures import MASKED_BIAS, Family
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.moe_model import MoELayer, MoEModel, describe
from moe_collab.plan import CompressionPlan
from moe_collab.pruning import check_mask
from moe_collab.pruning.surgery import mask_experts

from .conftest import QUANTIZE, load, run

# Two routing groups of four experts, two activated; layer 0 is dense.
DROPPED = {0: [1, 6], 1: [0, 5, 7]}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None] * 5).logits.float()


def masked(path):
    model = load(path)
    for index, layer in enumerate(describe(model).layers):
        mask_experts(layer, DROPPED[index])
    return model


@pytest.fixture(scope="module")
def deepseek(tiny):
    return tiny("deepseek_v3", num_hidden_layers=3)


def test_dropping_the_tensors_changes_nothing(deepseek):
    model = load(deepseek)
    for index, layer in enumerate(describe(model).layers):
        layer.router.e_score_correction_bias[DROPPED[index]] = MASKED_BIAS
    expected, dropped = logits(model), masked(deepseek)
    assert torch.equal(logits(dropped), expected)
    with moe_calibration_context():
        assert torch.equal(logits(dropped), expected)
    layer = describe(dropped).layers[1]
    assert layer.live_experts == [1, 2, 3, 4, 6]
    assert (layer.num_experts, len(list(layer.projections()))) == (8, 15)


def test_whole_path(deepseek, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    model = run(
        masked(deepseek),
        {"ActivationSmoothModifier": {"strength": 0.5}},
        {"MixedBitAllocModifier": {"bpw": 4.0, "bits": [2, 3, 4, 8], "group_size": 32, "plan": str(plan)}},
        QUANTIZE,
        output=out,
    )
    decided = CompressionPlan.load(plan)
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) == decided.predicted_bytes
    assert json.loads((out / "config.json").read_text())["n_routed_experts"] == 8
    names = " ".join(Checkpoint(out).names())
    for index, dropped in DROPPED.items():
        for expert in range(8):
            assert (f"layers.{index + 1}.mlp.experts.{expert}." in names) == (expert not in dropped)
    # The live model runs its experts one by one, the reloaded one fused: bf16 sums differ in order.
    torch.testing.assert_close(logits(moe_collab.load(out)), logits(model), rtol=0.05, atol=0.15)


def test_a_mask_the_router_cannot_live_with_is_not_saved(deepseek, tmp_path):
    model = run(load(deepseek), {"ActivationSmoothModifier": {"num_experts_per_tok": "keep"}})
    mask_experts(describe(model).layers[1], [0, 1, 2])
    with pytest.raises(MoeCollabError, match=r"layers\.2\.mlp: routing group 0 would keep 1 expert"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input(tiny, deepseek):
    with pytest.raises(MoeCollabError, match="no selection bias"):
        mask_experts(describe(load(tiny("qwen3_moe"))).layers[0], [0])
    with pytest.raises(MoeCollabError, match="expert 8 is none of its 8"):
        mask_experts(describe(load(deepseek)).layers[0], [8])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)]), st.integers(1, 6), st.sets(st.integers(0, 15)),
    st.integers(0, 100), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_no_dead_expert_is_ever_selected(groups, top_k, dropped, seed, dtype):
    config = tiny_config(
        "deepseek_v3", n_routed_experts=16, n_group=groups[0], topk_group=groups[1], num_experts_per_tok=top_k
    )
    torch.manual_seed(seed)
    router = DeepseekV3TopkRouter(config)
    router.weight.data.normal_()
    router.e_score_correction_bias.normal_(0, 0.3)
    router.e_score_correction_bias = router.e_score_correction_bias.to(dtype)
    block = torch.nn.Module()
    layer = MoELayer("layer", block, router, torch.nn.ModuleList([torch.nn.Identity() for _ in range(16)]), "experts")
    moe = MoEModel(Family(("deepseek_v3",)), (layer,), *groups, routed_scaling_factor=1.0)
    mask_experts(layer, sorted(dropped))
    with torch.no_grad():
        selected = set(router(torch.randn(256, 128))[2].flatten().tolist())
    try:
        check_mask(moe.limits, "layer", dropped)
    except MoeCollabError:
        return
    assert not selected & dropped


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ([0, 1, 2], "routing group 0 would keep 1 expert"),
        (list(range(12)), "1 routing groups would keep experts; 2 are chosen"),
        ([0, 1, 4, 5], "could reach 4 experts, but 5 are activated"),
        ([0, 1, 2, 3], None),
    ],
)
def test_masks_by_hand(dropped, message):
    router = DeepseekV3TopkRouter(tiny_config("deepseek_v3", n_routed_experts=16, num_experts_per_tok=5))
    experts = torch.nn.ModuleList([torch.nn.Identity() for _ in range(16)])
    layer = MoELayer("layer", torch.nn.Module(), router, experts, "experts")
    moe = MoEModel(Family(("deepseek_v3",)), (layer,), 4, 2, 1.0)
    if message is None:
        check_mask(moe.limits, "layer", dropped)
        return
    with pytest.raises(MoeCollabError, match=message):
        check_mask(moe.limits, "layer", dropped)
