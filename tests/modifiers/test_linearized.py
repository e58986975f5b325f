"""Models opened as published, quantized or not, in memory or left on disk, are compressed as their dense twins are."""

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.utils import load_context
from safetensors.torch import load_file, save_file

import moe_collab
from integration.compress import recipe
from integration.tiny_models import TINY_FAMILIES, build_tiny, model_class
from moe_collab import MoeCollabError
from moe_collab.checkpoint.load import write_dense_twin
from moe_collab.modifiers.glue import linearized
from moe_collab.modifiers.glue.likeness import few_of_each
from tests.checkpoint.packed import edit_config
from tests.checkpoint.published import to_awq, to_fp8, to_gptq, to_mxfp4

from .conftest import load, run, samples
from .test_distributed import run_in_two

RECIPE = (
    {"ExpertPruningModifier": {"retention": 0.75}},
    {"ActivationSmoothModifier": {"num_experts_per_tok": "scale", "strength": 0.5}},
    {"MixedBitAllocModifier": {"bpw": 3.0, "bits": [2, 3, 4], "group_size": [32]}},
    {"FisherGPTQModifier": {"ignore": ["lm_head"], "tuning_steps": 2}},
    {"RouterCalibrationModifier": {"steps": 2}},
)
SHORT = ({"MixedBitAllocModifier": {"bpw": 3.0, "bits": [2, 3, 4], "group_size": [32]}}, {"FisherGPTQModifier": {}})


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] * 5).logits


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_is_what_llm_compressor_loads(family, tiny, tmp_path):
    path, family_class = tiny(family), model_class(family)
    with load_context(family_class):
        expected = family_class.from_pretrained(path, dtype="auto")
    tensors = expected.state_dict()
    for folder in (None, tmp_path / "offload"):
        found = moe_collab.load_linearized(path, offload_folder=folder)
        own = found.state_dict()
        assert own.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert own[name].dtype == tensor.dtype and torch.equal(own[name], tensor), name
        assert torch.equal(logits(found), logits(expected))
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()


def weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "write", "modifiers"),
    [
        ("qwen3_moe", to_fp8, RECIPE),
        ("deepseek_v3", to_fp8, RECIPE),
        ("gpt_oss", to_mxfp4, SHORT),
        ("qwen3_moe", to_gptq, SHORT),
        ("mixtral", to_awq, SHORT),
    ],
)
def test_the_result_is_that_of_the_dense_twin(family, write, modifiers, tmp_path):
    source = build_tiny(family, tmp_path / "source")
    write(source)
    write_dense_twin(source, tmp_path / "twin")
    run(load(tmp_path / "twin"), *modifiers, output=tmp_path / "expected")
    for place, folder in (("memory", None), ("disk", tmp_path / "offload")):
        run(moe_collab.load_linearized(source, offload_folder=folder), *modifiers, output=tmp_path / place)
        assert weights(tmp_path / place) == weights(tmp_path / "expected")


@pytest.mark.parametrize(
    "scheme", ["W8A8", "W8A16", "W4A16_ASYM", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "MXFP8", "NVFP4A16"]
)
def test_what_llm_compressor_writes_is_what_it_makes_of_it(scheme, tiny, tmp_path):
    quantize = {"QuantizationModifier": {"targets": "Linear", "scheme": scheme, "ignore": ["lm_head", "re:.*gate$"]}}
    oneshot(model=load(tiny("qwen3_moe")), recipe=recipe(quantize), dataset=samples(), output_dir=str(tmp_path))
    if scheme == "NVFP4A16":
        with pytest.raises(MoeCollabError, match=r"experts.*format nvfp4-pack-quantized is not one we can read"):
            moe_collab.load_linearized(tmp_path)
        return
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    (group,) = quantization["config_groups"].values()
    compressor = BaseCompressor.get_value_from_registry(group["format"] or quantization["format"])
    stored, found = load_file(tmp_path / "model.safetensors"), moe_collab.load_linearized(tmp_path).state_dict()
    modules = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    assert len(modules) > 50
    for module in modules:
        own = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.startswith(f"{module}.")}
        expected = compressor.decompress(own, QuantizationScheme.model_validate(group))["weight"]
        assert torch.equal(found[f"{module}.weight"], expected), module


def test_one_process_writes_what_two_write(tmp_path):
    source = build_tiny("deepseek_v3", tmp_path / "source")
    to_fp8(source)
    run(moe_collab.load_linearized(source), *SHORT, output=tmp_path / "one")
    run_in_two(source, tmp_path / "two", *SHORT, offload_folder=tmp_path / "offload")
    assert weights(tmp_path / "two/out") == weights(tmp_path / "one")


def test_opening_writes_no_weights(tiny, tmp_path):
    model = moe_collab.load_linearized(tiny("qwen3_moe"), offload_folder=tmp_path / "offload")
    written = sum(file.stat().st_size for file in (tmp_path / "offload").rglob("*.safetensors"))
    assert written < 0.01 * sum(tensor.nbytes for tensor in model.state_dict().values())


def test_a_changed_weight_is_written_and_read_again(tiny, tmp_path):
    path = shutil.copytree(tiny("qwen3_moe"), tmp_path / "source")
    before = (path / "model.safetensors").read_bytes()
    model = moe_collab.load_linearized(path, offload_folder=tmp_path / "offload")
    linear, router = model.model.layers[0].mlp.experts[1].up_proj, model.model.layers[0].mlp.gate
    linear._parameters["weight"] = torch.ones_like(linear.weight)
    linear._parameters["weight"] = torch.full_like(linear.weight, 2.0)
    del router._parameters["weight"]
    assert (linear.weight == 2).all() and "weight" not in router._parameters
    assert (path / "model.safetensors").read_bytes() == before


def test_a_run_knows_its_weights_by_their_file(tmp_path):
    path = build_tiny("qwen3_moe", tmp_path / "source")
    model = moe_collab.load_linearized(path, offload_folder=tmp_path / "offload")
    lines = few_of_each(model)
    assert lines == few_of_each(moe_collab.load_linearized(path, offload_folder=tmp_path / "other"))
    (path / "model.safetensors").touch()
    assert len(set(lines) - set(few_of_each(model))) > 60


def test_oneshot_opens_a_folder(tmp_path):
    source = build_tiny("qwen3_moe", tmp_path / "source")
    to_fp8(source)
    moe_collab.oneshot(
        str(source), recipe=recipe(*SHORT), dataset=samples(), output_dir=str(tmp_path / "out"), work=tmp_path / "work"
    )
    run(moe_collab.load_linearized(source), *SHORT, output=tmp_path / "expected")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_what_does_not_fit_in_memory_is_refused_with_the_remedy(tiny, monkeypatch):
    monkeypatch.setattr(linearized, "available_memory", lambda: 1_000_000)
    with pytest.raises(MoeCollabError, match=r"of 1 processes take 0\.0 GB, and 0\.0 GB .*offload_folder"):
        moe_collab.load_linearized(tiny("qwen3_moe"))


@pytest.mark.parametrize("number", [7, 9])
def test_experts_too_few_or_too_many_are_refused(tmp_path, number):
    path = build_tiny("qwen3_moe", tmp_path / "source")
    edit_config(path, num_local_experts=number, num_experts=number)
    with pytest.raises(MoeCollabError, match="do not fit the model in config"):
        moe_collab.load_linearized(path)


def test_stacks_may_lie_across_as_qwen3_vl_publishes_them(tmp_path):
    path = build_tiny("qwen3_vl_moe", tmp_path / "source")
    expected = moe_collab.load_linearized(path).state_dict()
    stored = load_file(path / "model.safetensors")
    turned = {
        n: t.mT.contiguous() if n.endswith(("gate_up_proj", "experts.down_proj")) else t for n, t in stored.items()
    }
    assert sum(turned[name].shape != tensor.shape for name, tensor in stored.items()) >= 2
    save_file(turned, path / "model.safetensors", metadata={"format": "pt"})
    found = moe_collab.load_linearized(path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tied_weight_stays_one_weight_on_disk(tiny, tmp_path):
    model = moe_collab.load_linearized(tiny("qwen3_moe", tie_word_embeddings=True), offload_folder=tmp_path / "offload")
    embeddings = model.model.embed_tokens
    embeddings._parameters["weight"] = torch.ones_like(embeddings.weight)
    assert (model.lm_head.weight == 1).all()


def test_kimi_k2_is_opened_as_published(tmp_path):
    path = build_tiny("kimi_k2", tmp_path / "source")
    expected = moe_collab.load_linearized(path).state_dict()
    edit_config(path, model_type="kimi_k2")
    found = moe_collab.load_linearized(path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_run_knows_how_its_weights_are_dequantized(tmp_path):
    path, lines = build_tiny("qwen3_moe", tmp_path / "source"), []
    for layout in ("gptq", "gptq_v2"):
        if layout == "gptq":
            to_gptq(path)
        else:
            edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4, "checkpoint_format": layout})
        lines.append(few_of_each(moe_collab.load_linearized(path, offload_folder=tmp_path / "offload")))
    assert lines[0] != lines[1]
