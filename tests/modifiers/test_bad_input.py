"""Every mistake is one clear error, before calibration, and costs nothing that was there."""

import json

import pytest
import torch
from llmcompressor.recipe import Recipe

from integration.compress import recipe
from moe_collab import MoeCollabError

from .conftest import QUANTIZE, load, run, samples

ALLOCATE = {"bpw": 4.0, "group_size": 32}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("ExpertPruningModifier", {"retention": 0.5, "alhpa": 1}, "Extra inputs are not permitted"),
        ("ExpertPruningModifier", {"retention": 0}, "greater than 0"),
        ("ExpertPruningModifier", {"retention": 1.5}, "less than or equal to 1"),
        ("ExpertPruningModifier", {}, "exactly one of `retention` and `num_experts`"),
        ("ExpertPruningModifier", {"retention": 0.5, "num_experts": 4}, "exactly one of"),
        ("MixedBitAllocModifier", {"bits": [2, 4]}, "exactly one of `budget`"),
        ("MixedBitAllocModifier", {"budget": "3 parsecs"}, "3 parsecs"),
        ("MixedBitAllocModifier", {**ALLOCATE, "bits": [0, 2]}, "must be a list from"),
        ("MixedBitAllocModifier", {**ALLOCATE, "bits": []}, "must be a list from"),
        ("MixedBitAllocModifier", {**ALLOCATE, "fixed": {"(": 4}}, "is no regex"),
        ("MixedBitAllocModifier", {**ALLOCATE, "fixed": {"x": 7}}, "is not in"),
        ("MixedBitAllocModifier", {**ALLOCATE, "fixed": {"(lm_head)?": 8}}, "found in the empty string"),
        ("MixedBitAllocModifier", {**ALLOCATE, "granularity": "row"}, "granularity"),
        ("MixedBitAllocModifier", {"bpw": 4, "group_size": 0}, "group_size"),
    ],
)
def test_fields(name, fields, message):
    with pytest.raises(ValueError, match=message):
        _ = Recipe.create_instance(recipe({name: fields})).modifiers


class Untouchable:
    """Calibration data that must not be read."""

    def __iter__(self):
        raise AssertionError("the mistake should have been found before calibration")

    def __len__(self):
        return 1


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ([{"ExpertPruningModifier": {"num_experts": 1}}], "fewer than the 2 activated per token"),
        ([{"ExpertPruningModifier": {"num_experts": 9}}], "cannot keep 9 of 8"),
        ([{"ExpertPruningModifier": {"retention": 0.5, "ignore": ["."]}}], "no MoE layer found"),
        ([{"ExpertPruningModifier": {"retention": 0.5, "ignore": [r"layers\.0"]}}], "one expert count for all layers"),
        ([{"MixedBitAllocModifier": ALLOCATE}], "no quantizer comes after it"),
        ([QUANTIZE, {"MixedBitAllocModifier": ALLOCATE}], "no quantizer comes after it"),
        (
            [{"MixedBitAllocModifier": ALLOCATE}, {"GPTQModifier": {"scheme": "W4A16"}}],
            "would override the allocated bits",
        ),
        (
            [{"MixedBitAllocModifier": ALLOCATE}, {"GPTQModifier": {"ignore": ["lm_head"], "actorder": "group"}}],
            "stores weight_g_idx",
        ),
        ([{"ExpertPruningModifier": {"retention": 0.5, "ignore": ["nope"]}}], "'nope' matches no MoE layer"),
        ([{"ActivationSmoothModifier": {"strength": 0.5, "ignore": ["nope"]}}], "'nope' matches no MoE layer"),
        ([{"MixedBitAllocModifier": {**ALLOCATE, "ignore": ["re:.*nope.*"]}}, QUANTIZE], "names no module"),
        ([{"MixedBitAllocModifier": {**ALLOCATE, "fixed": {"w1$": 8}}}, QUANTIZE], "matches no Linear"),
        (
            [{"MixedBitAllocModifier": {"budget": "1MB", "scope": "model", "ignore": [], "group_size": 32}}, QUANTIZE],
            "lm_head .* may get fewer bits, but GPTQModifier would not round it",
        ),
        (
            [{"MixedBitAllocModifier": {**ALLOCATE, "fixed": {"o_proj$": 1}}}, QUANTIZE],
            "only FisherGPTQModifier rounds",
        ),
        (
            [{"ExpertPruningModifier": {"retention": 0.5}}, {"QuantizationModifier": {"scheme": "FP8_DYNAMIC"}}],
            "QuantizationModifier: .* asks for float weights and for quantized activations",
        ),
        ([{"MixedBitAllocModifier": {"budget": "300KB", "group_size": 32}}, QUANTIZE], r"too small.*at least \d"),
        ([{"MixedBitAllocModifier": {"bpw": 2.1, "group_size": 32}}, QUANTIZE], r"too small.*need at least 2\.5"),
        ([{"MixedBitAllocModifier": {**ALLOCATE, "group_size": 48}}, QUANTIZE], "48 does not divide the 128 inputs of"),
    ],
)
def test_recipe_against_model(modifiers, message, tiny):
    data = samples()
    data.__class__.__iter__, stock = Untouchable.__iter__, data.__class__.__iter__
    try:
        with pytest.raises(ValueError, match=message):
            run(tiny("qwen3_moe"), *modifiers, data=data)
    finally:
        data.__class__.__iter__ = stock


@pytest.mark.parametrize("budget", [{"budget": "300KB"}, {"bpw": 2.1}])
def test_impossible_budget_says_what_is_needed_and_keeps_the_old_checkpoint(budget, tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("a good checkpoint")
    with pytest.raises(MoeCollabError, match=r"too small.*(at least \d|need at least)"):
        prune = {"ExpertPruningModifier": {"retention": 0.75}}
        run(tiny("qwen3_moe"), prune, {"MixedBitAllocModifier": {**budget, "group_size": 32}}, QUANTIZE, output=out)
    assert (out / "model.safetensors").read_text() == "a good checkpoint"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_an_output_directory_that_cannot_be_written_is_found_before_calibration(tiny, tmp_path):
    (tmp_path / "out").write_text("a file")
    data = samples()
    data.__class__.__iter__, stock = Untouchable.__iter__, data.__class__.__iter__
    try:
        with pytest.raises(MoeCollabError, match="a file stands where the directory should go"):
            run(tiny("qwen3_moe"), {"ExpertPruningModifier": {"retention": 0.5}}, data=data, output=tmp_path / "out")
    finally:
        data.__class__.__iter__ = stock
    assert (tmp_path / "out").read_text() == "a file"


def test_shared_calibration_pass_is_refused(tiny):
    with pytest.raises(MoeCollabError, match="pipeline='independent'"):
        run(tiny("qwen3_moe"), {"MixedBitAllocModifier": ALLOCATE}, QUANTIZE, pipeline="sequential")


def test_unequal_routing_groups_are_refused(tiny):
    path = tiny("deepseek_v3", n_group=3)
    with pytest.raises(MoeCollabError, match="do not divide into n_group = 3"):
        run(path, {"ExpertPruningModifier": {"retention": 0.5}})


def test_quantized_input_is_refused(tiny):
    model = load(tiny("qwen3_moe"))
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for modifier in ({"ExpertPruningModifier": {"retention": 0.5}}, {"ActivationSmoothModifier": {}}):
        with pytest.raises(MoeCollabError, match=r"already quantized \(fp8\)"):
            run(model, modifier)


def test_unknown_family_is_refused(tiny):
    model = load(tiny("qwen3_moe"))
    model.config.model_type = "mystery_moe"
    with pytest.raises(MoeCollabError, match="'mystery_moe' is no MoE family moe-collab knows"):
        run(model, {"ExpertPruningModifier": {"retention": 0.5}})


def test_not_finite_calibration_never_prunes(tiny, tmp_path):
    model = load(tiny("qwen3_moe"))
    model.model.layers[0].mlp.gate.weight.data[3] = float("nan")
    with pytest.raises(MoeCollabError, match="NaN or infinite"):
        run(model, {"ExpertPruningModifier": {"retention": 0.5}}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_save_that_goes_wrong_is_discarded(tiny, tmp_path, monkeypatch):
    model = run(tiny("qwen3_moe"), {"MixedBitAllocModifier": {**ALLOCATE, "bits": [2, 4]}}, QUANTIZE)
    from moe_collab.modifiers.glue import saving

    def spoil(directory, schemes, plain):
        from safetensors.torch import load_file, save_file

        tensors = load_file(directory / "model.safetensors")
        name = next(n for n in tensors if n.endswith("experts.2.up_proj.weight_scale"))
        tensors[name] = tensors[name] * 2
        save_file(tensors, directory / "model.safetensors")
        stock(directory, schemes, plain)

    stock = saving.write_quantization_config
    monkeypatch.setattr(saving, "write_quantization_config", spoil)
    with pytest.raises(MoeCollabError, match=r"experts\.2\.up_proj: differs from what the quantizer produced"):
        model.save_pretrained(tmp_path / "out")
    kept = tmp_path / "out" / ".moe-collab-rejected"
    assert list((tmp_path / "out").iterdir()) == [kept] and (kept / "model.safetensors").exists()
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["format"]
    assert torch.isfinite(next(model.parameters())).all()
