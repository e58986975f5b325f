"""Quantized checkpoints of other tools: every weight is what its writer's own code makes of it, or it is refused."""

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter, FP8BlockDequantizer
from safetensors.torch import load_file, save_file

from integration.tiny_models import build_tiny
from moe_collab import MoeCollabError
from moe_collab.checkpoint.dense import dense_tensors
from moe_collab.checkpoint.load import load, write_dense_twin
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.checkpoint.twin import separate_experts
from moe_collab.formats import dequantize, unpack

from .directories import read_dense
from .packed import edit_config
from .published import to_awq, to_fp8, to_gptq, to_mxfp4

NAME = "model.layers.1.mlp.experts.3.down_proj"


@pytest.fixture
def tiny(tmp_path):
    return build_tiny("qwen3_moe", tmp_path / "tiny")


def same(path, expected):
    found = read_dense(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("size", [(128, 128), (64, 32)])
def test_fp8_is_what_transformers_makes_of_it(tiny, scale_fmt, size):
    expected = to_fp8(tiny, scale_fmt, size)
    scales = load_file(tiny / "model.safetensors")[f"{NAME}.weight_scale_inv"]
    assert scales.dtype == (torch.float8_e8m0fnu if scale_fmt else torch.float32)
    same(tiny, expected)
    assert not torch.equal(expected[f"{NAME}.weight"], torch.zeros(()))


def test_exponents_may_come_as_bytes(tiny):
    expected, tensors = to_fp8(tiny, "ue8m0"), load_file(tiny / "model.safetensors")
    bare = {n: t.view(torch.uint8) if n.endswith("_scale_inv") else t for n, t in tensors.items()}
    save_file(bare, tiny / "model.safetensors", metadata={"format": "pt"})
    same(tiny, expected)


def test_fp8_blocks_may_be_cut_short_at_the_end(tiny):
    """As in DeepSeek-V3's kv_a_proj_with_mqa; compressed-tensors' converter knows it too."""
    to_fp8(tiny)
    tensors = load_file(tiny / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"] = torch.randn(200, 300).to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale_inv"] = torch.rand(2, 3) + 0.5
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    expected = FP8BlockDequantizer(targets=[r"re:.*q_proj"]).process(
        {n: t for n, t in tensors.items() if n.startswith(name)}
    )
    assert torch.equal(read_dense(tiny)[f"{name}.weight"], expected[f"{name}.weight"])


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    path = build_tiny("gpt_oss", tmp_path / "tiny")
    expected = to_mxfp4(path)
    same(path, expected)
    checkpoint = Checkpoint(path)
    # One expert is read without the others, and is what it is in the stack.
    one = separate_experts(checkpoint, dense_tensors(checkpoint))
    stack = expected["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(one["model.layers.1.mlp.experts.5.up_proj.weight"].read(), stack[5, :, 1::2].T)
    assert torch.equal(
        one["model.layers.1.mlp.experts.5.down_proj.weight"].read(),
        expected["model.layers.1.mlp.experts.down_proj"][5].T,
    )


@pytest.mark.parametrize("layout", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_what_was_written(tiny, bits, layout, act_order):
    same(tiny, to_gptq(tiny, bits, layout, act_order))


def test_awq_is_what_compressed_tensors_makes_of_it(tiny):
    to_awq(tiny)
    converter = AutoAWQConverter(group_size=32)
    tensors, found = load_file(tiny / "model.safetensors"), read_dense(tiny)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) > 40
    for module in modules:
        own = {n: t for n, t in tensors.items() if n.startswith(f"{module}.")}
        packed = {n.removeprefix(f"{module}."): t for n, t in (converter.process(own) or own).items()}
        scales, shape = packed["weight_scale"], tuple(packed["weight_shape"].tolist())
        zeros = unpack(packed["weight_zero_point"], 4, tuple(scales.shape), packed_dim=0)
        dense = dequantize(unpack(packed["weight_packed"], 4, shape), scales, zeros)
        assert torch.equal(found[f"{module}.weight"], dense), module


@pytest.mark.parametrize("write", [to_fp8, to_gptq, to_awq])
def test_they_load_as_their_dense_twin(tiny, tmp_path, write):
    write(tiny)
    write_dense_twin(tiny, tmp_path / "twin")
    ids = torch.arange(40)[None] * 5
    with torch.no_grad():
        assert torch.equal(load(tiny)(ids).logits, load(tmp_path / "twin")(ids).logits)


def spoil(path, name, value):
    tensors = load_file(path / "model.safetensors")
    tensors.pop(name) if value is None else tensors.update({name: value})
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("write", "suffix", "value", "message"),
    [
        (to_fp8, "weight_scale_inv", None, "is stored in 8 bits, but .*weight_scale_inv is missing"),
        (to_fp8, "weight_scale_inv", torch.ones(2, 2), r"is \[2, 2\]; a weight"),
        (to_fp8, "weight_scale_inv", torch.full((1, 1), torch.nan), "holds NaN or infinity"),
        (to_fp8, "weight", torch.full((128, 128), torch.nan).to(torch.float8_e4m3fn), "holds NaN"),
        (to_fp8, "weight", None, "scales of a weight that is missing"),
        (to_gptq, "qzeros", torch.zeros(4, 3, dtype=torch.int32), "does not fit its scales"),
        (to_gptq, "qzeros", None, "qzeros is missing"),
        (to_gptq, "g_idx", torch.full((128,), 4, dtype=torch.int32), "does not name one of 4 groups"),
        (to_gptq, "scales", torch.full((4, 128), torch.inf).half(), "holds NaN or infinity"),
        (to_awq, "scales", torch.ones(3, 128).half(), "holds 128 x 128 codes, and its scales are"),
        (to_awq, "qzeros", torch.zeros(4, 3, dtype=torch.int32), "holds zero points"),
    ],
)
def test_a_broken_weight_is_named(tiny, write, suffix, value, message):
    write(tiny)
    spoil(tiny, f"{NAME}.{suffix}", value)
    with pytest.raises(MoeCollabError, match=message) as error:
        read_dense(tiny)
    assert NAME in str(error.value)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized by modelopt, which cannot be read"),
        ({"quant_method": "bitsandbytes"}, "quantized by bitsandbytes, which cannot be read"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "GPTQ in format marlin with 4 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ of version gemv"),
    ],
)
def test_what_we_do_not_know_is_refused_by_name(tiny, quantization, message):
    edit_config(tiny, quantization_config=quantization)
    with pytest.raises(MoeCollabError, match=message):
        load(tiny)


def test_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(MoeCollabError, match="GGUF files cannot be read"):
        load(tmp_path)


def test_nvfp4_is_refused_also_where_another_file_tells_of_it(tiny):
    (tiny / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(MoeCollabError, match="quantized by modelopt, which cannot be read"):
        load(tiny)
