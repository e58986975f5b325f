"""FisherGPTQModifier: better than GPTQ at the same scheme, ternary through the whole path, bad input."""

import pytest
import torch
from llmcompressor.utils import load_context
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import moe_collab
from integration.compress import FIXTURE, calibration, run_oneshot, tokens, uniform_recipe
from moe_collab.errors import MoeCollabError
from moe_collab.evaluation import evaluate, log_probabilities
from moe_collab.plan import CompressionPlan

from .conftest import load, run, samples

SCHEME = {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16"}
FISHER = {"FisherGPTQModifier": {"ignore": ["lm_head"]}}


def test_keeps_predictions_better_than_gptq_at_the_same_scheme(tmp_path):
    # On a quarter of these tokens it is no better: weights per block of rows need some thousand tokens per expert.
    recipe, data = uniform_recipe(3, 128), calibration()
    for name in ("GPTQModifier", "FisherGPTQModifier"):
        run_oneshot(recipe.replace("GPTQModifier", name), tmp_path / name, data=data)
    test = tokens("selection")
    base = log_probabilities(moe_collab.load(FIXTURE, dtype=torch.float32), test)
    stock, ours = (
        evaluate(moe_collab.load(tmp_path / name, dtype=torch.float32), test, base).kl
        for name in ("GPTQModifier", "FisherGPTQModifier")
    )
    assert ours < 0.9 * stock


def test_mixed_with_ternary_meets_its_budget_to_the_byte(tiny, tmp_path):
    plan = tmp_path / "plan.json"
    allocate = {"bpw": 2.2, "bits": ["ternary", 2, 4], "symmetric": True, "plan": str(plan)}
    allocate["fixed"] = {"o_proj$": 4}
    run(tiny("qwen3_moe"), {"MixedBitAllocModifier": allocate}, FISHER, output=tmp_path / "out")
    decided = CompressionPlan.load(plan)
    assert {scheme.num_bits for scheme in decided.parsed().values()} >= {1, 4}
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size == decided.predicted_bytes
    assert moe_collab.load(tmp_path / "out")(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        packed = [n for n in file.keys() if n.endswith("weight_packed")]  # noqa: SIM118 (no mapping)
        assert any("o_proj" in n for n in packed)
        assert {file.get_tensor(n).dtype for n in packed} == {torch.uint8, torch.int32}


def test_ternary_with_another_quantizer_is_refused_before_calibration(tiny):
    allocate = {"MixedBitAllocModifier": {"bpw": 3, "bits": ["ternary", 4]}}
    with pytest.raises(MoeCollabError, match="only FisherGPTQModifier"):
        run(tiny("qwen3_moe"), allocate, {"GPTQModifier": {"ignore": ["lm_head"]}})


def test_experts_without_tokens_are_rounded_and_not_zeroed(tiny, tmp_path):
    model = load(tiny("qwen3_moe"))
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[:4] = 0
        model.model.layers[0].mlp.gate.weight[4:] *= 10
    run(model, {"FisherGPTQModifier": SCHEME}, output=tmp_path / "out", data=samples(2, 8))
    dense = moe_collab.load(tmp_path / "out").model.layers[0].mlp.experts.down_proj
    assert all(weight.any() for weight in dense)


def test_lm_head_is_rounded_by_what_it_sees(tiny, tmp_path):
    scheme = {"config_groups": {"head": {"targets": ["re:.*lm_head$"], "weights": {"num_bits": 3, "group_size": 64}}}}
    scheme["config_groups"]["head"]["weights"] |= {"strategy": "group", "symmetric": True}
    losses = {}
    with load_context():
        base = AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe"), dtype=torch.float32)
    ids = torch.stack([row["input_ids"] for row in samples().dataset])
    with torch.no_grad():
        hidden = base.model(ids).last_hidden_state.flatten(0, 1)
    for name in ("FisherGPTQModifier", "QuantizationModifier"):
        run(tiny("qwen3_moe"), {name: scheme}, output=tmp_path / name)
        head = moe_collab.load(tmp_path / name, dtype=torch.float32).lm_head.weight
        losses[name] = float((hidden @ (head - base.lm_head.weight).T).square().mean())
    assert losses["FisherGPTQModifier"] < 0.8 * losses["QuantizationModifier"]


def test_activation_schemes_are_refused_before_calibration(tiny):
    with pytest.raises(MoeCollabError, match="Use GPTQModifier"):
        run(tiny("qwen3_moe"), {"FisherGPTQModifier": {"targets": ["re:.*experts.*_proj$"], "scheme": "W8A8"}})
