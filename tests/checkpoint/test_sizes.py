"""Predicted sizes against the files that safetensors, transformers and compressed-tensors write."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from integration.tiny_models import tiny_config
from moe_collab.checkpoint.sizes import TensorEntry, checkpoint_bytes, quantized_entries, safetensors_bytes

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
ENTRIES = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3)), max_size=30
)


def _written(entries, path, metadata) -> int:
    tensors = {e.name: torch.zeros(e.shape, dtype=DTYPES[e.dtype]) for e in entries}
    save_file(tensors, path, metadata=metadata)
    return path.stat().st_size


@settings(max_examples=150, deadline=None)
@given(ENTRIES, st.one_of(st.none(), st.dictionaries(st.text('aé\n"', max_size=5), st.text("bß\\", max_size=5))))
def test_file_size_is_exact(tmp_path_factory, tensors, metadata):
    entries = [TensorEntry(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    path = tmp_path_factory.mktemp("size") / "x.safetensors"
    written = _written(entries, path, {"format": "pt"} if metadata is None else metadata or None)
    assert safetensors_bytes(entries, metadata) == written


def test_thousands_of_tensors(tmp_path):
    dtypes = sorted(DTYPES)
    entries = [TensorEntry(f"layers.{i}.müller", dtypes[i * 7 % len(dtypes)], (i % 41, 3)) for i in range(3000)]
    assert safetensors_bytes(entries) == _written(entries, tmp_path / "x.safetensors", {"format": "pt"})


@pytest.mark.parametrize("shard", [20_000, 200_000, 10**9])
def test_shards_are_cut_as_transformers_cuts_them(tmp_path, shard):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", num_hidden_layers=1)).to(torch.bfloat16)
    # In the original format, experts split from a fused tensor share its storage and so stay in one shard. Those
    # of a linearized model, which is what we save, share nothing.
    model.save_pretrained(tmp_path, max_shard_size=shard, save_original_format=False)
    entries = [TensorEntry(n, "BF16", tuple(t.shape)) for n, t in model.state_dict().items()]
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard < 10**9)
    assert checkpoint_bytes(entries, shard) == sum(f.stat().st_size for f in files)


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_quantized_entries_match_compressed_tensors(num_bits, symmetric, group_size):
    pytest.importorskip("compressed_tensors")
    if int(importlib.metadata.version("compressed-tensors").split(".")[1]) < 18:
        pytest.skip("packs 3, 5, 6 and 7 bits in the padded layout")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rows, columns = 40, 96
    weights = QuantizationArgs(
        num_bits=num_bits, symmetric=symmetric, group_size=group_size, strategy="group" if group_size else "channel"
    )
    groups = columns // group_size if group_size else 1
    state = {
        "weight": torch.randn(rows, columns, dtype=torch.bfloat16),
        "weight_scale": torch.ones(rows, groups, dtype=torch.bfloat16),
        "weight_zero_point": torch.zeros(rows, groups, dtype=torch.int8),
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    made = compressor.compress(state, QuantizationScheme(targets=["x"], weights=weights))
    names = {dtype: name for name, dtype in DTYPES.items()}
    expected = {TensorEntry(f"m.{n}", names[t.dtype], tuple(t.shape)) for n, t in made.items()}
    assert set(quantized_entries("m", (rows, columns), num_bits, group_size, symmetric)) == expected
