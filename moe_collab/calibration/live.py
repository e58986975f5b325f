"""A live model in float32, and its predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from loguru import logger
from torch import nn

from ..architectures import logits_scaling
from ..decoder import decoder_of
from ..kernels.memory import available_memory
from .at_hand import at_hand, compute_device

__all__ = [
    "float32_weights",
    "frozen",
    "inputs_of",
    "log_probabilities",
    "mean_kl",
    "predict",
    "predicted",
]


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """Let the model compute with copies of its weights in float32 within the block; its own are left alone.

    CPUs without bfloat16 units compute several times faster in float32, and small differences in KL are not rounded
    away. Where the copies would take more than half of the available memory, the model computes in its own type.
    """
    with disable_onloading():  # sizes are known without reading a model that is on disk
        needed, free = 4 * sum(tensor.numel() for tensor in model.parameters()), available_memory()
    if 0 < free < 2 * needed:
        logger.info("computing in the model's own type; float32 takes {:.1f} GB of {:.1f}", needed / 1e9, free / 1e9)
        yield
        return
    with at_hand(model.modules(), compute_device()):
        yield


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter takes gradients within the block."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The `input_ids` and `attention_mask` (if any) of one batch of oneshot()'s data, as tensors on `device`."""
    names = ("input_ids", "attention_mask")
    return {name: torch.atleast_2d(torch.as_tensor(batch[name])).to(device) for name in names if name in batch}


def predict(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input of lm_head, logits) of every position but the last, [rows, length - 1, ...].

    During calibration llm-compressor replaces the forward of lm_head, so its matrix is applied here. If the model
    divides its logits by a constant, the input of lm_head is divided by it instead.
    """
    hidden = decoder_of(model)(**batch, use_cache=False).last_hidden_state[:, :-1] / logits_scaling(model.config)
    head = model.get_output_embeddings()
    return hidden, nn.functional.linear(hidden, head.weight, head.bias)


def log_probabilities(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Next-token log-probabilities of every position but the last, float32 [rows, length - 1, vocabulary]."""
    return predict(model, batch)[1].float().log_softmax(-1)


def predicted(batch: Mapping[str, torch.Tensor]) -> Any:
    """An index that picks, of all positions but the last [rows, length - 1], those whose next token is no padding."""
    mask = batch.get("attention_mask")
    return slice(None) if mask is None else mask[:, 1:].bool() & mask[:, :-1].bool()


@torch.no_grad()
def mean_kl(model: Any, batches: Iterable[Mapping[str, torch.Tensor]], base: Iterable[torch.Tensor]) -> float:
    """KL(base || model) in nats per token; `base` holds the log-probabilities to compare with, for each batch."""
    total, count = 0.0, 0
    for batch, reference in zip(batches, base, strict=True):
        found = log_probabilities(model, batch)
        divergence = (reference.float().exp() * (reference.float() - found)).sum(-1)[predicted(batch)]
        total, count = total + float(divergence.sum()), count + divergence.numel()
    return total / max(count, 1)
