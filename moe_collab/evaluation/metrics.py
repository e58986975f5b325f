"""One pass over a token set, against the base model's log-probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Evaluation", "evaluate", "log_probabilities"]


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens: perplexity, KL(base || model) in nats, share of equal top-1 tokens."""

    perplexity: float
    kl: float
    top1: float


@torch.no_grad()
def log_probabilities(model: Any, tokens: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """Next-token log-probabilities in float32, [rows, length - 1, vocabulary], for `tokens` [rows, length]."""
    batches = tokens.long().split(batch_size)
    return torch.cat([model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).cpu() for ids in batches])


def evaluate(model: Any, tokens: torch.Tensor, base: torch.Tensor, batch_size: int = 16) -> Evaluation:
    """Compare `model` on `tokens` [rows, length] with `base`, the base model's `log_probabilities` on them."""
    loss = divergence = agreement = 0.0
    for ids, reference in zip(tokens.long().split(batch_size), base.split(batch_size), strict=True):
        found = log_probabilities(model, ids, batch_size)
        loss -= found.gather(-1, ids[:, 1:, None]).sum().item()
        divergence += (reference.exp() * (reference - found)).sum().item()
        agreement += (reference.argmax(-1) == found.argmax(-1)).sum().item()
    count = tokens[:, 1:].numel()
    return Evaluation(math.exp(loss / count), divergence / count, agreement / count)
