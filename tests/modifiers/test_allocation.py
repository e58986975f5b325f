"""Allocation with everything in one optimum: experts that go, limits, budgets by machine, costs kept, fallback."""

import json
import re

import pytest
import torch
from loguru import logger

import moe_collab
from integration.compress import checkpoint_size
from moe_collab import MoeCollabError
from moe_collab.allocation import CostTable
from moe_collab.calibration import log_probabilities, loose_grids, mean_kl, tuning
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.formats import TERNARY
from moe_collab.modifiers.mixed_bit_alloc import MixedBitAllocModifier
from moe_collab.plan import CompressionPlan

from .conftest import QUANTIZE, run, samples

FISHER = {"FisherGPTQModifier": {"ignore": ["lm_head"]}}
OPTIONS = {"bits": ["ternary", 2, 4], "group_size": [32, 128]}


def allocate(tmp_path, path, quantizer=FISHER, out="out", data=None, **fields):
    """(plan, checkpoint) of one run; the size on disk is always the predicted one."""
    plan = tmp_path / f"{out}.json"
    modifier = {"MixedBitAllocModifier": {**OPTIONS, "plan": str(plan), **fields}}
    run(path, modifier, quantizer, output=tmp_path / out, data=data)
    decided = CompressionPlan.load(plan)
    size = sum(file.stat().st_size for file in (tmp_path / out).glob("*.safetensors"))
    assert size == decided.predicted_bytes
    return decided, tmp_path / out


@pytest.mark.parametrize(
    ("family", "form"), [("qwen3_moe", "physical"), ("deepseek_v3", "physical"), ("deepseek_v3", "masked")]
)
def test_experts_go_where_bytes_are_short(family, form, tiny, tmp_path):
    decided, out = allocate(tmp_path, tiny(family), bpw=1.7, pruning=form)
    gone = {layer: set(indices) for layer, indices in decided.dropped.items()}
    assert gone and decided.expert_bpw <= 1.7 and decided.heldout_kl is not None
    config = json.loads((out / "config.json").read_text())
    key = "n_routed_experts" if family == "deepseek_v3" else "num_local_experts"
    if form == "physical":
        counts = {len(indices) for indices in gone.values()}
        assert len(counts) == 1 and config[key] == decided.num_experts == 8 - counts.pop()
    else:
        assert config[key] == decided.num_experts == 8
        checkpoint = Checkpoint(out)
        for layer, indices in gone.items():
            for index in indices:
                assert not [n for n in checkpoint.names() if n.startswith(f"{layer}.experts.{index}.")]
    logits = moe_collab.load(out, dtype=torch.float32)(input_ids=torch.arange(40)[None]).logits
    assert logits.isfinite().all()


def test_masking_needs_a_selection_bias(tiny):
    with pytest.raises(MoeCollabError, match="no selection bias"):
        run(tiny("qwen3_moe"), {"MixedBitAllocModifier": {**OPTIONS, "bpw": 3, "pruning": "masked"}}, FISHER)


def test_max_kl_alone_finds_the_smallest_that_keeps_it(tiny, tmp_path):
    fields = {"bits": [2, 4, 8, 16], "costs": str(tmp_path / "costs.json")}
    found, _ = allocate(tmp_path, tiny("qwen3_moe"), out="found", max_kl=0.05, **fields)
    assert found.heldout_kl <= 0.05
    # By the sum of costs nothing smaller is as good; what is measured is no sum, and is known to within a twentieth.
    below, _ = allocate(tmp_path, tiny("qwen3_moe"), out="below", budget=found.predicted_bytes - 1, **fields)
    assert below.predicted_kl > found.predicted_kl
    less, _ = allocate(tmp_path, tiny("qwen3_moe"), out="less", budget=int(0.95 * found.predicted_bytes), **fields)
    assert less.heldout_kl > 0.05


def test_a_missed_max_kl_is_an_error_and_leaves_nothing(tiny, tmp_path):
    with pytest.raises(MoeCollabError, match=r"max_kl: within the budget KL on held-out tokens is .* over the limit"):
        allocate(tmp_path, tiny("qwen3_moe"), bpw=2.2, max_kl=1e-7)
    assert list(tmp_path.iterdir()) == []


def test_fit_leaves_room_for_serving(tiny, tmp_path):
    with pytest.raises(MoeCollabError, match="leaves nothing for weights"):
        allocate(tmp_path, tiny("qwen3_moe"), fit="1GiB")
    # Keys and values of 2 heads of 32 in 2 layers, bfloat16, for 3 requests of 128 tokens.
    cache = 2 * 2 * 2 * 32 * 2 * (3 * 128)
    # Of each of these tokens 4 hidden states, 4 heads of queries and 2 each of keys and values, in bfloat16; for each
    # of 2 experts gate, up, their product and the output, in float32. Then one token's logits for each request.
    workspace = (3 * 128) * (2 * (4 * 128 + (4 + 2 + 2) * 32) + 4 * 2 * (3 * 128 + 128)) + 3 * 258 * 4
    taken = cache + workspace + (7 << 28)
    decided, out = allocate(tmp_path, tiny("qwen3_moe"), fit=taken + 600_000, context=128, concurrency=3)
    assert decided.budget_bytes == 600_000
    assert 590_000 < checkpoint_size(out) <= 600_000


def test_costs_are_kept_and_belong_to_their_model(tiny, tmp_path):
    costs = tmp_path / "costs.json"
    first, one = allocate(tmp_path, tiny("qwen3_moe"), out="one", bpw=3, costs=str(costs))
    written = costs.read_bytes()
    again, two = allocate(tmp_path, tiny("qwen3_moe"), out="two", bpw=3, costs=str(costs))
    assert costs.read_bytes() == written and first == again
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    with pytest.raises(MoeCollabError, match="another model or other options"):
        allocate(tmp_path, tiny("qwen3_moe", seed=1), out="three", bpw=3, costs=str(costs))
    with pytest.raises(MoeCollabError, match="another model or other options"):
        ignored = ["lm_head", r"re:.*layers\.0\.mlp\.experts.*"]
        allocate(tmp_path, tiny("qwen3_moe"), out="three", bpw=4, ignore=ignored, costs=str(costs))
    costs.write_text("{")
    with pytest.raises(MoeCollabError, match="not a valid table of costs"):
        allocate(tmp_path, tiny("qwen3_moe"), out="four", bpw=3, costs=str(costs))


def test_the_whole_model_takes_part_above_its_floors(tiny, tmp_path):
    fields = {"budget": 1_050_000, "scope": "model", "ignore": [], "floors": {"lm_head$": 8, "self_attn": 4, ".": 2}}
    decided, out = allocate(tmp_path, tiny("deepseek_v3"), bits=["ternary", 2, 4, 8], **fields)
    schemes = decided.parsed()
    assert schemes["lm_head"].num_bits >= 8
    assert all(s.num_bits >= 4 for n, s in schemes.items() if "self_attn" in n)
    assert any("shared_experts" in n and s.is_packed for n, s in schemes.items())
    assert moe_collab.load(out)(input_ids=torch.arange(40)[None]).logits.isfinite().all()


def test_falls_back_to_the_uniform_scheme_if_that_is_better(tiny, tmp_path, monkeypatch):
    stock = CostTable.cost

    def misled(self, name, scheme):  # as if rounding half of the experts cost nothing
        return 0.0 if int(name.split(".experts.")[1].split(".")[0]) % 2 else stock(self, name, scheme)

    monkeypatch.setattr(CostTable, "cost", misled)
    decided, _ = allocate(tmp_path, tiny("qwen3_moe"), bpw=4.6, bits=[2, 4, 8], group_size=32)
    assert decided.uniform_kl == decided.heldout_kl
    assert set(decided.schemes.values()) == {decided.uniform}


def test_works_before_stock_gptq_too(tiny, tmp_path):
    decided, _ = allocate(tmp_path, tiny("deepseek_v3"), QUANTIZE, bits=[2, 4, 8], bpw=3.2, pruning="masked")
    assert decided.expert_bpw <= 3.2 and decided.uniform_kl is not None


@pytest.mark.parametrize("smoothing", [[], [{"AWQModifier": {}}]], ids=["to nearest", "AWQ"])
def test_works_before_awq_and_rounding_to_nearest(smoothing, tiny, tmp_path):
    plan = tmp_path / "plan.json"
    fields = {"bits": [2, 4, 8], "bpw": 4.5, "group_size": 32, "plan": str(plan)}
    quantize = {"QuantizationModifier": {"ignore": ["lm_head"]}}
    run(tiny("qwen3_moe"), {"MixedBitAllocModifier": fields}, *smoothing, quantize, output=tmp_path / "out")
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size == CompressionPlan.load(plan).predicted_bytes
    base, found = (moe_collab.load(path, dtype=torch.float32) for path in (tiny("qwen3_moe"), tmp_path / "out"))
    with torch.no_grad():
        logp = [model(torch.arange(40)[None]).logits.log_softmax(-1) for model in (base, found)]
    assert float((logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean()) < 0.3


def test_symmetric_auto_offers_zero_points_where_they_pay():
    offered = MixedBitAllocModifier(bpw=3, bits=["ternary", 2, 4, 8, 16], group_size=64).request(None).schemes()
    assert [str(s) for s in offered] == [
        "ternary-g64",
        "int2-g64-sym",
        "int2-g64-asym",
        "int4-g64-sym",
        "int4-g64-asym",
        "int8-g64-sym",
        "dense",
    ]


def tune(tmp_path, path, steps, out, data=None):
    """(plan, checkpoint) of one run whose quantizer tunes; the costs are measured in the first one."""
    fisher = {"FisherGPTQModifier": {"ignore": ["lm_head"], "tuning_steps": steps}}
    fields = {"bpw": 1.7, "pruning": "masked", "costs": str(tmp_path / "costs.json")}
    return allocate(tmp_path, path, fisher, out=out, data=data, **fields)


def kl_of_held_out(path, out):
    """KL(model || checkpoint) on the batches that no step of tuning sees: every eighth."""
    original, found = (moe_collab.load(p, dtype=torch.float32) for p in (path, out))
    batches = list(samples(64))[7::8]
    return mean_kl(found, batches, [log_probabilities(original, batch) for batch in batches])


def test_tuning_lowers_kl_on_held_out_tokens(tiny, tmp_path):
    path, said = tiny("deepseek_v3"), []
    plain, rounded = tune(tmp_path, path, 0, "rounded", samples(64))
    handle = logger.add(said.append, level="INFO", filter="moe_collab")
    decided, tuned = tune(tmp_path, path, 10, "tuned", samples(64))
    logger.remove(handle)
    assert plain.dropped and decided == plain
    before, after = kl_of_held_out(path, rounded), kl_of_held_out(path, tuned)
    assert after < before
    logged = re.search(r"brought KL on held-out tokens from ([\d.]+) to ([\d.]+)", "".join(said))
    assert logged and [float(kl) for kl in logged.groups()] == pytest.approx([before, after], abs=2e-4)


def test_tuning_that_does_harm_is_left_out(tiny, tmp_path, monkeypatch):
    _, rounded = tune(tmp_path, tiny("deepseek_v3"), 0, "rounded")
    monkeypatch.setattr(loose_grids, "_FACTOR_RATE", 30.0)
    _, tuned = tune(tmp_path, tiny("deepseek_v3"), 3, "tuned")
    assert (tuned / "model.safetensors").read_bytes() == (rounded / "model.safetensors").read_bytes()


def test_tuned_weights_are_codes_times_scales_and_are_saved_so(tiny, tmp_path, monkeypatch):
    # What tuning finds is kept whether it helps or not.
    before_and_after = iter([1.0, 0.5])
    monkeypatch.setattr(tuning, "_kl", lambda *_: next(before_and_after))
    plan = tmp_path / "plan.json"
    fisher = {"FisherGPTQModifier": {"ignore": ["lm_head"], "tuning_steps": 3}}
    model = run(tiny("deepseek_v3"), {"MixedBitAllocModifier": {**OPTIONS, "bpw": 3, "plan": str(plan)}}, fisher)
    schemes = CompressionPlan.load(plan).parsed()
    kinds = {(scheme.num_bits, scheme.symmetric) for scheme in schemes.values()}
    assert {(TERNARY, True), (4, False)} < kinds
    weights = {}
    for name, scheme in schemes.items():
        module = model.get_submodule(name)
        weight = weights[name] = module.weight.detach().clone()
        columns = weight.shape[1] // module.weight_scale.shape[1]
        scale = module.weight_scale.float().repeat_interleave(columns, 1)
        zero = 0 if scheme.symmetric else module.weight_zero_point.float().repeat_interleave(columns, 1)
        code = (weight.float() / scale).round() + zero
        assert scheme.levels[0] <= code.min() and code.max() <= scheme.levels[1], name
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, ((code - zero) * scale).bfloat16()), name
    model.save_pretrained(tmp_path / "out")
    stored = Checkpoint(tmp_path / "out")
    for name, weight in weights.items():
        assert torch.equal(stored.quantized(name).dequantized(torch.bfloat16), weight), name
