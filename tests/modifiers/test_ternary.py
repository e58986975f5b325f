"""Experts of ternary, 2, 3, 4 and 8 bits in one layer, saved by llm-compressor and read back three ways."""

import json

import pytest
import torch
from compressed_tensors.utils import update_offload_parameter

import moe_collab
from moe_collab import MoeCollabError
from moe_collab.checkpoint.groups import NOTE_KEY, PLUGIN_NOTE
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.checkpoint.sizes import checkpoint_bytes, quantized_entries
from moe_collab.formats import TERNARY, Scheme, dequantize
from moe_collab.modifiers.glue.naming import checkpoint_entries
from moe_collab.modifiers.glue.schemes import attach_scheme, round_in_place
from moe_collab.moe_model import describe
from tests.checkpoint.directories import read_dense

from .conftest import load, run, samples

SCHEMES = [
    Scheme(TERNARY, 128),
    Scheme(TERNARY, 32),
    Scheme(TERNARY, -1),
    Scheme(2, 128),
    Scheme(2, 32, False),
    Scheme(3, 32, False),
    Scheme(4, 128, False),
    Scheme(8, -1),
]


def round_ternary(module, weight):
    """Threshold 0.7 of the mean magnitude, scale the mean of what exceeds it (ternary weight networks)."""
    groups = weight.float().reshape(len(weight), module.weight_scale.shape[1], -1)
    size = groups.abs()
    codes = groups.sign() * (size > 0.7 * size.mean(-1, keepdim=True))
    scale = ((size * codes.abs()).sum(-1) / codes.abs().sum(-1)).to(weight.dtype)
    update_offload_parameter(module, "weight_scale", scale)
    update_offload_parameter(module, "weight", dequantize(codes.reshape(weight.shape), scale))


def quantized(path, schemes):
    """A live model that went through oneshot(), expert i of every layer rounded at `schemes[i]`."""
    model = run(load(path), {"ActivationSmoothModifier": {"num_experts_per_tok": "keep"}}, data=samples(2))
    for layer in describe(model).layers:
        for _, index, _, module in layer.projections():
            attach_scheme(module, schemes[index])
            rounder = round_ternary if schemes[index].num_bits == TERNARY else round_in_place
            rounder(module, module.weight.detach().clone())
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None] * 5).logits.float()


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """(live model, its weights and logits before it was saved, the checkpoint)."""
    model = quantized(tiny("qwen3_moe"), SCHEMES)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("weight")}
    before["logits"], path = logits(model), tmp_path_factory.mktemp("ternary") / "out"
    model.save_pretrained(path)
    return model, before, path


def test_saved_as_described(saved):
    _, _, path = saved
    checkpoint = Checkpoint(path)
    name = "model.layers.1.mlp.experts.0.down_proj"
    assert checkpoint.scheme(name)["format"] == "ternary-packed"
    assert checkpoint.scheme(name)["weights"]["num_bits"] == 2
    assert checkpoint.tensor(f"{name}.weight_packed").dtype == torch.uint8
    assert checkpoint.tensor(f"{name}.weight_packed").shape == (128, 26)
    assert set(checkpoint.quantized(name).codes.unique().tolist()) == {-1, 0, 1}
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (config["format"], config[NOTE_KEY]) == ("mixed-precision", PLUGIN_NOTE)
    assert checkpoint.scheme(name.replace("experts.0", "experts.3"))["format"] == "pack-quantized"


def test_size_is_exact(saved, tiny):
    _, _, path = saved
    entries = []
    for entry in checkpoint_entries(load(tiny("qwen3_moe"))):
        parts = entry.name.split(".")
        if "experts" in parts:
            scheme = SCHEMES[int(parts[5])]
            entries += quantized_entries(entry.name.removesuffix(".weight"), entry.shape, *scheme)
        else:
            entries.append(entry)
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) == checkpoint_bytes(entries)


def test_reads_back_as_it_was(saved):
    model, before, path = saved
    reloaded, dense = load(path), read_dense(path)
    # Experts run one by one or fused: bf16 sums differ in order. The first forward pass decompresses.
    for other in (reloaded, moe_collab.load(path)):
        torch.testing.assert_close(logits(other), before["logits"], rtol=0.05, atol=0.15)
    for name, scheme in ((f"model.layers.1.mlp.experts.{i}.up_proj.weight", s) for i, s in enumerate(SCHEMES)):
        # Codes of 8 bits divide out one step off in bfloat16.
        tolerance = 0.02 if scheme.num_bits == 8 else 0
        torch.testing.assert_close(dense[name], before[name], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(reloaded.get_parameter(name), before[name], rtol=tolerance, atol=tolerance)
    again = path.with_name("again")
    model.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_all_ternary_has_one_format(tiny, tmp_path):
    model = quantized(tiny("qwen3_moe"), [Scheme(TERNARY, 64)] * 8)
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "ternary-packed"
    torch.testing.assert_close(
        logits(moe_collab.load(tmp_path / "out")), logits(load(tmp_path / "out")), rtol=0.05, atol=0.15
    )


def test_what_is_not_ternary_is_not_saved(tiny, tmp_path):
    model = quantized(tiny("qwen3_moe"), [Scheme(TERNARY, 64)] * 8)
    name = "model.layers.0.mlp.experts.3.up_proj"
    module = model.get_submodule(name)
    module.weight.data[5, 64:128] = -2 * module.weight_scale[5, 1]
    with pytest.raises(MoeCollabError, match=rf"{name}\.weight: not on the grid[\s\S]*nothing was saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
