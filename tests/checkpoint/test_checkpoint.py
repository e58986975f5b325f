"""Reading, verifying and replacing checkpoints, whole and broken."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_collab import MoeCollabError
from moe_collab.checkpoint.groups import config_groups
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.checkpoint.verify import tensor_digest, verify, weight_digest
from moe_collab.formats import dequantize, pack

from .directories import read_dense

NAME = "model.layers.0.mlp.experts.0.up_proj"


@pytest.fixture
def saved(tmp_path):
    """(directory, weight digests, digests, dense weight) of a checkpoint with one 3-bit module."""
    torch.manual_seed(0)
    codes = torch.randint(-4, 4, (16, 64)).to(torch.int8)
    scale, zero = torch.rand(16, 2).bfloat16() + 0.1, torch.randint(-4, 4, (16, 2)).to(torch.int8)
    plain = torch.randn(4, 4)
    tensors = {
        f"{NAME}.weight_packed": pack(codes, 3),
        f"{NAME}.weight_scale": scale,
        f"{NAME}.weight_shape": torch.tensor([16, 64]),
        f"{NAME}.weight_zero_point": pack(zero, 3, packed_dim=0),
        "norm.weight": plain,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weights = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    groups = config_groups({NAME: {"weights": weights, "format": "pack-quantized"}})
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prints = {NAME: weight_digest(codes, scale, zero)}
    return tmp_path, prints, {"norm.weight": tensor_digest(plain)}, dequantize(codes, scale, zero)


def change(directory, **changes):
    tensors = load_file(directory / "model.safetensors")
    for suffix, value in changes.items():
        name = f"{NAME}.{suffix}"
        tensors.pop(name) if value is None else tensors.update({name: value})
    save_file(tensors, directory / "model.safetensors")


def test_reads_and_verifies(saved):
    directory, prints, digests, dense = saved
    verify(directory, prints, digests)
    assert torch.equal(read_dense(directory)[f"{NAME}.weight"], dense)


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("weight_scale", None, "weight_scale is missing"),
        ("weight_zero_point", None, "contradicts `symmetric`"),
        ("weight_packed", torch.zeros(16, 3, dtype=torch.int32), "cannot hold 16 x 64 codes of 3 bits"),
        ("weight_packed", torch.zeros(16, 6, dtype=torch.int32), "differs from what the quantizer produced"),
        ("weight_scale", torch.full((16, 2), float("nan")).bfloat16(), "weight_scale holds NaN or infinity"),
    ],
)
def test_a_wrong_tensor_is_named(saved, suffix, value, message):
    directory, prints, digests, _ = saved
    change(directory, **{suffix: value})
    with pytest.raises(MoeCollabError, match=message) as error:
        verify(directory, prints, digests)
    assert NAME in str(error.value)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(16, 4).bfloat16(), r"needs a floating-point \[16, 2\]"),
        (torch.ones(16, 2, dtype=torch.int32), r"needs a floating-point \[16, 2\]"),
    ],
)
def test_scales_that_contradict_the_config_are_named(saved, scale, message):
    directory, *_ = saved
    change(directory, weight_scale=scale)
    with pytest.raises(MoeCollabError, match=message) as error:
        Checkpoint(directory).quantized(NAME)
    assert NAME in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_never_read(saved, bad):
    directory, *_ = saved
    scale = load_file(directory / "model.safetensors")[f"{NAME}.weight_scale"]
    scale[3, 1] = bad
    change(directory, weight_scale=scale)
    for read in (lambda: Checkpoint(directory).quantized(NAME), lambda: read_dense(directory)):
        with pytest.raises(MoeCollabError, match=r"model\.safetensors: .*weight_scale holds NaN or inf") as error:
            read()
        assert NAME in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_plain_tensor_with_nan_is_never_loaded(saved, dtype):
    directory, prints, digests, _ = saved
    tensors = load_file(directory / "model.safetensors")
    tensors["norm.weight"][2, 1] = float("nan")
    tensors["norm.weight"] = tensors["norm.weight"].to(dtype)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(MoeCollabError, match=r"model\.safetensors: tensor norm\.weight holds NaN"):
        read_dense(directory)
    with pytest.raises(MoeCollabError, match=r"tensor norm\.weight holds NaN"):
        verify(directory, prints, digests)


def test_an_infinite_plain_tensor_may_be_meant(saved):
    directory, *_ = saved
    tensors = load_file(directory / "model.safetensors")
    tensors["norm.weight"][2, 1] = -float("inf")  # as in masks
    save_file(tensors, directory / "model.safetensors")
    assert read_dense(directory)["norm.weight"].isinf().any()


def edit_config(directory, edit):
    config = json.loads((directory / "config.json").read_text())
    edit(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def test_a_class_target_means_every_packed_module(saved):
    directory, _, _, dense = saved
    edit_config(directory, lambda q: q["config_groups"]["group_0"].update(targets=["Linear"]))
    checkpoint = Checkpoint(directory)
    assert torch.equal(read_dense(checkpoint.path)[f"{NAME}.weight"], dense)
    assert checkpoint.scheme("norm") is None


def test_an_unknown_format_is_named(saved):
    directory, *_ = saved
    edit_config(directory, lambda q: q["config_groups"]["group_0"].update(format="nvfp4-pack-quantized"))
    with pytest.raises(MoeCollabError, match="nvfp4-pack-quantized") as error:
        Checkpoint(directory).quantized(NAME)
    assert NAME in str(error.value)


def test_stray_dense_and_orphan_tensors_are_named(saved):
    directory, prints, digests, _ = saved
    tensors = load_file(directory / "model.safetensors")
    other = NAME.replace("0.up", "1.up")
    tensors |= {f"{NAME}.weight": torch.ones(16, 64), f"{other}.weight_scale": torch.ones(16, 2)}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(MoeCollabError) as error:
        verify(directory, prints, digests)
    assert f"{NAME}.weight: is stored packed too" in str(error.value)
    assert f"{other}.weight_scale: belongs to no weight_packed" in str(error.value)


def test_a_weight_that_should_have_been_packed_is_named(saved):
    directory, prints, digests, _ = saved
    targets = ["re:^model\\.layers\\.0\\.mlp\\.experts\\.(0|1)\\.up_proj$"]
    edit_config(directory, lambda q: q["config_groups"]["group_0"].update(targets=targets))
    tensors = load_file(directory / "model.safetensors") | {NAME.replace("0.up", "1.up") + ".weight": torch.ones(4, 4)}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(MoeCollabError, match=r"experts\.1\.up_proj\.weight: is stored dense"):
        verify(directory, prints, digests)


def test_only_the_index_files_are_read(saved):
    directory, prints, digests, _ = saved
    tensors = load_file(directory / "model.safetensors")
    save_file({name: torch.zeros(1) for name in tensors}, directory / "stale.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    verify(directory, prints, digests)
    index["weight_map"]["norm.weight"] = "gone.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MoeCollabError, match=r"gone\.safetensors"):
        Checkpoint(directory)
    index["weight_map"]["norm.weight"] = "stale.safetensors"
    index["weight_map"]["absent"] = "stale.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MoeCollabError, match="absent"):
        Checkpoint(directory)
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(MoeCollabError, match=r"index\.json: cannot be read"):
        Checkpoint(directory)


def test_a_changed_plain_tensor_is_named(saved):
    directory, prints, _, _ = saved
    with pytest.raises(MoeCollabError, match=r"norm\.weight: differs"):
        verify(directory, prints, {"norm.weight": "another"})


def test_a_truncated_file_is_named(saved):
    directory, *_ = saved
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MoeCollabError, match=r"model\.safetensors: truncated"):
        Checkpoint(directory)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(MoeCollabError, match=r"config\.json: cannot be read"):
        Checkpoint(tmp_path)


def test_of_a_stack_no_more_is_read_than_is_asked_for(tmp_path):
    stack = torch.arange(64, dtype=torch.bfloat16)[:, None].expand(64, 1 << 18).contiguous()
    save_file({"stack": stack}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    def read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = read()
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.stored_like("stack").shape == stack.shape
    assert torch.equal(checkpoint.plain_tensor("stack", 5), stack[5])
    assert read() - before < 1 << 20
