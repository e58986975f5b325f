"""The same plan and the same bytes, whether a model is in memory or on disk; and what a recipe reads of it."""

import hashlib

import pytest
import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache.disk import DiskCache

from moe_collab.distributed import store
from moe_collab.modifiers.glue.schemes import is_sound
from moe_collab.moe_model import describe

from .conftest import load, on_disk, run

FISHER = {"FisherGPTQModifier": {"ignore": ["lm_head"]}}


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


def allocation(family, plan):
    masked = family == "deepseek_v3"
    fields = {"bpw": 2.2, "bits": ["ternary", 2, 4], "pruning": "masked" if masked else "physical"}
    return {"MixedBitAllocModifier": fields | {"fixed": {"o_proj$": 4}, "plan": str(plan)}}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_from_disk_gives_the_bytes_that_memory_gives(family, tiny, tmp_path):
    for where in ("memory", "disk"):
        model = load(tiny(family)) if where == "memory" else on_disk(tiny(family), tmp_path / "offload")
        run(model, allocation(family, tmp_path / f"{where}.json"), FISHER, output=tmp_path / where)
    assert (tmp_path / "memory.json").read_text() == (tmp_path / "disk.json").read_text()
    assert digests(tmp_path / "memory") == digests(tmp_path / "disk") != {}


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
def test_codes_from_disk_are_those_from_memory(scheme, tiny, tmp_path):
    for place in ("memory", "disk"):
        model = load(tiny("qwen3_moe")) if place == "memory" else on_disk(tiny("qwen3_moe"), tmp_path / "offload")
        run(
            model,
            {"FisherGPTQModifier": {"targets": ["re:.*experts.*_proj$"], "scheme": scheme}},
            output=tmp_path / place,
        )
    assert digests(tmp_path / "memory") == digests(tmp_path / "disk") != {}


def test_a_recipe_reads_the_weights_a_fixed_number_of_times(tiny, tmp_path, monkeypatch):
    read, stock = [0], DiskCache.onload

    def onload(self, offloaded):
        value = stock(self, offloaded)
        read[0] += value.nbytes if isinstance(value, torch.Tensor) else 0
        return value

    monkeypatch.setattr(DiskCache, "onload", onload)
    shares = []
    for layers in (2, 6):
        path = tiny("qwen3_moe", num_hidden_layers=layers)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        model = on_disk(path, tmp_path / f"offload{layers}")
        read[0] = 0
        run(model, {"MixedBitAllocModifier": {"bpw": 3, "bits": [2, 3, 4]}}, FISHER, output=tmp_path / f"{layers}")
        shares.append(read[0] / size)
    assert shares[1] <= 1.05 * shares[0]


def test_rounding_leaves_no_dense_copy(tiny, tmp_path):
    folder = tmp_path / "offload"
    model = on_disk(tiny("qwen3_moe"), folder)
    run(model, {"MixedBitAllocModifier": {"bpw": 3, "bits": [2, 3, 4]}}, FISHER)
    written = sum(file.stat().st_size for file in folder.iterdir() if not file.is_symlink())
    experts = [module for layer in describe(model).layers for *_, module in layer.projections()]
    with disable_onloading():
        dense = sum(2 * module.weight.numel() for module in experts)
    assert written < 0.4 * dense
    assert all(is_sound(module) and module.weight.dtype == torch.bfloat16 for module in experts)
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


def test_another_weight_can_be_written_over_a_rounded_one(tiny, tmp_path):
    for place in ("memory", "disk"):
        model = load(tiny("qwen3_moe")) if place == "memory" else on_disk(tiny("qwen3_moe"), tmp_path)
        run(model, {"FisherGPTQModifier": {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16"}})
        module = describe(model).layers[0].expert(0).up_proj
        weight = module.weight.detach().clone()
        store(module, "weight", 2 * weight.float())
        store(module, "weight_scale", 2 * module.weight_scale)
        assert torch.equal(module.weight, 2 * weight) and module.weight.dtype == torch.bfloat16
        model.save_pretrained(tmp_path / f"{place}-out")
    assert digests(tmp_path / "memory-out") == digests(tmp_path / "disk-out") != {}


def test_scales_of_a_model_on_disk_can_be_calibrated(tiny, tmp_path):
    calibrate = {"RouterCalibrationModifier": {"targets": ["router", "scales"], "steps": 8}}
    model = on_disk(tiny("qwen3_moe"), tmp_path / "offload")
    run(model, {"MixedBitAllocModifier": {"bpw": 2.8, "bits": [2, 4]}}, FISHER, calibrate, output=tmp_path / "out")
    assert digests(tmp_path / "out")


def test_linears_that_no_token_reaches_are_left_alone(tiny, tmp_path):
    model = load(tiny("qwen3_moe"))
    model.unused = torch.nn.Linear(128, 64, dtype=torch.bfloat16)
    before = model.unused.weight.detach().clone()
    run(model, {"FisherGPTQModifier": {"targets": ["re:.*experts.*_proj$", "re:.*unused$"], "scheme": "W4A16"}})
    assert torch.equal(model.unused.weight, before)
