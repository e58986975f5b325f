"""Masked pruning in a real vLLM: absent experts cost nothing and change nothing."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.served import MLA, assert_equal, generate, run_vllm

from .mixed import build_mixed
from .test_serving import NO_MLA, PARALLEL, broken

# Of two routing groups of four; expert 0 is what stock vLLM looks at.
MASKED = {1: (1, 6), 2: (0, 5, 7)}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """(checkpoint, twin); the dead experts of the twin hold noise, which would show if one were ever selected."""
    folder = tmp_path_factory.mktemp("masked")
    path, twin = build_mixed("deepseek_v3", folder / "deepseek", MASKED, num_hidden_layers=3)
    stored, tensors = load_file(path / "model.safetensors"), load_file(twin / "model.safetensors")
    absent = [f"model.layers.{i}.mlp.experts.{e}." for i, experts in MASKED.items() for e in experts]
    assert not [name for name in stored if name.startswith(tuple(absent))]
    for name, weight in tensors.items():
        if name.startswith(tuple(absent)):
            assert not weight.any()
            tensors[name] = torch.randn_like(weight)
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    return path, twin


@pytest.mark.parametrize("parallel", ["tp1", "tp2"])
def test_equals_stock_vllm_on_the_twin(masked, parallel):
    path, twin = masked
    options, variables = (MLA, {}) if parallel == "tp1" else (PARALLEL["tp2"], NO_MLA)
    assert_equal(generate(path, options, variables), generate(twin, options, variables))


def test_an_absent_expert_that_can_be_selected_is_refused(masked, tmp_path):
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    bias = load_file(masked[0] / "model.safetensors")[name]
    bias[5] = 0.1
    done = run_vllm(broken(masked[0], tmp_path / "broken", name, bias), MLA)
    assert done.returncode != 0
    assert "model.layers.2.mlp.experts.5: config.json names no scheme for it" in done.stdout + done.stderr
