"""Files written tensor by tensor: the bytes of the safetensors library, little in memory, verified one by one."""

import json
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger
from safetensors.torch import load_file, save_file

from moe_collab import MoeCollabError
from moe_collab.checkpoint import shards
from moe_collab.checkpoint.atomic import Rejected
from moe_collab.checkpoint.shards import write_shards
from moe_collab.checkpoint.sizes import TensorEntry, checkpoint_bytes
from moe_collab.checkpoint.verify import tensor_digest

DTYPES = {"U8": torch.uint8, "I32": torch.int32, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
SHAPES = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3))


def tensors_of(described, seed=0):
    torch.manual_seed(seed)
    return {name: torch.randint(0, 100, shape).to(DTYPES[dtype]) for name, (dtype, shape) in described.items()}


def entries_of(tensors):
    names = {dtype: name for name, dtype in DTYPES.items()}
    return [TensorEntry(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(directory, tensors, max_shard_size=10**9):
    return write_shards(directory, entries_of(tensors), lambda name: {name: tensors[name]}, max_shard_size)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("abc.é", min_size=1, max_size=6), SHAPES, min_size=1, max_size=12))
def test_the_bytes_are_those_of_the_library(tmp_path_factory, described):
    folder, tensors = tmp_path_factory.mktemp("bytes"), tensors_of(described)
    digests = write(folder, tensors)
    save_file(tensors, folder / "expected", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (folder / "expected").read_bytes()
    assert digests == {name: tensor_digest(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def twelve():
    return tensors_of({f"layers.{i}.weight": ("BF16", [5, 10 + i]) for i in range(12)})


@pytest.mark.parametrize("limit", [150, 400, 1000])
def test_no_file_exceeds_the_limit_but_for_a_tensor_that_does(limit, twelve, tmp_path):
    write(tmp_path, twelve, limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} == {*(f.name for f in files), "model.safetensors.index.json"}
    assert len(files) > 1 and all(f.name.endswith(f"-of-{len(files):05}.safetensors") for f in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in twelve.values())}
    found = {}
    for file in files:
        held = load_file(file)
        assert sum(tensor.nbytes for tensor in held.values()) <= limit or len(held) == 1
        assert all(index["weight_map"][name] == file.name for name in held)
        found |= held
    assert found.keys() == twelve.keys() and all(torch.equal(found[name], twelve[name]) for name in found)
    assert sum(file.stat().st_size for file in files) == checkpoint_bytes(entries_of(twelve), limit)


def test_what_comes_of_the_same_work_is_made_once_and_let_go(twelve, tmp_path):
    alive, made = [], []

    def make(name):
        assert all(reference() is None for reference in alive), "what was made before is still in memory"
        made.append(name)
        number = int(name.split(".")[1]) // 3 * 3
        given = {n: twelve[n].clone() for n in (f"layers.{number + i}.weight" for i in range(3))}
        alive[:] = [weakref.ref(tensor) for tensor in given.values()]
        return given

    write_shards(tmp_path, entries_of(twelve), make, 10**9)
    assert made == [f"layers.{i}.weight" for i in (0, 3, 6, 9)]


def flipping(monkeypatch, times):
    """Flip one bit of `layers.4.weight` between writing its file and reading it back, the first `times` times."""
    stock, done = shards.differing_tensors, []

    def differing(path, digests):
        if "layers.4.weight" in digests and len(done) < times:
            done.append(path)
            content = bytearray(path.read_bytes())
            head = int.from_bytes(content[:8], "little")
            start = json.loads(content[8 : 8 + head])["layers.4.weight"]["data_offsets"][0]
            content[8 + head + start] ^= 4
            path.write_bytes(content)
        return stock(path, digests)

    monkeypatch.setattr(shards, "differing_tensors", differing)
    return done


def test_a_file_that_the_disk_got_wrong_is_written_again(twelve, tmp_path, monkeypatch):
    said = []
    flipped, sink = flipping(monkeypatch, 1), logger.add(said.append, level="WARNING", format="{message}")
    write(tmp_path, twelve, 400)
    logger.remove(sink)
    assert len(flipped) == 1 and f"{flipped[0]}: tensor layers.4.weight differs from what was written" in said[0]
    assert torch.equal(load_file(flipped[0])["layers.4.weight"], twelve["layers.4.weight"])


def test_a_disk_that_gets_it_wrong_twice_is_named_before_more_is_written(twelve, tmp_path, monkeypatch):
    flipped = flipping(monkeypatch, 2)
    with pytest.raises(Rejected, match=r"model-0000\d-of-\d+\.safetensors: tensor layers\.4\.weight differs"):
        write(tmp_path, twelve, 400)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert written[-1] == flipped[-1] and not (tmp_path / "model.safetensors.index.json").exists()


def test_a_file_that_cannot_be_read_back_is_named(twelve, tmp_path, monkeypatch):
    stock = shards.differing_tensors

    def cut_off(path, digests):
        path.write_bytes(path.read_bytes()[:-1])
        return stock(path, digests)

    monkeypatch.setattr(shards, "differing_tensors", cut_off)
    with pytest.raises(Rejected, match=r"model\.safetensors: cannot be read back"):
        write(tmp_path, twelve)


def test_a_tensor_that_is_not_what_was_announced_is_refused(twelve, tmp_path):
    entries = entries_of(twelve)
    with pytest.raises(MoeCollabError, match=r"layers\.7\.weight: the model holds torch\.bfloat16 \[2, 2\]"):
        write_shards(tmp_path, entries, lambda name: {name: twelve[name][:2, :2] if "7" in name else twelve[name]}, 400)
