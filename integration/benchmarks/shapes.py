"""Models of real shapes with random weights, made on the spot: for what depends on sizes, not on what was learnt.

Weights are heavy-tailed as trained ones are: Student's t with 5 degrees of freedom, times a lognormal scale for each
input channel. Checkpoints have the layout that their family publishes: shards, an index, config.json, and a
byte-level tokenizer, so that of a vocabulary only the first 258 tokens have a text.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_collab import MoeCollabError
from moe_collab.architectures import find_family
from moe_collab.checkpoint.load import stock_conversions

from ..tiny_models import _byte_tokenizer
from .stored import QUANTIZATIONS, stored_bytes, stored_like_published

__all__ = ["DEEPSEEK", "GPT_OSS", "OLMOE", "SMALL", "Shape", "check_room", "make_model"]

_SHARD = 1 << 30
_STEP = 1 << 22
"""Weights made at a time."""
_TAILS, _DEGREES = 1 << 16, 5
_DRAWN = (1 << 25) - 39
"""Draws that all weights are made of; a prime, so that rows that begin anew in them are no copies of others."""
_CHANNELS, _NORMS, _ROUTERS = 0.3, 0.1, 0.25
"""Standard deviations of the logarithms of scales: of input channels, of norms, and of routers' rows."""
_COMMON_PART = 0.3
"""What all tokens' embeddings share, of their own part: as in trained models some experts are chosen more often."""
_BIASES = 0.02
_SPARE = 4 << 30
"""Room that is left on the disk at all times."""
_DTYPES = {"e_score_correction_bias": torch.float32}
"""What is not published as bfloat16."""


@dataclass(frozen=True)
class Shape:
    """A family and the config that its model has."""

    family: str
    config: dict[str, Any] = field(hash=False)

    def resized(self, **config: Any) -> Shape:
        """The same with other numbers under these keys of the config."""
        return replace(self, config=self.config | config)

    def transformers_config(self) -> Any:
        """The config as transformers has it."""
        return CONFIG_MAPPING[self.family](**self.config)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the published checkpoint on the meta device, layer by layer."""
        with stock_conversions(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.transformers_config(), dtype=torch.bfloat16)
            saved = revert_weight_conversion(model, model.state_dict())
        ordered = sorted(saved.items(), key=lambda item: _place(item[0]))
        return {name: tensor.to(_DTYPES.get(name.rpartition(".")[2], torch.bfloat16)) for name, tensor in ordered}

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


_COMMON = {
    "vocab_size": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
"""Vocabularies are cut: embeddings are neither compressed nor read more than once."""

OLMOE = Shape(
    "olmoe",
    _COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
)
"""OLMoE-1B-7B but for its vocabulary of 50,304: 13.8 GB."""

GPT_OSS = Shape(
    "gpt_oss",
    {key: value for key, value in OLMOE.config.items() if key != "num_experts"}
    | {"num_local_experts": 64, "head_dim": 128, "max_position_embeddings": 4096},
)
"""The family that is published in MXFP4, in OLMoE-1B-7B's size."""

DEEPSEEK = Shape(
    "deepseek_v3",
    _COMMON
    | {
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    },
)
"""One MoE layer of DeepSeek-V3: 23 GB."""

SMALL = Shape(
    "olmoe",
    _COMMON
    | {
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    },
)
"""Layers of 110 MB, for many of them."""


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise `MoeCollabError` unless `num_bytes` fit on the disk of `folder` and 4 GiB stay free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE:
        raise MoeCollabError(
            f"{folder}: {num_bytes / 1e9:.1f} GB are needed and {_SPARE / 1e9:.1f} GB must stay free, but there are "
            f"{free / 1e9:.1f} GB. Make room, or name another disk with --output."
        )


def make_model(
    shape: Shape, path: Path, seed: int = 0, shard_bytes: int = _SHARD, quantized: str | None = None
) -> Path:
    """Write a random model of this shape to `path`, shard by shard; the same bytes for the same seed.

    It is stored as it is, or `quantized` as one of `QUANTIZATIONS`. Raises `MoeCollabError` if the disk has no room.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors, family = shape.tensors(), find_family(shape.family)
    sizes = {name: stored_bytes(name, tensor, quantized) for name, tensor in tensors.items()}
    total = sum(sizes.values())
    check_room(path, total)
    assert family is not None
    shards = list(_shards(sizes, shard_bytes))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        stored: dict[str, torch.Tensor] = {}
        for name in names:
            stored |= stored_like_published(name, _draw(name, tensors[name], family.router, seed), quantized)
        save_file(stored, path / file, {"format": "pt"})
        index |= dict.fromkeys(stored, file)
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1) + "\n")
    config = shape.transformers_config()
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.dtype = torch.bfloat16
    if quantized:
        config.quantization_config = QUANTIZATIONS[quantized]
    config.save_pretrained(path)
    _byte_tokenizer().save_pretrained(path)
    return path


def _place(name: str) -> tuple[float, list[str | int]]:
    """Where a tensor stands: embeddings, the layers, expert by expert, what follows them."""
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    if found := re.search(r"\.layers\.(\d+)\.", name):
        return int(found[1]), parts
    return -1 if "embed" in name else math.inf, parts


def _shards(sizes: dict[str, int], shard_bytes: int) -> Iterator[list[str]]:
    """Names in shards of at most `shard_bytes`, or one tensor."""
    names: list[str] = []
    size = 0
    for name, num_bytes in sizes.items():
        if names and size + num_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _draw(name: str, like: torch.Tensor, router: str, seed: int) -> torch.Tensor:
    """Weights for the tensor `name`, whose numbers depend on its name and the seed alone."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if like.ndim == 1:
        biased = name.endswith("bias")
        values = _BIASES * random.standard_normal(len(like)) if biased else _lognormal(random, _NORMS, len(like))
        return torch.from_numpy(values).to(like.dtype)
    if like.ndim == 3:  # experts in a stack, the other way round
        return torch.stack([_draw(f"{name}.{index}", one.T, router, seed).T for index, one in enumerate(like)])
    rows, columns = like.shape
    if name.endswith(f".{router}.weight"):
        values = random.standard_normal((rows, columns)) * _lognormal(random, _ROUTERS, rows)[:, None]
        return torch.from_numpy(values / math.sqrt(columns)).to(like.dtype)
    scales = torch.from_numpy(_lognormal(random, _CHANNELS, columns)).float()
    start = int(random.integers(_DRAWN))
    if "embed" in name:
        common = _COMMON_PART * torch.from_numpy(random.standard_normal(columns))
        return (_heavy_tailed(seed, start, rows, scales) + common).to(like.dtype)
    return _heavy_tailed(seed, start, rows, scales / math.sqrt(columns))


def _lognormal(random: np.random.Generator, sigma: float, count: int) -> np.ndarray:
    return np.exp(sigma * random.standard_normal(count))


def _heavy_tailed(seed: int, start: int, rows: int, scales: torch.Tensor) -> torch.Tensor:
    """Student's t times `scales` [columns], bfloat16 [rows, columns]: the draws from number `start` on, in a circle.

    To draw each of a model's billions of weights on its own takes twenty times as long.
    """
    draws = _draws(seed)
    values = torch.empty(rows, len(scales), dtype=torch.bfloat16)
    for part in values.split(max(1, _STEP // len(scales))):
        end = start + part.numel()
        taken = draws[start:end] if end <= _DRAWN else torch.cat([draws[start:], draws[: end - _DRAWN]])
        part.copy_(taken.view(part.shape) * scales)
        start = end % _DRAWN
    return values


@lru_cache(maxsize=1)
def _draws(seed: int) -> torch.Tensor:
    """Draws of Student's t with variance 1, float32; they are a table's 65,536 over and over, in random order."""
    random = np.random.default_rng(seed)
    table = random.standard_t(_DEGREES, _TAILS).astype(np.float32) / math.sqrt(_DEGREES / (_DEGREES - 2))
    return torch.from_numpy(table[random.integers(_TAILS, size=_DRAWN, dtype=np.uint16)])
