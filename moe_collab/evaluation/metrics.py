"""One pass over a token set, against the base model's log-probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Evaluation", "evaluate", "log_probabilities"]


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens."""

    perplexity: float
    kl: float
    """KL(base || model), nats."""
    top1: float
    """Share of tokens where the model's most likely token is the base's."""
    accuracy: float
    """Share of tokens where it is the text's."""
    kl_by_row: torch.Tensor
    """Mean KL of each sequence, float64 [rows]: what the noise of `kl` is judged by."""


@torch.no_grad()
def log_probabilities(model: Any, tokens: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """Next-token log-probabilities in float32, [rows, length - 1, vocabulary], for `tokens` [rows, length]."""
    batches = tokens.long().split(batch_size)
    return torch.cat([model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).cpu() for ids in batches])


def evaluate(model: Any, tokens: torch.Tensor, base: torch.Tensor, batch_size: int = 16) -> Evaluation:
    """Compare `model` on `tokens` [rows, length] with `base`, the base model's `log_probabilities` on them."""
    loss = agreement = right = 0.0
    by_row = []
    for ids, reference in zip(tokens.long().split(batch_size), base.split(batch_size), strict=True):
        found = log_probabilities(model, ids, batch_size)
        loss -= found.gather(-1, ids[:, 1:, None]).sum().item()
        by_row.append((reference.exp() * (reference - found)).sum(-1).double().mean(-1))
        likeliest = found.argmax(-1)
        agreement += (reference.argmax(-1) == likeliest).sum().item()
        right += (likeliest == ids[:, 1:]).sum().item()
    count, rows = tokens[:, 1:].numel(), torch.cat(by_row)
    return Evaluation(math.exp(loss / count), float(rows.mean()), agreement / count, right / count, rows)
