"""From config.json's schemes to ours, and from a checkpoint's ternary bytes to a rank's."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from moe_collab import MoeCollabError
from moe_collab.formats import DENSE, PRUNED, TERNARY, Scheme, pack_ternary
from moe_collab.kernels import reference
from moe_collab.kernels.arena import Cut
from moe_collab.kernels.backends import Backend
from moe_collab.kernels.plain import PLAIN
from moe_collab.serving.weights import CheckpointArena, make_spec, stored_scheme


def described(layout: str, **weights: object) -> dict:
    return {"format": layout, "weights": QuantizationArgs(**weights), "input_activations": None}


def test_schemes():
    group = {"strategy": "group", "group_size": 64}
    assert stored_scheme("m", None) == DENSE
    assert stored_scheme("m", described("ternary-packed", num_bits=2, **group)) == Scheme(TERNARY, 64)
    assert stored_scheme("m", described("pack-quantized", num_bits=2, **group)) == Scheme(2, 64)
    assert stored_scheme("m", described("pack-quantized", num_bits=5, strategy="channel")) == Scheme(5, -1)


@pytest.mark.parametrize(
    "scheme",
    [
        described("float-quantized", num_bits=8, type="float", strategy="channel"),
        described("ternary-packed", num_bits=3, strategy="channel"),
        described("ternary-packed", num_bits=2, symmetric=False, strategy="channel"),
        described("int-quantized", num_bits=8, strategy="channel"),
    ],
)
def test_other_schemes_are_refused_by_name(scheme):
    with pytest.raises(MoeCollabError, match=r"experts\.3\.up_proj: .* is not served beside packed"):
        stored_scheme("experts.3.up_proj", scheme)


def test_a_group_that_straddles_ranks_is_cut(monkeypatch):
    plain = Backend("reference", PLAIN, lambda specs: reference.fused_experts, lambda specs: reference.linear)
    monkeypatch.setattr("moe_collab.serving.weights.backend", lambda: plain)
    codes = torch.randint(-1, 2, (8, 192)).to(torch.int8)
    scale, scheme = torch.rand(8, 1), Scheme(TERNARY, -1)
    for rank in (0, 1, 2):
        arena = CheckpointArena([make_spec("m", scheme, (8, 64), 192)], ["m"], [scheme])
        cut = Cut((8, 192), column=64 * rank)
        arena.place(0, "weight_packed", pack_ternary(codes, 192), cut)
        arena.place(0, "weight_scale", scale, cut)
        weight = reference.dequantize_weight(arena.codes, arena.scales, arena.zero_points, arena.table[0].tolist())
        assert torch.equal(weight, (codes * scale)[:, 64 * rank : 64 * (rank + 1)])


@pytest.mark.parametrize("kind", ["weight", "weight_packed"])
def test_a_tensor_of_an_absent_expert_is_refused(kind):
    arena = CheckpointArena([make_spec("m", PRUNED, (8, 64), 64)], ["m"], [PRUNED])
    with pytest.raises(MoeCollabError, match=rf"m\.{kind}: contradicts config\.json, .* as pruned"):
        arena.place(0, kind, torch.zeros(8, 64, dtype=torch.bfloat16), Cut((8, 64)))
