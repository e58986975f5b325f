"""Loading packed checkpoints of every family gives the dense twin's logits."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_collab.checkpoint.load as loading
from integration.tiny_models import TINY_FAMILIES, build_tiny, model_class, tiny_config
from moe_collab import MoeCollabError
from moe_collab.architectures import MASKED_BIAS, find_family
from moe_collab.checkpoint.load import load, stock_conversions, write_dense_twin
from tests.checkpoint.packed import build_packed, drop, edit_config, mask, quantize_experts

# Families whose own checkpoints store experts one by one; the others are in tests/modifiers/test_families.py.
ONE_BY_ONE = [
    f for f in TINY_FAMILIES if (described := find_family(tiny_config(f).model_type)) and not described.stacked
]


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None] * 5).logits


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_a_packed_checkpoint_computes_as_its_twin(tmp_path, family):
    packed = build_tiny(family, tmp_path / "packed")
    twin = shutil.copytree(packed, tmp_path / "twin")
    dense = quantize_experts(packed)
    assert dense
    save_file(load_file(twin / "model.safetensors") | dense, twin / "model.safetensors", metadata={"format": "pt"})
    with stock_conversions():
        expected = logits(AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32))
    assert torch.equal(logits(load(packed, torch.float32)), expected)
    write_dense_twin(packed, tmp_path / "written", torch.float32)
    assert torch.equal(logits(load(tmp_path / "written", torch.float32)), expected)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_every_tensor_is_that_of_the_written_twin(tmp_path, family, dtype):
    """Buffers that no file holds are too, and what generates text."""
    path = build_packed(family, tmp_path / "packed")
    write_dense_twin(path, tmp_path / "twin", dtype)
    with stock_conversions():
        expected = model_class(family).from_pretrained(tmp_path / "twin", dtype=dtype or "auto").eval()
    found = load(path, dtype)
    tensors, buffers = expected.state_dict(), dict(expected.named_buffers())
    assert tensors.keys() == found.state_dict().keys() and buffers.keys() == dict(found.named_buffers()).keys()
    for name, tensor in (*found.state_dict().items(), *found.named_buffers()):
        want = tensors[name] if name in tensors else buffers[name]
        assert tensor.dtype == want.dtype and torch.equal(tensor, want), name
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert found.name_or_path == str(path) and not found.training


def test_a_twin_of_many_files_is_the_twin_of_one(tmp_path, monkeypatch):
    path = build_packed("qwen3_moe", tmp_path / "packed")
    write_dense_twin(path, tmp_path / "one")
    monkeypatch.setattr(loading, "_SHARD", 100_000)
    write_dense_twin(path, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5 and max(file.stat().st_size for file in files) < 150_000
    expected = load_file(tmp_path / "one" / "model.safetensors")
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert torch.equal(logits(load(tmp_path / "many")), logits(load(path)))


def test_tied_weights_stay_tied():
    model = load("integration/fixture/qwen3_moe", torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_files_are_not_needed_afterwards(tmp_path):
    model = load(build_packed("qwen3_moe", tmp_path / "tiny"))
    before = logits(model)
    for file in (tmp_path / "tiny").glob("*.safetensors"):
        file.write_bytes(b"")
    assert torch.equal(logits(model), before)


def test_a_config_without_a_class_is_a_causal_language_model(tmp_path):
    path = build_packed("mixtral", tmp_path / "tiny")
    expected = logits(load(path))
    edit_config(path, architectures=None)
    assert torch.equal(logits(load(path)), expected)


def test_arguments_of_from_pretrained_are_passed_on_or_refused(tmp_path):
    path = build_packed("qwen3_moe", tmp_path / "tiny")
    assert load(path, attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(MoeCollabError, match=r"attn_implementation, .* not ignore_mismatched_sizes, num_hidden_layers"):
        load(path, num_hidden_layers=1, ignore_mismatched_sizes=True)


def test_another_quantization_is_named(tmp_path):
    path = build_tiny("qwen3_moe", tmp_path / "tiny")
    edit_config(path, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    with pytest.raises(MoeCollabError, match="quantized by modelopt, which cannot be read"):
        load(path)


def test_experts_of_unlike_shapes_are_named(tmp_path):
    path = build_tiny("qwen3_moe", tmp_path / "tiny")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name][:64].contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeCollabError, match=r"layers\.1\.mlp\.experts\.\d\.up_proj\.weight is .*others of its layer"):
        load(path)


def test_a_weight_that_cannot_be_read_is_named(tmp_path):
    path = build_packed("qwen3_moe", tmp_path / "tiny")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeCollabError, match=r"layers\.1\.mlp\.experts\.3\.up_proj: weight_scale holds NaN"):
        load(path)


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_a_missing_expert_is_never_random(tmp_path, family):
    path = build_tiny(family, tmp_path / "tiny")
    quantize_experts(path)
    tensors = load_file(path / "model.safetensors")
    gone = {n.rpartition(".")[0] for n in tensors if ".experts.5." in n}
    kept = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in gone}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeCollabError, match=r"experts\.5\.\w+ is missing \(of 8 experts"):
        load(path)


def test_a_config_of_other_shapes_is_refused(tmp_path):
    path = build_tiny("qwen3_moe", tmp_path / "tiny")
    edit_config(path, vocab_size=300)
    with pytest.raises(MoeCollabError, match=r"do not fit the model in config\.json"):
        load(path)


def test_a_missing_plain_tensor_is_never_random(tmp_path):
    path = build_tiny("qwen3_moe", tmp_path / "tiny")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeCollabError, match=r"missing keys.*q_proj"):
        load(path)


def test_masked_experts_may_be_absent_and_change_nothing(tmp_path):
    path = build_tiny("deepseek_v3", tmp_path / "tiny")
    quantize_experts(path)
    mask(path, [0, 3, 7], MASKED_BIAS)
    expected = logits(load(path, torch.float32))
    drop(path, [0, 3, 7])
    assert torch.equal(logits(load(path, torch.float32)), expected)


@pytest.mark.parametrize(("masked", "dropped"), [([0], [0, 3]), ([], [7]), ([0, 1, 2, 3, 4, 5, 6], list(range(8)))])
def test_an_absent_expert_that_is_not_masked_is_refused(tmp_path, masked, dropped):
    path = build_tiny("deepseek_v3", tmp_path / "tiny")
    mask(path, masked, MASKED_BIAS)
    drop(path, dropped)
    with pytest.raises(MoeCollabError, match=rf"experts\.{dropped[-1]}\.\S+ is missing .*the router can select it"):
        load(path)


def test_half_a_masked_expert_is_refused(tmp_path):
    path = build_tiny("deepseek_v3", tmp_path / "tiny")
    mask(path, [3], MASKED_BIAS)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeCollabError, match=r"experts\.3\.up_proj is missing"):
        load(path)
