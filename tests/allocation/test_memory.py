"""What serving takes besides the weights, against published configs worked out by hand."""

import pytest

from moe_collab import MoeCollabError
from moe_collab.allocation.memory import RUNTIME_BYTES, cache_bytes_per_token, serving_bytes, weights_budget

QWEN3_30B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "vocab_size": 129280,
    "torch_dtype": "bfloat16",
}


def test_cache_of_a_token():
    assert cache_bytes_per_token(QWEN3_30B) == 48 * 2 * 4 * 128 * 2
    assert cache_bytes_per_token(DEEPSEEK_V3) == 61 * (512 + 64) * 2
    assert cache_bytes_per_token(QWEN3_30B | {"torch_dtype": "float32"}) == 48 * 2 * 4 * 128 * 4
    assert cache_bytes_per_token({"text_config": QWEN3_30B}) == cache_bytes_per_token(QWEN3_30B)


def test_a_head_dim_left_out_is_the_hidden_size_shared_by_the_heads():
    config = {k: v for k, v in QWEN3_30B.items() if k not in ("head_dim", "num_key_value_heads")}
    assert cache_bytes_per_token(config) == 48 * 2 * 2048 * 2


def test_parts_of_serving():
    parts = serving_bytes(QWEN3_30B, context=32768, concurrency=4)
    assert parts.cache == cache_bytes_per_token(QWEN3_30B) * 32768 * 4
    per_token = 2 * (4 * 2048 + (32 + 8) * 128) + 4 * 8 * (3 * 768 + 2048)
    assert parts.workspace == 2048 * per_token + 4 * 151936 * 4
    assert parts.total == parts.cache + parts.workspace + RUNTIME_BYTES


def test_a_short_context_takes_a_small_workspace_and_many_requests_a_large_one():
    workspaces = [serving_bytes(QWEN3_30B, *load).workspace for load in ((16, 1), (16, 8), (4096, 1), (4096, 4096))]
    assert workspaces == sorted(set(workspaces))


def test_deepseek_v3_in_128_gib():
    left = weights_budget(128 * 2**30, DEEPSEEK_V3, context=4096, concurrency=1)
    assert left == 128 * 2**30 - serving_bytes(DEEPSEEK_V3, 4096, 1).total
    assert 103e9 < left < 128 * 2**30


def test_nothing_left_says_what_took_it():
    with pytest.raises(MoeCollabError, match=r"fit: 8 GB .* KV cache, .* activations and .* Lower context"):
        weights_budget(8 * 10**9, QWEN3_30B, context=131072, concurrency=8)


@pytest.mark.parametrize("load", [(0, 1), (1, 0)])
def test_bad_loads(load):
    with pytest.raises(MoeCollabError, match="must be at least 1"):
        serving_bytes(QWEN3_30B, *load)


def test_a_missing_key_is_named():
    with pytest.raises(MoeCollabError, match="vocab_size is missing"):
        serving_bytes({k: v for k, v in QWEN3_30B.items() if k != "vocab_size"}, 1, 1)
