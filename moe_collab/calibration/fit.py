"""Whether learning fits in memory: what it takes, and what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from compressed_tensors.offload import disable_onloading
from torch import nn

from ..architectures import text_config
from ..decoder import Decoder
from ..kernels.memory import available_memory
from ..moe_model import MoEModel
from .at_hand import compute_device
from .micro_batches import MicroBatches
from .teacher import LESSON_BYTES

__all__ = ["Fit", "end_to_end", "one_block"]

Batches = Sequence[Mapping[str, torch.Tensor]]


class Fit(NamedTuple):
    """Bytes that learning takes, and bytes that are free where it would compute, 0 if that is not known."""

    needed: int
    free: int

    @property
    def enough(self) -> bool:
        """Whether it fits."""
        return not self.free or self.needed <= self.free

    def __str__(self) -> str:
        free = f"{self.free / 1e9:.1f} GB are" if self.free else "an unknown amount is"
        return f"takes about {self.needed / 1e9:.1f} GB, and {free} free"


def end_to_end(model: Any, moe: MoEModel, batches: Batches, copies: int) -> Fit:
    """What end-to-end learning takes, beside the model as it is, if it needs `copies` numbers for every weight.

    With P parameters and L blocks this is `_learning`, and the lessons on top: 4 H bytes for each of the tokens there
    are and of seven times as many that the model writes, but at most twice `LESSON_BYTES`.
    """
    config = text_config(model.config)
    lessons = 8 * 4 * config.hidden_size * sum(batch["input_ids"].numel() for batch in batches)
    learning = _learning(model, moe, batches, copies, _weights(model), config.num_hidden_layers)
    return Fit(learning + min(lessons, 2 * LESSON_BYTES), free_memory())


def one_block(model: Any, moe: MoEModel, batches: Batches, copies: int) -> Fit:
    """What learning takes that has one block at a time in memory: `_learning` of the largest."""
    largest = max(map(_weights, Decoder(model).blocks.values()))
    return Fit(_learning(model, moe, MicroBatches(batches).batches, copies, largest, 1), free_memory())


def _learning(model: Any, moe: MoEModel, batches: Batches, copies: int, weights: int, blocks: int) -> int:
    """Bytes that `blocks` blocks take which have so many weights.

    With P weights, L blocks, hidden size H, expert size I, k experts per token, h attention heads, vocabulary V, and n
    tokens in rows of length s in the largest batch, in float32,

        4 (copies P + n (L (16 H + k (2 H + 6 I) + 2 h s) + 4 V))

    for weights; what a block keeps for the backward pass, which is its residual stream, norms, queries, keys and
    values, then the experts' inputs, outputs and activations, then attention's scores; and logits of both models.
    """
    config = text_config(model.config)
    longest = max((batch["input_ids"] for batch in batches), key=torch.Tensor.numel)
    experts = (layer.expert(index).down_proj for layer in moe.layers for index in layer.live_experts)
    inner = max(down.in_features for down in experts)
    attention = 2 * config.num_attention_heads * longest.shape[1]
    block = 16 * config.hidden_size + moe.top_k * (2 * config.hidden_size + 6 * inner) + attention
    return 4 * (copies * weights + longest.numel() * (blocks * block + 4 * config.vocab_size))


def _weights(module: nn.Module) -> int:
    with disable_onloading():  # sizes are known without reading a model that is on disk
        return sum(parameter.numel() for parameter in module.parameters())


def free_memory() -> int:
    """Bytes that are free where the arithmetic is done, 0 if that is not known."""
    device = compute_device()
    if device.type == "cpu":
        return available_memory()
    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
