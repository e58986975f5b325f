"""Prune, adjust, allocate, round, save, reload: every family, through real oneshot()."""

import json

import pytest
import torch
from safetensors.torch import load_file

import moe_collab
from moe_collab import MoeCollabError
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.moe_model import describe
from moe_collab.plan import CompressionPlan
from tests.checkpoint.directories import read_dense

from .conftest import QUANTIZE, load, run, samples

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
COUNT_KEY = {"qwen3_moe": "num_local_experts", "mixtral": "num_local_experts", "deepseek_v3": "n_routed_experts"}
ALLOCATE = {"bpw": 4.0, "bits": [2, 3, 4, 5, 6, 8, 16], "group_size": 32}


def size(path):
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_path(family, tiny, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    model = run(
        tiny(family),
        {"ExpertPruningModifier": {"retention": 0.75}, "ActivationSmoothModifier": {"num_experts_per_tok": 1}},
        {"MixedBitAllocModifier": {**ALLOCATE, "plan": str(plan)}},
        QUANTIZE,
        output=out,
    )
    config = json.loads((out / "config.json").read_text())
    assert (config[COUNT_KEY[family]], config["num_experts_per_tok"]) == (6, 1)
    decided = CompressionPlan.load(plan)
    assert size(out) == decided.predicted_bytes
    assert decided.expert_bpw <= 4.0 and len(set(decided.schemes.values())) > 1
    checkpoint = Checkpoint(out)
    assert not [n for n in checkpoint.names() if ".experts.6." in n]
    bits = {
        n: (checkpoint.scheme(n) or {"weights": {"num_bits": 16}})["weights"]["num_bits"] for n in experts(checkpoint)
    }
    assert sorted(bits.values()) == sorted(scheme.num_bits for scheme in decided.parsed().values())
    ids = torch.randint(0, 250, (2, 16))
    with torch.no_grad():
        reloaded, live = moe_collab.load(out)(ids).logits, model(ids).logits
    # The live model runs its experts one by one, the reloaded one fused: bf16 sums differ in order.
    torch.testing.assert_close(reloaded.float(), live.float(), rtol=0.05, atol=0.15)
    model.save_pretrained(tmp_path / "again")
    assert {k: t.tolist() for k, t in load_file(out / "model.safetensors").items()} == {
        k: t.tolist() for k, t in load_file(tmp_path / "again" / "model.safetensors").items()
    }


def experts(checkpoint):
    suffixes = (".weight_packed", ".weight")
    names = [n for n in checkpoint.names() if ".experts." in n and n.endswith(suffixes) and "shared" not in n]
    return [n.rpartition(".")[0] for n in names]


@pytest.mark.parametrize("granularity", ["projection", "layer"])
def test_byte_budget_is_met_exactly_as_predicted(granularity, tiny, tmp_path):
    budget, plan = 600_000, tmp_path / "plan.json"
    fields = {"budget": budget, "bits": [2, 3, 4, 8], "group_size": 32, "granularity": granularity, "plan": str(plan)}
    fields["fixed"] = {"q_proj$": 4, r"experts\.0\.down_proj": 8}
    run(tiny("qwen3_moe"), {"MixedBitAllocModifier": fields}, QUANTIZE, output=tmp_path / "out")
    decided = CompressionPlan.load(plan)
    assert size(tmp_path / "out") == decided.predicted_bytes <= budget
    assert decided.uniform_kl is not None  # what is fixed stands aside in the comparison
    schemes = decided.parsed()
    assert schemes["model.layers.0.self_attn.q_proj"].num_bits == 4
    assert schemes["model.layers.1.mlp.experts.0.down_proj"].num_bits == 8
    layer = [schemes[f"model.layers.0.mlp.experts.3.{p}"] for p in ("gate_proj", "up_proj", "down_proj")]
    assert layer[0] == layer[1]
    assert granularity == "projection" or layer[1] == layer[2]


def test_on_mixtral_patterns_may_use_the_names_of_the_file(tiny, tmp_path):
    plan = tmp_path / "plan.json"
    fields = {**ALLOCATE, "fixed": {r"experts\.0\.w[13]$": 8}, "ignore": [r"re:.*experts\.7\.w2$"], "plan": str(plan)}
    run(tiny("mixtral"), {"MixedBitAllocModifier": fields}, QUANTIZE, output=tmp_path / "out")
    schemes = CompressionPlan.load(plan).parsed()
    assert {schemes[f"model.layers.{i}.mlp.experts.0.up_proj"].num_bits for i in (0, 1)} == {8}
    assert not [name for name in schemes if name.endswith("experts.7.down_proj")]


def test_fixed_is_measured_and_counted_in_the_prediction(tiny, tmp_path):
    plans = []
    for name, fixed in (("free", {}), ("fixed", {"o_proj$": 2})):
        fields = {"bpw": 5.0, "bits": [4], "group_size": [32, 128], "fixed": fixed, "plan": str(tmp_path / name)}
        run(tiny("qwen3_moe"), {"MixedBitAllocModifier": fields}, QUANTIZE)
        plans.append(CompressionPlan.load(tmp_path / name))
    assert plans[1].predicted_kl > 1.05 * plans[0].predicted_kl
    variants = {str(s) for name, s in plans[1].parsed().items() if name.endswith("o_proj")}
    assert "int2-g128-sym" not in variants and all(text.startswith("int2") for text in variants)


def test_a_plan_is_reused_and_refused_for_another_model(tiny, tmp_path):
    plan = tmp_path / "plan.json"
    modifiers = ({"MixedBitAllocModifier": {**ALLOCATE, "plan": str(plan)}}, QUANTIZE)
    run(tiny("qwen3_moe"), *modifiers, output=tmp_path / "one")
    written = plan.read_text()
    run(tiny("qwen3_moe"), *modifiers, output=tmp_path / "two")
    assert plan.read_text() == written
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    with pytest.raises(MoeCollabError, match="another model"):
        run(tiny("qwen3_moe", seed=1), *modifiers)
    other = {"MixedBitAllocModifier": {**ALLOCATE, "bpw": 5.0, "plan": str(plan)}}
    with pytest.raises(MoeCollabError, match="another recipe"):
        run(tiny("qwen3_moe"), other, QUANTIZE)
    plan.write_text("{}")
    with pytest.raises(MoeCollabError, match="not a valid compression plan"):
        run(tiny("qwen3_moe"), *modifiers)


@pytest.mark.parametrize("everyone", [True, False], ids=["all experts calibrated", "routed tokens only"])
def test_no_expert_dies_that_no_token_reaches(everyone, tiny, tmp_path):
    model = load(tiny("qwen3_moe"))
    for layer in describe(model).layers:
        layer.router.forward = _never(layer.router, 5)
    run(
        model,
        {"MixedBitAllocModifier": {**ALLOCATE, "bits": [2, 3, 4]}},
        QUANTIZE,
        output=tmp_path / "out",
        moe_calibrate_all_experts=everyone,
    )
    original = load_file(tiny("qwen3_moe") / "model.safetensors")
    for name, tensor in read_dense(tmp_path / "out").items():
        if ".experts.5." in name:
            assert torch.isfinite(tensor).all()
            error = (tensor - original[name]).float().norm() / original[name].float().norm()
            assert error < 0.7, f"{name}: {error}"


def _never(router, expert):
    stock = type(router).forward

    def forward(hidden_states):
        weight = router.weight.data
        logits, weights, indices = stock(router, hidden_states)
        probabilities = torch.nn.functional.linear(hidden_states.reshape(-1, weight.shape[1]), weight).float()
        probabilities[:, expert] = -1e4
        weights, indices = probabilities.softmax(-1).topk(router.top_k, dim=-1)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), indices

    return forward


def test_pruning_keeps_the_experts_the_router_uses(tiny):
    model = load(tiny("deepseek_v3"))
    moe = describe(model)
    layer = moe.layers[0]
    counted = torch.zeros(8)

    def count(_module, _args, output):
        counted.add_(output[2].flatten().bincount(minlength=8))

    with torch.no_grad():
        handle = layer.router.register_forward_hook(count)
        for batch in samples():
            model(**batch)
        handle.remove()
    rows = layer.router.weight.detach().clone()
    bias = layer.router.e_score_correction_bias.clone()
    run(model, {"ExpertPruningModifier": {"num_experts": 4, "criterion": "frequency"}})
    # The two most selected experts of each of the two routing groups.
    kept = sorted(counted[:4].topk(2).indices.tolist() + (4 + counted[4:].topk(2).indices).tolist())
    layer = describe(model).layers[0]
    assert torch.equal(layer.router.weight, rows[kept])
    assert torch.equal(layer.router.e_score_correction_bias, bias[kept])
    assert layer.router.num_experts == 4 and len(list(layer.projections())) == 12


def test_retention_one_is_no_change(tiny, tmp_path):
    run(tiny("qwen3_moe"), {"ExpertPruningModifier": {"retention": 1.0}}, output=tmp_path / "out")
    before, after = load_file(tiny("qwen3_moe") / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
