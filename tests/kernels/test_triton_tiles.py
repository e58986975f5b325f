"""Which tiles the Triton kernels run with: the files they come from, the sizes of batch, the tuner."""

import json

import pytest

from moe_collab import MoeCollabError
from moe_collab.kernels.descriptors import TensorSpec

from .layers import expert_specs

pytest.importorskip("triton")
from moe_collab.kernels import triton, tune
from moe_collab.kernels.triton import configs, ops

pytestmark = pytest.mark.skipif(not ops.INTERPRETED, reason="needs TRITON_INTERPRET=1")


def test_the_most_particular_tile_is_chosen(monkeypatch, tmp_path):
    tile = {"rows": 16, "tokens": 8, "num_warps": 1, "num_stages": 2}
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"My GPU": {"2,4": {"down": [{"up_to": 4, **tile}]}, "any": {"down": [tile]}}}))
    monkeypatch.setenv(configs.VARIABLE, str(own))
    kinds = configs.kinds_of([2, 4, 0])
    for cached in (configs._files, configs._choose):
        cached.cache_clear()
    try:
        assert configs.choose(("My GPU", "cuda"), kinds, "down", 4).up_to == 4
        assert configs.choose(("My GPU", "cuda"), kinds, "down", 5).rows == 16
        assert configs.choose(("My GPU", "cuda"), configs.kinds_of([3]), "down", 1).up_to is None
        assert configs.choose(("My GPU", "cuda"), kinds, "gate_up", 1).rows == 32
        own.write_text('{"My GPU": {"any": {"down": [{"rows": 17}]}}}')
        configs._files.cache_clear()
        with pytest.raises(MoeCollabError, match=r"own\.json"):
            configs.choose(("My GPU", "cuda"), kinds, "down", 6)
    finally:
        for cached in (configs._files, configs._choose):
            cached.cache_clear()


@pytest.mark.parametrize("top_k", [1, 3, 8, 200])
def test_a_few_batches_run_all_that_is_compiled(monkeypatch, top_k):
    monkeypatch.setattr(ops, "device_names", lambda: ("sm_80", "cuda"))
    kinds = configs.kinds_of([6])

    def compiled(tokens):
        tiles = (configs.choose(ops.device_names(), kinds, kernel, tokens) for kernel in ("gate_up", "down"))
        return *(tile.model_dump_json(exclude={"up_to"}) for tile in tiles), tokens * top_k > ops.SORT_ABOVE

    batches = triton.batches(expert_specs(64, 32, [(6, 6, 6), (0, 0, 0)], 32), top_k)
    assert len(batches) < 7 and {compiled(t) for t in range(1, 2000)} == set(map(compiled, batches))
    assert triton.batches([TensorSpec(6, 64, 64, 32)], None)[0] == 1


def test_the_tuner_stores_tiles_that_are_then_used(monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    tile = configs.Config(rows=16, tokens=8, num_warps=1, num_stages=1)
    other = {"Another GPU": {"any": {"down": [tile.model_dump(exclude_defaults=True)]}}}
    path.write_text(json.dumps(other))
    monkeypatch.setattr(tune, "LADDERS", {"rows": (32, 64)})
    shapes = ["--shape", "64x32x4x2", "--linear", "64x64", "--group-size", "32"]
    tune.main([*shapes, "--bits", "4", "--tokens", "3", "1", "--output", str(path)])
    stored = json.loads(path.read_text())
    assert stored.pop("Another GPU") == other["Another GPU"]
    assert list(stored) == ["interpreted"] and set(stored["interpreted"]["4"]) == {"gate_up", "down", "linear"}
    for tiles in stored["interpreted"]["4"].values():
        assert {t["rows"] for t in tiles} <= {32, 64} and [t.get("up_to") for t in tiles] in ([None], [1, None])
    before = path.read_text()
    path.write_text(before.replace('"rows"', '"row"'))
    with pytest.raises(MoeCollabError, match=r"tiles\.json"):
        tune.main([*shapes, "--output", str(path)])


def test_tiles_that_are_tried_go_before_all_files():
    tile = configs.Config(rows=16, tokens=8, num_warps=1, num_stages=1)
    usual = configs.choose(("cuda",), 1 << 4, "gate_up", 1)
    with configs.using({"down": tile}), configs.using({"linear": tile}):
        assert [configs.choose(("cuda",), 1 << 4, k, 1) for k in ("gate_up", "down", "linear")] == [usual, tile, tile]
    assert configs.choose(("cuda",), 1 << 4, "down", 1) != tile
