"""One pass over a token set, against the base model's log-probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["Evaluation", "PerToken", "evaluate", "log_probabilities"]


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


class PerToken(NamedTuple):
    """What is found for each predicted token, float64; of any shape, in the end [rows, length - 1]."""

    loss: torch.Tensor
    """-log of the text's token, nats."""
    kl: torch.Tensor
    agreement: torch.Tensor
    """1 where the model's most likely token is the base's, else 0."""
    right: torch.Tensor
    """1 where it is the text's, else 0."""

    @classmethod
    def of(cls, found: torch.Tensor, base: torch.Tensor, text: torch.Tensor) -> PerToken:
        """Compare a model's log-probabilities with the base's, both [..., vocabulary], for the tokens `text` [...]."""
        loss = -found.gather(-1, text[..., None]).squeeze(-1)
        kl = (base.exp() * (base - found)).sum(-1)
        likeliest = found.argmax(-1)
        measured = (loss, kl, likeliest == base.argmax(-1), likeliest == text)
        return cls(*(values.double().cpu() for values in measured))

    def means(self) -> Evaluation:
        """The means, given that all tensors are [rows, tokens]."""
        rows = self.kl.mean(-1)
        loss, agreement, right = (float(values.mean()) for values in (self.loss, self.agreement, self.right))
        return Evaluation(math.exp(loss), float(rows.mean()), agreement, right, rows)


@torch.no_grad()
def log_probabilities(model: Any, tokens: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """Next-token log-probabilities in float32, [rows, length - 1, vocabulary], for `tokens` [rows, length]."""
    batches = tokens.long().split(batch_size)
    return torch.cat([model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).cpu() for ids in batches])


def evaluate(model: Any, tokens: torch.Tensor, base: torch.Tensor, batch_size: int = 16) -> Evaluation:
    """Compare `model` on `tokens` [rows, length] with `base`, the base model's `log_probabilities` on them.

    For models and predictions that fit in memory; `compare` needs neither.
    """
    batches = zip(tokens.long().split(batch_size), base.split(batch_size), strict=True)
    parts = [PerToken.of(log_probabilities(model, ids, batch_size), of_base, ids[:, 1:]) for ids, of_base in batches]
    return PerToken(*map(torch.cat, zip(*parts, strict=True))).means()
