"""Predicted sizes against files that the real writers made."""

import string

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from integration.tiny_models import tiny_config
from moe_collab.checkpoint.sizes import TensorEntry, checkpoint_bytes, safetensors_bytes

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}
DTYPES |= {"I8": torch.int8, "U8": torch.uint8}
NAMES = st.text(string.ascii_letters + string.digits + "._äß", min_size=1, max_size=30)


@given(
    st.dictionaries(
        NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 40), max_size=3)), max_size=40
    )
)
@settings(max_examples=60, deadline=None)
def test_size_of_one_file(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("size") / "x.safetensors"
    save_file({n: torch.zeros(s, dtype=DTYPES[d]) for n, (d, s) in tensors.items()}, path, metadata={"format": "pt"})
    entries = [TensorEntry(n, d, tuple(s)) for n, (d, s) in tensors.items()]
    assert safetensors_bytes(entries) == path.stat().st_size


def test_size_of_shards(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", num_hidden_layers=1)).to(torch.bfloat16)
    for shard in (200_000, 10**9):
        out = tmp_path / str(shard)
        # Without conversion back to the original format the saved names are the state dict's.
        model.save_pretrained(out, max_shard_size=shard, save_original_format=False)
        entries = [TensorEntry(n, "BF16", tuple(t.shape)) for n, t in model.state_dict().items()]
        assert checkpoint_bytes(entries, shard) == sum(f.stat().st_size for f in out.glob("*.safetensors"))
