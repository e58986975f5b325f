"""Biases of experts, loaded by vLLM's own layer rank by rank.

No model that vLLM 0.32 serves delivers them expert by expert (its gpt-oss knows only fused experts), so the layer is
built here without a model.
"""

import json
from dataclasses import replace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from moe_collab import MoeCollabError
from moe_collab.checkpoint.groups import write_quantization_config
from moe_collab.formats import dequantize, pack
from moe_collab.serving import experts
from moe_collab.serving.config import MoeCollabConfig

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 128, 4, 2
PREFIX = "model.layers.0.mlp.experts"
SHAPES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
PARALLEL = {"tp": (2, False), "ep": (2, True), "one": (1, False)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(quantization config, tensors by name within the layer, float32 (weight, bias) of each projection)."""
    tensors, schemes, dense = {}, {}, {}
    for expert in range(EXPERTS):
        bits = (3, 4)[expert % 2]
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group"}
        for projection, shape in SHAPES.items():
            name = f"{expert}.{projection}"
            codes = torch.randint(-(1 << bits) // 2, (1 << bits) // 2, shape, dtype=torch.int8)
            scales = ((torch.rand(shape[0], shape[1] // 32) + 0.5) / (1 << bits)).bfloat16()
            bias = torch.randn(shape[0]).bfloat16()
            tensors |= {f"{name}.weight_packed": pack(codes, bits), f"{name}.weight_scale": scales}
            tensors[f"{name}.bias"] = bias
            schemes[f"{PREFIX}.{name}"] = {"format": "pack-quantized", "weights": weights | {"group_size": 32}}
            dense[expert, projection] = dequantize(codes, scales.float(), None), bias.float()
    path = tmp_path_factory.mktemp("biases")
    (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    write_quantization_config(path, schemes, [])
    return json.loads((path / "config.json").read_text())["quantization_config"], tensors, dense


def build(quantization, ranks, rank, expert_parallel, **changes):
    """The layer of one rank, its weights not loaded yet."""
    tp, ep = (1, ranks) if expert_parallel else (ranks, 1)
    parallel = FusedMoEParallelConfig(
        tp_size=tp, tp_rank=rank % tp, ep_size=ep, ep_rank=rank % ep, use_ep=expert_parallel, pcp_size=1, pcp_rank=0,
        dp_size=1, dp_rank=0, sp_size=1, all2all_backend="allgather_reducescatter", enable_eplb=False,
    )  # fmt: skip
    with set_current_vllm_config(VllmConfig()):
        experts = ExpertMapManager(
            max_num_batched_tokens=64, top_k=TOP_K, global_num_experts=EXPERTS, num_redundant_experts=0,
            num_expert_group=None, moe_parallel_config=parallel, placement_strategy="linear", enable_eplb=False,
            num_fused_shared_experts=0, rocm_aiter_enabled=False,
        )  # fmt: skip
        config = FusedMoEConfig(
            num_experts=EXPERTS, num_logical_experts=EXPERTS, num_local_experts=experts.local_num_experts,
            experts_per_token=TOP_K, hidden_dim=HIDDEN, intermediate_size=WIDTH, device="cpu",
            routing_method=RoutingMethodType.Renormalize, moe_parallel_config=parallel, in_dtype=torch.float32,
            has_bias=True, **{"activation": MoEActivation.SWIGLUOAI, **changes},
        )  # fmt: skip
        return RoutedExperts(
            PREFIX, torch.float32, config, MoeCollabConfig.from_config(quantization), expert_map_manager=experts
        )


def load(layer, tensors):
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def expected(x, weights, ids, dense):
    out = torch.zeros_like(x)
    for token, expert in ((t, k) for t in range(len(x)) for k in range(TOP_K)):
        gate, up, down = (dense[int(ids[token, expert]), p] for p in SHAPES)
        g = torch.nn.functional.linear(x[token], *gate).clamp(max=7)
        u = torch.nn.functional.linear(x[token], *up).clamp(-7, 7)
        h = g * torch.sigmoid(1.702 * g) * (u + 1)
        out[token] += weights[token, expert] * torch.nn.functional.linear(h, *down)
    return out


@pytest.mark.parametrize("parallel", PARALLEL)
def test_the_ranks_add_up(checkpoint, parallel):
    quantization, tensors, dense = checkpoint
    ranks, expert_parallel = PARALLEL[parallel]
    x = torch.randn(6, HIDDEN)
    weights, ids = torch.rand(6, TOP_K), torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(6)]).int()
    layers = [load(build(quantization, ranks, rank, expert_parallel), tensors) for rank in range(ranks)]
    found = sum(layer.quant_method.apply(layer, x, weights, ids, None, None) for layer in layers)
    wanted = expected(x, weights, ids, dense)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.SWIGLUOAI_UNINTERLEAVE])
def test_a_limit_that_no_kernel_knows_is_refused(checkpoint, activation):
    with pytest.raises(MoeCollabError, match=rf"{PREFIX}: experts with activation {activation.value}, .*\(10\.0, None"):
        build(checkpoint[0], 1, 0, False, activation=activation, swiglu_limit=10.0)


def test_what_must_be_compiled_runs_while_loading(checkpoint, monkeypatch):
    quantization, tensors, _ = checkpoint
    calls = []
    usual = experts.backend()

    def fused_experts(specs):
        op = usual.fused_experts(specs)
        return lambda x, *rest: calls.append((x.shape, x.dtype)) or op(x, *rest)

    eager = replace(usual, fused_experts=fused_experts, batches=lambda specs, top_k: [1, top_k + 1])
    monkeypatch.setattr(experts, "backend", lambda: eager)
    load(build(quantization, 2, 1, True), tensors)
    assert calls == [((1, HIDDEN), torch.float32), ((TOP_K + 1, HIDDEN), torch.float32)]


@pytest.mark.parametrize("change", ["missing", "too long"])
def test_a_broken_bias_is_named(checkpoint, change):
    quantization, tensors, _ = checkpoint
    name = "1.down_proj.bias"
    broken = {k: v for k, v in tensors.items() if k != name}
    if change == "too long":
        broken[name] = torch.zeros(HIDDEN + 1)
    layer = build(quantization, 1, 0, False)
    with pytest.raises(MoeCollabError, match=f"{PREFIX}.{name}"):
        load(layer, broken)
