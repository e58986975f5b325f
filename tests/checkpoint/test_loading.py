"""Loading packed checkpoints of every family gives the dense twin's logits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from integration.tiny_models import TINY_FAMILIES, build_tiny, tiny_config
from moe_collab import MoeCollabError
from moe_collab.architectures import MASKED_BIAS, find_family
from moe_collab.checkpoint.groups import config_groups
from moe_collab.checkpoint.load import load, stock_conversions, write_dense_twin
from moe_collab.formats import dequantize, pack

# Families whose own checkpoints store experts one by one; the others are in tests/modifiers/test_families.py.
ONE_BY_ONE = [
    f for f in TINY_FAMILIES if (described := find_family(tiny_config(f).model_type)) and not described.stacked
]


def quantize_experts(path):
    """Pack the routed experts of the checkpoint in place, 3 or 4 bits; what it computes with, by tensor name."""
    file = path / "model.safetensors"
    tensors, dense, schemes = load_file(file), {}, {}
    for i, name in enumerate(sorted(n for n in tensors if ".experts." in n and n.endswith(".weight"))):
        module, bits, weight = name.removesuffix(".weight"), 3 + i % 2, tensors.pop(name)
        rows, columns = weight.shape
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), weight.shape).to(torch.int8)
        scale = (torch.rand(rows, columns // 32) / 20).bfloat16()
        tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"] = pack(codes, bits), scale
        tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        schemes[module] = {"weights": weights, "format": "pack-quantized"}
        dense[name] = dequantize(codes, scale, dtype=torch.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    groups = config_groups(schemes)
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": groups}
    (path / "config.json").write_text(json.dumps(config))
    return dense


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
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(MoeCollabError, match=r"do not fit the model in config\.json"):
        load(path)


def test_a_missing_plain_tensor_is_never_random(tmp_path):
    path = build_tiny("qwen3_moe", tmp_path / "tiny")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeCollabError, match=r"missing keys.*q_proj"):
        load(path)


def mask(path, experts):
    """Set the selection biases of the checkpoint in place."""
    tensors = load_file(path / "model.safetensors")
    for name, bias in tensors.items():
        if name.endswith("e_score_correction_bias"):
            bias[experts] = MASKED_BIAS
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def drop(path, experts):
    """Remove the experts' tensors from the checkpoint in place."""
    tensors = load_file(path / "model.safetensors")
    gone = tuple(f".experts.{expert}." for expert in experts)
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in gone)}
    assert len(kept) < len(tensors)
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def test_masked_experts_may_be_absent_and_change_nothing(tmp_path):
    path = build_tiny("deepseek_v3", tmp_path / "tiny")
    quantize_experts(path)
    mask(path, [0, 3, 7])
    expected = logits(load(path, torch.float32))
    drop(path, [0, 3, 7])
    assert torch.equal(logits(load(path, torch.float32)), expected)


@pytest.mark.parametrize(("masked", "dropped"), [([0], [0, 3]), ([], [7]), ([0, 1, 2, 3, 4, 5, 6], list(range(8)))])
def test_an_absent_expert_that_is_not_masked_is_refused(tmp_path, masked, dropped):
    path = build_tiny("deepseek_v3", tmp_path / "tiny")
    mask(path, masked)
    drop(path, dropped)
    with pytest.raises(MoeCollabError, match=rf"experts\.{dropped[-1]}\.\S+ is missing .*the router can select it"):
        load(path)


def test_half_a_masked_expert_is_refused(tmp_path):
    path = build_tiny("deepseek_v3", tmp_path / "tiny")
    mask(path, [3])
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeCollabError, match=r"experts\.3\.up_proj is missing"):
        load(path)
