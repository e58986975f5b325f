"""The lm_head: predictions made of hidden states, a bounded number of logits at a time, and compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from ..distributed import everyones
from ..errors import MoeCollabError
from .at_hand import float32_copy
from .samples import evenly
from .stream import Stream

__all__ = ["KL", "Head", "HeadGradients"]

_LOGITS = 1 << 26
"""Most logits that are in memory at a time, for each of two models."""


class Head(NamedTuple):
    """An lm_head's weight [vocabulary, H] and bias, in float32."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, model: Any, device: torch.device) -> Head:
        """The lm_head of `model`, on `device`."""
        head = model.get_output_embeddings()
        bias = None if head.bias is None else float32_copy(head.bias, device)
        return cls(float32_copy(head.weight, device), bias)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] for `inputs` [n, H]."""
        return linear(inputs, self.weight, self.bias)

    def parts(self, count: int) -> Iterator[slice]:
        """`count` tokens in parts of which all logits may be in memory."""
        step = max(1, _LOGITS // len(self.weight))
        yield from (slice(start, min(start + step, count)) for start in range(0, count, step))


class KL(NamedTuple):
    """Compares two streams of hidden states by what their lm_heads make of them."""

    stream: Stream
    head: Head
    other: Head

    @torch.no_grad()
    def mean(self, base: torch.Tensor, hidden: torch.Tensor) -> float:
        """KL(base || other) in nats per predicted token, given the last block's outputs [tokens, H] in both models.

        Raises `MoeCollabError` if predictions are not finite.
        """
        own = [(index, *self._sum(index, base, hidden)) for index in self.stream.own]
        _, sums, counts = zip(*sorted(everyones(own)), strict=True)
        return sum(sums) / max(sum(counts), 1)

    def _sum(self, index: int, base: torch.Tensor, hidden: torch.Tensor) -> tuple[float, int]:
        """(KL summed over micro-batch `index`, predicted tokens in it)."""
        stream, total = self.stream, 0.0
        chosen = stream.data.predicted[stream.data.span(index)].to(stream.device)
        finished = (stream.finish(index, stream.rows(last, index)).flatten(0, 1)[chosen] for last in (base, hidden))
        expected, found = finished
        for part in self.head.parts(len(expected)):
            reference = self.head.logits(expected[part]).log_softmax(-1)
            if not bool(torch.isfinite(reference).all()):
                raise MoeCollabError(
                    "the model's predictions on the calibration data are NaN or infinite; nothing was changed."
                )
            ours = self.other.logits(found[part]).log_softmax(-1)
            total += float((reference.exp() * (reference - ours)).sum(dtype=torch.float64))
        return total, int(chosen.sum())


class HeadGradients:
    """The gradients by the last block's output of `draws` losses: each the likelihood of tokens that are drawn at
    random from the model's own predictions."""

    def __init__(self, stream: Stream, draws: int, seed: int) -> None:
        self._stream, self._draws, self._seed = stream, draws, seed
        self.head = Head.of(stream.model, stream.device)

    @torch.no_grad()
    def of(
        self, index: int, hidden: torch.Tensor, into: torch.Tensor, samples: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the gradients of micro-batch `index` to `into` [draws, tokens, H], given the last block's output.

        Returns (inputs [n, H] of lm_head, gradients by its outputs [draws, n, vocabulary]) of `samples` tokens.
        """
        stream, span = self._stream, self._stream.data.span(index)
        own = stream.rows(hidden, index).requires_grad_()
        with torch.enable_grad():
            inputs = stream.finish(index, own)
        chosen = stream.data.predicted[span].nonzero().flatten().to(stream.device)
        flat = inputs.detach().flatten(0, 1)[chosen]
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        draws = torch.rand(self._draws, len(flat), generator=generator).to(stream.device)
        below = torch.zeros(self._draws, *inputs.shape, device=stream.device)
        taken, seen = evenly(len(flat), samples).to(stream.device), []
        for part in self.head.parts(len(flat)):
            errors = self._errors(index, self.head.logits(flat[part]), draws[:, part])
            below.flatten(1, 2)[:, chosen[part]] = errors @ self.head.weight
            seen.append(errors[:, taken[(taken >= part.start) & (taken < part.stop)] - part.start].cpu())
        for draw in range(self._draws):
            (found,) = torch.autograd.grad(inputs, own, below[draw], retain_graph=True)
            into[draw, span] = found.flatten(0, 1).cpu()
        return flat[taken], torch.cat([torch.zeros(self._draws, 0, len(self.head.weight)), *seen], 1)

    def _errors(self, index: int, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """d loss / d logits [draws, n, vocabulary]: the predictions, less 1 at a token that is drawn from them.

        `draws` [draws, n] are uniform in [0, 1).
        """
        if not bool(torch.isfinite(logits).all()):
            row = self._stream.data.row_of(self._stream.data.span(index).start)
            raise MoeCollabError(
                f"the model's predictions on calibration sequences from {row} on are NaN or infinite. Check the model "
                "and the data; nothing was changed."
            )
        chances = logits.softmax(-1)
        sums = chances.double().cumsum(-1)
        drawn = torch.searchsorted(sums, (draws.double() * sums[:, -1]).T.contiguous()).T[..., None]
        errors = chances.expand(len(draws), *chances.shape).clone()
        return errors.scatter_add_(2, drawn.clamp_max(logits.shape[1] - 1), torch.full_like(errors[..., :1], -1.0))
