"""A model on disk: what is decided by names, shapes and types reads no weights."""

import pytest
import torch
from compressed_tensors.offload.cache.disk import DiskCache

from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.modifiers.glue.outline import model_fingerprint, outline_of
from moe_collab.modifiers.glue.recipe import check_unquantized
from moe_collab.modifiers.glue.top_k import bytes_per_token
from moe_collab.moe_model import describe
from moe_collab.plan import CompressionPlan

from .conftest import QUANTIZE, load, on_disk, run


@pytest.fixture
def bytes_read(monkeypatch):
    """Bytes that are read from disk, one number for each weight."""
    read, stock = [], DiskCache.onload

    def onload(self, offloaded):
        value = stock(self, offloaded)
        if isinstance(value, torch.Tensor):
            read.append(value.nbytes)
        return value

    monkeypatch.setattr(DiskCache, "onload", onload)
    return read


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_names_and_shapes_are_known_without_reading(family, tiny, tmp_path, bytes_read):
    model, memory = on_disk(tiny(family), tmp_path), load(tiny(family))
    moe = describe(model)
    bytes_read.clear()
    check_unquantized(model, "Test")
    outline = outline_of(model, moe)
    # Offloading keeps selection biases in another type than loading into memory does: two bytes for each expert.
    assert bytes_per_token(model, moe, 1) == pytest.approx(bytes_per_token(memory, describe(memory), 1), abs=16)
    assert not bytes_read
    expected = outline_of(memory, describe(memory))
    assert outline.matrices == expected.matrices and outline.layers == expected.layers
    assert [(e.name, e.shape) for e in outline.entries] == [(e.name, e.shape) for e in expected.entries]
    bytes_read.clear()
    assert model_fingerprint(model) == model_fingerprint(memory)
    assert sum(bytes_read) <= sum(layer.router.weight.nbytes for layer in moe.layers)


def test_no_tensor_that_is_offloaded_later_gets_the_file_of_another(tiny, tmp_path):
    model = on_disk(tiny("deepseek_v3"), tmp_path)
    caches = [own for m in model.modules() for own in (m._parameters, m._buffers) if isinstance(own, DiskCache)]
    offloaded = [tensor for cache in caches for tensor in cache.offloaded_values.values() if tensor is not None]
    assert any(tensor.dtype == torch.float32 for tensor in offloaded)
    for tensor in offloaded:  # new files are called by the ids of tensors, which are another's once they are gone
        assert DiskCache.index[tensor]["safetensors_file"].endswith(f"_{id(tensor)}.safetensors")


def test_fixed_matrices_are_measured_there_too(tiny, tmp_path):
    allocate = {"bpw": 4.0, "bits": [2, 4], "group_size": [32, 128], "fixed": {"o_proj$": 4}}
    plans = []
    for place in ("memory", "disk"):
        plan, out = tmp_path / f"{place}.json", tmp_path / place
        model = load(tiny("qwen3_moe")) if place == "memory" else on_disk(tiny("qwen3_moe"), tmp_path / "offload")
        run(model, {"MixedBitAllocModifier": allocate | {"plan": str(plan)}}, QUANTIZE, output=out)
        plans.append(CompressionPlan.load(plan))
        assert plans[-1].predicted_bytes == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert plans[0] == plans[1]
    fixed = {str(scheme) for name, scheme in plans[1].parsed().items() if name.endswith("o_proj")}
    assert fixed and all(scheme.startswith("int4-") for scheme in fixed)
    name = "model.layers.0.self_attn.o_proj"
    stored = Checkpoint(tmp_path / "disk").scheme(name)["weights"]
    assert stored["group_size"] == plans[1].parsed()[name].group_size
