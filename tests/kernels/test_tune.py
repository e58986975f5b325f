"""The tuner's search, and what it reads and writes; test_triton_tiles.py runs it over interpreted kernels."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from moe_collab import MoeCollabError
from moe_collab.formats import pack
from moe_collab.kernels import tune
from moe_collab.kernels.layers import Layers, layers_of
from moe_collab.kernels.triton.trial import ExpertsShape, LinearShape


@pytest.fixture
def clock(monkeypatch):
    """Calls say how long they take; a call that does not run says nothing."""

    def seconds(calls):
        return calls[0]()

    monkeypatch.setattr(tune, "seconds", seconds)


def neighbours(place):
    return [(place[0] + i, place[1] + j) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]


def test_the_search_ends_where_no_step_is_faster(clock):
    pytest.importorskip("triton")

    def calls(place):
        return [[lambda: 1.0 + (place[0] - 5) ** 2 + (place[1] + 3) ** 2], [lambda: 2.0]]

    best, before, after = tune.climb([(0, 0)], neighbours, calls)
    assert best == (5, -3) and before == pytest.approx(math.sqrt(70)) and after == pytest.approx(math.sqrt(2))


def test_the_search_goes_around_what_does_not_run(clock):
    errors = pytest.importorskip("triton").TritonError

    def calls(place):
        def call():
            if place == (1, 0) or place == (0, 0):
                raise errors("out of shared memory")
            return 1.0 + (place[0] - 2) ** 2 + place[1] ** 2

        return [[call]]

    best, before, _ = tune.climb([(0, 0)], neighbours, calls)
    assert best == (2, 0) and before == math.inf
    with pytest.raises(MoeCollabError, match="run on this device"):
        tune.climb([(0, 0)], lambda place: [], calls)


def test_an_error_of_the_device_is_no_slow_tile(clock):
    pytest.importorskip("triton")

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.climb([(0, 0)], neighbours, lambda place: [[broken]])


def test_the_layers_of_a_checkpoint(tmp_path):
    tensors, groups = {}, {}

    def add(name, bits, rows, columns, group):
        if bits == 16:
            tensors[f"{name}.weight"] = torch.zeros(rows, columns, dtype=torch.bfloat16)
            return
        tensors[f"{name}.weight_packed"] = pack(torch.zeros(rows, columns, dtype=torch.int8), bits)
        tensors[f"{name}.weight_scale"] = torch.ones(rows, columns // group).bfloat16()
        tensors[f"{name}.weight_shape"] = torch.tensor([rows, columns])
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
        groups.setdefault((bits, group), {"weights": weights, "format": "pack-quantized", "targets": []})
        groups[bits, group]["targets"].append(name)

    for layer, bits in enumerate(((4, 2, 16), (4, 2, 16), (7, 7, 7))):
        for expert in range(3):
            for (projection, rows, columns), b in zip(
                (("gate_proj", 32, 64), ("up_proj", 32, 64), ("down_proj", 64, 32)), bits, strict=True
            ):
                add(f"model.layers.{layer}.mlp.experts.{expert}.{projection}", b, rows, columns, 32)
    for name, bits, rows in (("q_proj", 3, 64), ("k_proj", 4, 16), ("v_proj", 3, 16), ("o_proj", 4, 64)):
        add(f"model.layers.0.self_attn.{name}", bits, rows, 64, 64)
    tensors["model.norm.weight"] = torch.ones(64)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"num_experts_per_tok": 2, "quantization_config": {"config_groups": dict(enumerate(groups.values()))}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = ExpertsShape(64, 32, 3, 2)
    assert sorted(layers_of(tmp_path), key=lambda layers: layers.bits) == [
        Layers((2, 4, 16), 32, {shape}),
        Layers((3, 4), 64, linears={LinearShape(96, 64)}),
        Layers((4,), 64, linears={LinearShape(64, 64)}),
        Layers((7,), 32, {shape}),
    ]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": None}))
    with pytest.raises(MoeCollabError, match="num_experts_per_tok"):
        layers_of(tmp_path)


def test_a_checkpoint_with_nothing_to_tune(tmp_path):
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MoeCollabError, match="no layer is quantized"):
        layers_of(tmp_path)


def test_without_a_gpu_the_tuner_says_so(monkeypatch, tmp_path):
    ops = pytest.importorskip("moe_collab.kernels.triton.ops", exc_type=ImportError)
    monkeypatch.setattr(ops, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MoeCollabError, match="torch finds none"):
        tune.main([str(tmp_path)])
