"""Importance criteria: which experts of a layer contribute least, by what calibration saw of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..statistics import ExpertStatistics

__all__ = ["CRITERIA", "importance", "super_experts"]

CRITERIA: dict[str, Callable[[ExpertStatistics], torch.Tensor]] = {
    "frequency": lambda seen: seen.frequency,
    "mean_weight": lambda seen: seen.mean_weight,
    "output_norm": lambda seen: seen.mean_norm,
    "reap": lambda seen: seen.mean_weighted_norm,
    "frequency_reap": lambda seen: seen.frequency * seen.mean_weighted_norm,
}
"""Scores of a layer's experts [experts]; those with the lowest are pruned. With router weights g and outputs f, in this
order: the share of tokens that select the expert; mean g, mean ||f||, and mean g ||f|| over the expert's tokens (the
last is REAP, arXiv 2510.13999); the sum of g ||f|| over the expert's tokens, divided by all tokens. `importance` (I_e)
needs its `alpha`, so it is not among them."""


def importance(statistics: ExpertStatistics, alpha: float) -> torch.Tensor:
    """I_e = alpha * f_e + (1 - alpha) * s_e, [num_experts] (arXiv 2509.25689, section 2)."""
    return alpha * statistics.frequency + (1 - alpha) * statistics.mean_weight


def super_experts(statistics: Mapping[str, ExpertStatistics]) -> dict[str, list[int]]:
    """Layer name -> experts whose outputs hold the model's outliers (arXiv 2507.23279, section 3.1).

    An expert is one if its largest absolute output is at or above the 99.5th percentile of all experts' and a tenth of
    the largest in the model.
    """
    peaks = {name: seen.largest.amax(0) for name, seen in statistics.items()}
    every = torch.cat(list(peaks.values()))
    bar = max(float(every.quantile(0.995)), float(every.max()) / 10)
    return {name: (peak >= bar).nonzero().flatten().tolist() for name, peak in peaks.items()}
