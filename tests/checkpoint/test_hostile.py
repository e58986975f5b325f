"""Checkpoints that are broken on purpose: one error, in little time and memory, whatever their numbers say."""

import json
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.tiny_models import build_tiny
from moe_collab import MoeCollabError
from moe_collab.checkpoint.load import load

from .packed import build_packed
from .published import to_fp8, to_gptq, to_mxfp4

NAME = "model.layers.1.mlp.experts.3.down_proj"
STACK = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> directory of a checkpoint that can be read, made once."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def get(kind):
        if kind not in made:
            path = made[kind] = folder / kind
            if kind == "packed":
                build_packed("qwen3_moe", path)
            else:
                build_tiny("gpt_oss" if kind == "mxfp4" else "qwen3_moe", path)
                {"fp8": to_fp8, "gptq": to_gptq, "mxfp4": to_mxfp4}[kind](path)
        return made[kind]

    return get


def tensors(change):
    """What changes the tensors of a checkpoint."""

    def do(path):
        found = load_file(path / "model.safetensors")
        change(found)
        save_file(found, path / "model.safetensors", {"format": "pt"})

    return do


def tensor(name, value):
    return tensors(lambda found: found.update({name: value}))


def header(name, **entry):
    """What changes a tensor's entry in the header of the file, which then lies."""

    def do(path):
        data = (path / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + size])
        entries[name].update(entry)
        changed = json.dumps(entries).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size :])

    return do


def config(change):
    def do(path):
        found = json.loads((path / "config.json").read_text())
        change(found)
        (path / "config.json").write_text(json.dumps(found))

    return do


def group(**changes):
    return config(lambda c: [g.update(changes) for g in c["quantization_config"]["config_groups"].values()])


def weights(**changes):
    return config(lambda c: [g["weights"].update(changes) for g in c["quantization_config"]["config_groups"].values()])


def blocks(size):
    return config(lambda c: c["quantization_config"].update(weight_block_size=size))


def far_away(found):
    for name in [name for name in found if "experts.3." in name]:
        found[name.replace("experts.3.", "experts.999999999.")] = found.pop(name)


def file(name, text):
    return lambda path: (path / name).write_text(text)


INDEX = "model.safetensors.index.json"
CASES = {
    "a huge shape": ("packed", tensor(f"{NAME}.weight_shape", torch.tensor([10**12, 10**12])), "cannot be of one"),
    "a negative shape": ("packed", tensor(f"{NAME}.weight_shape", torch.tensor([-5, 128])), "cannot be of one"),
    "three sides": ("packed", tensor(f"{NAME}.weight_shape", torch.tensor([1, 2, 3])), "cannot be of one"),
    "a shape of floats": ("packed", tensor(f"{NAME}.weight_shape", torch.tensor([128.0, 128.0])), "cannot be of one"),
    "no rows": ("packed", tensor(f"{NAME}.weight_shape", torch.tensor([0, 128])), "cannot be of one"),
    "an expert far away": (
        "packed",
        tensors(far_away),
        r"missing \(of 1000000000 experts, 999999992",
    ),
    "a header of huge shapes": (
        "packed",
        header(f"{NAME}.weight_packed", shape=[10**15, 10**15]),
        "no safetensors file",
    ),
    "a header of negative ones": ("packed", header(f"{NAME}.weight_packed", shape=[-1, 4]), "no safetensors file"),
    "overlapping tensors": ("packed", header(f"{NAME}.weight_packed", data_offsets=[0, 64]), "no safetensors file"),
    "a regex without end": ("packed", group(targets=["re:^(([a-z._0-9])+)+$!"]), "no config group"),
    "no regex": ("packed", group(targets=["re:("]), r"target 're:\(' is no regular expression"),
    "no targets": ("packed", group(targets=None), "group_0.targets: Input should be a valid list"),
    "no groups": ("packed", config(lambda c: c["quantization_config"].update(config_groups=[1])), "valid dictionary"),
    "no object": ("packed", config(lambda c: c.update(quantization_config="int4")), "quantization_config is no JSON"),
    "bits in words": ("packed", weights(num_bits="four"), "weights.num_bits: Input should be a valid integer"),
    "a billion bits": ("packed", weights(num_bits=10**9), "weights.num_bits: Input should be less than or equal to 32"),
    "huge groups": ("packed", weights(group_size=10**18), "weight_scale is .* its scheme"),
    "a group without weights": ("packed", group(weights=None), "no config group in config.json with weights"),
    "a list for a config": ("packed", file("config.json", "[]"), "cannot be read .no JSON object"),
    "a deep config": ("packed", file("config.json", "[" * 100_000), "cannot be read .maximum recursion"),
    "another folder's file": ("packed", file(INDEX, '{"weight_map": {"a": "../a.safetensors"}}'), "no file beside it"),
    "a billion experts": ("packed", config(lambda c: c.update(num_local_experts=10**9)), "do not fit the model"),
    "a billion columns": ("packed", config(lambda c: c.update(hidden_size=10**9)), "do not fit the model"),
    "a billion layers": ("packed", config(lambda c: c.update(num_hidden_layers=10**9)), "but there are tensors of 2"),
    "blocks of nothing": ("fp8", blocks([0, 128]), "weight_block_size is .0, 128., not two"),
    "blocks of less": ("fp8", blocks([-1, 128]), "weight_block_size is .-1, 128., not two"),
    "blocks in words": ("fp8", blocks("large"), "weight_block_size is large, not two"),
    "a scaled norm": ("fp8", tensor("model.norm.weight_scale_inv", torch.ones(1)), "not float8_e4m3fn or"),
    "bits as text": ("gptq", config(lambda c: c["quantization_config"].update(bits="4")), "with 4 bits cannot be read"),
    "groups in floats": ("gptq", tensor(f"{NAME}.g_idx", torch.rand(128)), "not int32 or int64"),
    "no groups of columns": ("gptq", tensor(f"{NAME}.g_idx", torch.zeros(0, dtype=torch.int32)), "not int32 or int64"),
    "a row of scales": ("gptq", tensor(f"{NAME}.scales", torch.ones(128).half()), "with 2 dimensions"),
    "codes in floats": ("gptq", tensor(f"{NAME}.qweight", torch.ones(16, 128)), "not int32"),
    "wide codes": ("mxfp4", tensor(f"{STACK}_blocks", torch.zeros(8, 128, 4, 16, dtype=torch.int64)), "not uint8"),
    "no experts": ("mxfp4", tensor(f"{STACK}_blocks", torch.zeros(0, 128, 4, 16, dtype=torch.uint8)), "not uint8"),
    "NaN of exponents": ("mxfp4", tensors(lambda t: t[f"{STACK}_scales"].fill_(255)), "holds NaN"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case, whole, tmp_path):
    kind, spoil, message = CASES[case]
    path = shutil.copytree(whole(kind), tmp_path / "spoilt")
    spoil(path)
    began = time.monotonic()
    with pytest.raises(MoeCollabError, match=message):
        load(path)
    assert time.monotonic() - began < 30  # what is caught late takes hours, or all of the memory
