"""A model rounded on trial, and what that does to its predictions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch

from ..formats import Scheme
from .head import KL, Head
from .results import key_of
from .rounded_model import RoundedModel
from .run import Calibration, kept_masks

__all__ = ["Trial"]


class Trial:
    """Rounds a model on trial, as it would be rounded in earnest, and measures its KL on held-out tokens.

    Two streams of hidden states are compared at the end: those of the model as it is, which are kept, and those with
    rounded weights. The model is not touched.
    """

    def __init__(self, calibration: Calibration, rounded: RoundedModel) -> None:
        self._calibration, self._rounded = calibration, rounded
        self._base: torch.Tensor | None = None

    def kl(self, schemes: Mapping[str, Scheme], dropped: Mapping[str, Collection[int]]) -> float:
        """KL(model || model rounded at `schemes`, without the experts `dropped` of each layer), nats per token."""
        packed = {name: str(scheme) for name, scheme in schemes.items() if scheme.is_packed}
        gone = {layer: sorted(experts) for layer, experts in dropped.items() if experts}
        name = f"trial-{key_of(packed, gone, str(self._rounded.rounder))}"
        results = self._calibration.results
        if (found := results.noted(name)) is None:
            results.note(name, found := self._measured(name, schemes, dropped))
            self._calibration.stream(self._calibration.judge).forget(name)
        return found

    def _measured(self, name: str, schemes: Mapping[str, Scheme], dropped: Mapping[str, Collection[int]]) -> float:
        calibration = self._calibration
        kept = kept_masks(calibration.moe, dropped)
        names = set(self._rounded.round(schemes, kept))
        stream = calibration.stream(calibration.judge)
        with stream.running():
            if self._base is None:
                self._base = stream.last("base")
            head, other = Head.of(calibration.model, stream.device), self._rounded.head(names, stream.device)
            weights_of = partial(self._rounded.expert, names)
            last = stream.last(name, kept, self._rounded.dense(names, stream.device), weights_of)
            return KL(stream, head, other).mean(self._base, last)
