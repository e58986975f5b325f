"""Saving streams: memory does not grow with the model, files keep to their size, the live model stays as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moe_collab
from integration.tiny_models import build_tiny
from moe_collab import MoeCollabError
from moe_collab.checkpoint import shards
from moe_collab.checkpoint.atomic import REJECTED
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.checkpoint.verify import tensor_digest
from tests.checkpoint.directories import read_dense

from .conftest import load, run
from .test_saving import KEEP, ROUND, expert, on_disk

SCRIPT = Path(__file__).with_name("peak_of_saving.py")
MIB = 2**20


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """Models of 4 and 12 layers of 13 MB each."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 16}
    folder = tmp_path_factory.mktemp("layers")
    return [build_tiny("qwen3_moe", folder / str(n), num_hidden_layers=n, **sizes) for n in (4, 12)]


@pytest.mark.parametrize(("kind", "place"), [("prune", "disk"), ("quantize", "disk"), ("quantize", "memory")])
def test_memory_does_not_grow_with_the_number_of_layers(kind, place, layers, tmp_path):
    root = str(SCRIPT.parents[2])
    command = [sys.executable, str(SCRIPT), *map(str, layers), kind, place, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    few, many = json.loads(done.stdout.splitlines()[-1])
    assert few < 48 * MIB and many < few + 16 * MIB, (few / MIB, many / MIB)


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_live_model_is_as_it_was_and_gives_the_same_bytes_again(place, tiny, tmp_path):
    path = tiny("qwen3_moe")
    model = run(load(path) if place == "memory" else on_disk(path, tmp_path / "disk"), KEEP, ROUND)
    ids = torch.arange(8)[None]

    def looked_at():
        with torch.no_grad():
            tensors = {n: tensor_digest(getattr(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]))
                       for n in model.state_dict()}  # fmt: skip
            schemes = {n: m.quantization_scheme.model_dump() for n, m in model.named_modules() if is_quantized(m)}
            return tensors, schemes, tensor_digest(model(ids).logits)

    before = looked_at()
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        assert looked_at() == before
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def is_quantized(module):
    return getattr(module, "quantization_scheme", None) is not None


@pytest.mark.parametrize("modifiers", [[KEEP], [KEEP, ROUND]], ids=["plain", "quantized"])
def test_max_shard_size_is_kept_to(modifiers, tiny, tmp_path):
    model = run(tiny("qwen3_moe"), *modifiers)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "cut", max_shard_size="150KB")
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        held = load_file(file)
        assert sum(tensor.nbytes for tensor in held.values()) <= 150_000 or len(held) == 1
    whole, cut = (Checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert {n: tensor_digest(whole.tensor(n)) for n in whole.names()} == {
        n: tensor_digest(cut.tensor(n)) for n in cut.names()
    }
    assert files_of(tmp_path / "whole")["config.json"] == files_of(tmp_path / "cut")["config.json"]
    assert moe_collab.load(tmp_path / "cut")


def test_a_bit_that_flips_on_the_disk_is_found_and_the_model_can_be_saved_elsewhere(tiny, tmp_path, monkeypatch):
    model = run(tiny("qwen3_moe"), KEEP, ROUND)
    name, stock = f"{expert(1, 2)}.weight_scale", shards.differing_tensors

    def flip(path, digests):
        if name in digests:
            content = bytearray(path.read_bytes())
            head = int.from_bytes(content[:8], "little")
            content[8 + head + json.loads(content[8 : 8 + head])[name]["data_offsets"][0]] ^= 1
            path.write_bytes(content)
        return stock(path, digests)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "differing_tensors", flip)
        with pytest.raises(MoeCollabError, match=rf"model-.*\.safetensors: tensor {name} differs") as error:
            model.save_pretrained(tmp_path / "out", max_shard_size="150KB")
    assert str(tmp_path / "out" / REJECTED) in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [REJECTED]
    model.save_pretrained(tmp_path / "elsewhere", max_shard_size="150KB")
    assert moe_collab.load(tmp_path / "elsewhere")


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_quantized_weights_can_be_saved_unpacked(place, tiny, tmp_path):
    path = tiny("qwen3_moe")
    model = run(load(path) if place == "memory" else on_disk(path, tmp_path / "disk"), KEEP, ROUND)
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    model.save_pretrained(tmp_path / "packed")
    dense, packed = load_file(tmp_path / "dense/model.safetensors"), read_dense(tmp_path / "packed")
    assert all(torch.equal(dense[name], tensor) for name, tensor in packed.items())
    assert json.loads((tmp_path / "dense/config.json").read_text())["quantization_config"]["format"] == "dense"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"state_dict": {}}, r"state_dict=.*the tensors of the live model are saved"),
        ({"push_to_hub": True}, r"push_to_hub=.*once it is saved and verified"),
        ({"safe_serialization": False}, r"safe_serialization=.*only safetensors"),
        ({"quantization_format": "int-quantized"}, r"quantization_format=.*each module's scheme"),
        ({"max_shard": "1GB"}, r"max_shard=.*no such option"),
        ({"max_shard_size": "large"}, r"max_shard_size: 'large' is no size"),
        ({"max_shard_size": 0}, r"max_shard_size: 0 is not positive"),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused(option, message, tiny, tmp_path):
    from moe_collab.modifiers.glue.saving import install_save

    model = load(tiny("qwen3_moe"))
    install_save(model)
    with pytest.raises(MoeCollabError, match=message):
        model.save_pretrained(tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", safe_serialization=True, state_dict=None, push_to_hub=False, token=None)
    assert moe_collab.load(tmp_path / "out")


def test_another_process_than_the_main_one_writes_nothing(tiny, tmp_path):
    from moe_collab.modifiers.glue.saving import install_save

    model = load(tiny("qwen3_moe"))
    install_save(model)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
