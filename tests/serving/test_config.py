"""Which checkpoints the plugin takes from stock vLLM."""

import re
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm import envs
from vllm.config.utils import hash_factors
from vllm.platforms.interface import DeviceCapability, PlatformEnum

import moe_collab.serving
from moe_collab.formats import DENSE, PRUNED, TERNARY, Scheme
from moe_collab.serving import needs
from moe_collab.serving.config import MoeCollabConfig, _is_stock, _serves_linear
from moe_collab.serving.experts import ExpertSchemes
from moe_collab.serving.needs import current_platform, needs_this_package


def config(*groups: tuple[list[str], int], ignore: tuple[str, ...] = (), strategy: str = "group") -> dict:
    weights = {"type": "int", "symmetric": True, "strategy": strategy, "group_size": 128}
    described = {
        f"group_{i}": {"targets": t, "format": "pack-quantized", "weights": {**weights, "num_bits": b}}
        for i, (t, b) in enumerate(groups)
    }
    return {"quant_method": "compressed-tensors", "config_groups": described, "ignore": list(ignore)}


EVERYWHERE = [r"re:.*\.experts\.\d+\..*_proj$"]
LAYER = [r"re:^model\.layers\.0\.mlp\.experts\.(0|1)\.(up_proj)$"]
OTHERS = [r"re:^model\.layers\.0\.mlp\.experts\.(2|3)\.(up_proj)$"]


@pytest.fixture(params=[True, False], ids=["amx", "no amx"])
def amx(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param)
    monkeypatch.setattr(needs, "has_stock_int4", lambda: True)
    return request.param


def test_mixed_experts_are_ours(amx):
    assert needs_this_package(config((LAYER, 4), (OTHERS, 3)))
    assert needs_this_package(config((LAYER, 4), ignore=("lm_head", *OTHERS)))


def test_uniform_four_bits_are_stock_only_with_amx(amx):
    assert current_platform.is_cpu()
    assert needs_this_package(config((EVERYWHERE, 4))) != amx
    assert needs_this_package(config((EVERYWHERE, 4)), grouped_routing=True)
    assert needs_this_package(config((EVERYWHERE, 4), strategy="channel"))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_other_uniform_bits_are_ours(amx, bits):
    assert needs_this_package(config((EVERYWHERE, bits)))


def test_linear_layers_without_a_stock_kernel_are_ours(amx):
    assert needs_this_package(config(([r"re:.*shared_experts.*"], 3), ignore=("lm_head",)))
    assert needs_this_package(config(([r"re:.*self_attn.*"], 4), (["lm_head"], 8)))


def test_four_bit_linear_layers_are_ours_where_stock_lacks_its_kernel(amx, monkeypatch):
    assert not needs_this_package(config(([r"re:.*self_attn.*"], 4)))
    monkeypatch.setattr(needs, "has_stock_int4", lambda: False)
    assert needs_this_package(config(([r"re:.*self_attn.*"], 4)))


def test_ternary_anywhere_is_ours(amx):
    for targets in (EVERYWHERE, [r"re:.*self_attn.*"]):
        quantization = config((targets, 2))
        quantization["config_groups"]["group_0"]["format"] = "ternary-packed"
        assert needs_this_package(quantization)
        quantization["config_groups"]["group_0"]["format"] = None
        assert needs_this_package(quantization | {"format": "ternary-packed"})


def test_absent_experts_are_ours(amx):
    layers = [rf"re:^model\.layers\.{i}\.mlp\.experts\.(0|1|2|3)\.(down_proj|gate_proj|up_proj)$" for i in (0, 1)]
    kept = [layers[0], layers[1].replace("1|2", "2")]
    assert needs_this_package(config((layers, 4)), num_experts=4) != amx
    assert needs_this_package(config((kept, 4)), num_experts=4)
    assert needs_this_package(config((kept, 4)))
    assert needs_this_package(config((layers, 4)), num_experts=5)
    assert needs_this_package(config((kept[1:], 4), ignore=("model.layers.1.mlp.experts.1.up_proj",)), num_experts=5)
    attention = [r"re:.*self_attn.*"]
    assert not needs_this_package(config((attention, 4), ignore=tuple(layers)), num_experts=4)
    assert needs_this_package(config((attention, 4), ignore=tuple(kept)), num_experts=4)


def test_nothing_else_is_ours(amx):
    assert not needs_this_package(config(([r"re:.*self_attn.*"], 4)))
    assert not needs_this_package(config(([r"re:.*shared_experts.*"], 4), ignore=("lm_head",)))
    assert MoeCollabConfig.override_quantization_method({"quant_method": "fp8"}, None) is None
    assert MoeCollabConfig.override_quantization_method(config((EVERYWHERE, 3)), "gptq") is None
    assert MoeCollabConfig.override_quantization_method(config((EVERYWHERE, 4)), "moe_collab") == "moe_collab"


@pytest.fixture
def gpu(monkeypatch):
    """As far as the choice of a kernel goes."""
    monkeypatch.setattr(current_platform, "_enum", PlatformEnum.CUDA)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: DeviceCapability(8, 0))


def linear(columns=4096, ranks=1):
    """A layer of 512 rows, the columns on several ranks."""
    sizes = {"input_size": columns, "input_size_per_partition": columns // ranks, "output_size": 512}
    return SimpleNamespace(**sizes, output_size_per_partition=512)


def test_on_gpus_stock_serves_what_it_has_kernels_for(gpu):
    assert not needs_this_package(config((EVERYWHERE, 4), ([r"re:.*self_attn.*"], 8)))
    assert needs_this_package(config((EVERYWHERE, 4), ([r"re:.*self_attn.*"], 3)))
    assert needs_this_package(config((EVERYWHERE, 3)))


def test_on_gpus_linear_layers_that_differ_may_be_parts_of_one(gpu):
    query, key = ([rf"re:.*self_attn\.{part}_proj$"] for part in "qk")
    assert not needs_this_package(config((query + key, 4), ignore=("lm_head", "re:.*mlp.gate$")))
    assert needs_this_package(config((query, 4), (key, 8)))
    assert needs_this_package(config((query, 4), ignore=("lm_head", *key)))


@pytest.mark.parametrize(("bits", "ours"), [((4, 4, 4), False), ((8,), False), ((4, 8, 4), True), ((3,), True)])
def test_on_gpus_linear_layers_are_ours_where_parts_differ_or_bits_are_odd(gpu, bits, ours):
    weights = {"type": "int", "strategy": "group", "group_size": 128}
    parts = [
        {"format": "pack-quantized", "weights": QuantizationArgs(num_bits=b, **weights), "input_activations": None}
        for b in bits
    ]
    assert _serves_linear(linear(), parts) == ours
    assert not _serves_linear(linear(), [None] * 3)
    if not ours:
        assert _serves_linear(linear(), [*parts, None])


@pytest.mark.parametrize(
    ("schemes", "stock"),
    [
        ([Scheme(4, 128)], True),
        ([Scheme(8, -1)], True),
        ([DENSE], True),
        ([Scheme(4, 128), Scheme(4, 32)], False),
        ([Scheme(4, 128), PRUNED], False),
        ([Scheme(4, 128, False)], False),
        ([Scheme(3, 128)], False),
        ([Scheme(TERNARY, 128)], False),
    ],
)
def test_layers_of_experts_that_are_alike_stay_with_stock_kernels(schemes, stock):
    experts = ExpertSchemes("experts", ("g", "u", "d"), [(scheme,) * 3 for scheme in schemes])
    assert _is_stock(experts, _sizes(256, 768)) == stock


@pytest.mark.parametrize(("hidden", "width", "stock"), [(256, 704, False), (192, 768, False), (256, 768, True)])
def test_no_experts_whose_groups_stock_kernels_would_have_to_cut(hidden, width, stock):
    experts = ExpertSchemes("experts", ("g", "u", "d"), [(Scheme(4, 128),) * 3])
    assert _is_stock(experts, _sizes(hidden, width)) == stock


def _sizes(hidden: int, width: int) -> SimpleNamespace:
    return SimpleNamespace(hidden_dim=hidden, intermediate_size_per_partition_unpadded=width)


@pytest.mark.parametrize(
    ("ranks", "fields", "ours"),
    [
        (1, {}, False),
        (32, {}, False),
        (64, {}, True),
        (1, {"group_size": 16}, True),
        (1, {"num_bits": 8, "symmetric": False}, True),
        (64, {"strategy": "channel", "group_size": None}, False),
    ],
)
def test_on_gpus_linear_layers_are_ours_where_no_stock_kernel_takes_them(gpu, ranks, fields, ours):
    weights = QuantizationArgs(**{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, **fields})
    part = {"format": "pack-quantized", "weights": weights, "input_activations": None}
    assert _serves_linear(linear(ranks=ranks), [part]) == ours


def test_linear_layers_are_ours_on_gpus_that_lack_a_stock_kernel(gpu, monkeypatch):
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: DeviceCapability(7, 0))
    weights = QuantizationArgs(num_bits=8, type="int", strategy="group", group_size=128)
    assert _serves_linear(linear(), [{"format": "pack-quantized", "weights": weights, "input_activations": None}])


def test_compiled_code_is_not_reused_with_another_backend(monkeypatch):
    """vLLM loads it by this key, without a look at what it holds."""
    moe_collab.serving.register()
    before = envs.compile_factors()
    assert re.fullmatch("[0-9a-f]{64}", before["MOE_COLLAB_FILES"])
    monkeypatch.setenv("MOE_COLLAB_BACKEND", "reference")
    assert hash_factors(envs.compile_factors()) != hash_factors(before)
