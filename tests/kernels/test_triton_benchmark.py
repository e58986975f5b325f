"""The benchmark for GPUs, over interpreted kernels, and vLLM's kernels that it compares with."""

import json

import pytest
import torch

from moe_collab import MoeCollabError
from moe_collab.kernels import reference

from .layers import error

pytest.importorskip("triton")
from integration.benchmarks import gpu, vllm_triton
from moe_collab.kernels.triton import ops, trial

pytestmark = pytest.mark.skipif(not ops.INTERPRETED, reason="needs TRITON_INTERPRET=1")


def test_the_benchmark(monkeypatch, tmp_path):
    """As on a GPU, but for the sizes and the figures."""
    monkeypatch.setattr(gpu, "EXPERTS", {"tiny": trial.ExpertsShape(128, 64, 4, 2)})
    monkeypatch.setattr(gpu, "LINEARS", {"tiny": trial.LinearShape(64, 128)})
    for name, value in (("GROUP", 32), ("DECODE", 1), ("CHECKED", (1, 3))):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "STARTS", (vllm_triton.Tile(16, 64, 64),))
    monkeypatch.setattr(gpu, "LADDERS", vllm_triton.Tile((16, 32), (64,), (64,), (1,), (4,), (3,)))
    arguments = ["--output", str(tmp_path), "--shapes", "tiny", "--bits", "2", "4", "2,4", "--tokens", "1", "2"]
    gpu.main(arguments)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["device"] == "interpreted" and found["ceilings"]["copy_bytes_per_s"] > 0
    rows = {(row["layer"], row["tokens"], row["bits"]): row for row in found["rows"]}
    assert len(rows) == 12 and all(row["error"] < 1e-5 and row["us"] > 0 for row in found["rows"])
    assert "share_of_copy" in rows["tiny experts", 1, "2,4"] and "share_of_peak" in rows["tiny experts", 2, "2,4"]
    assert rows["tiny experts", 1, "2,4"]["vs_uniform"] > 0 and rows["tiny linear", 1, "2"]["vs_bf16"] > 0
    assert {"vs_vllm_bf16", "vs_vllm_triton_4bit"} <= set(rows["tiny experts", 1, "2"])
    exact = reference.fused_experts
    monkeypatch.setattr(reference, "fused_experts", lambda *arguments: 1.1 * exact(*arguments))
    with pytest.raises(MoeCollabError, match=r"3 parts failed:\n.*ExpertsShape.*bits, 1 tokens.*The kernels are wrong"):
        gpu.main(arguments)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["errors"]) == 3 and {row["layer"] for row in found["rows"]} == {"tiny linear"}


@pytest.mark.parametrize("bits", [4, 16])
def test_vllm_kernels_multiply_what_the_benchmark_says(bits, tmp_path):
    shape = trial.ExpertsShape(128, 64, 4, 2)
    layer = vllm_triton.VllmExperts(vllm_triton.kernels_of(vllm_triton.find_vllm(), tmp_path), shape, bits, 32)
    ids, tile = torch.tensor([[0, 3], [3, 1], [1, 0]]), vllm_triton.Tile(16, 64, 64)
    x, out = torch.randn(3, 128), torch.empty(6, 128)
    layer.product(x, out, layer.layers[0][0], vllm_triton.aligned(ids, 16, 4), 2, tile)
    weight, scales = layer.layers[0][0]
    if bits == 4:
        codes = torch.stack([weight & 15, weight >> 4], -1).flatten(2).float() - 8
        weight = codes * scales.float().repeat_interleave(32, 2)
    expected = torch.stack([weight[e] @ x[pair // 2] for pair, e in enumerate(ids.flatten().tolist())])
    assert error(out, expected) < 1e-5
