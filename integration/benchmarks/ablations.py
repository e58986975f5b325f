"""What each ingredient of the allocation gains, and how well the predicted costs rank the measured ones."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from scipy.stats import spearmanr

from moe_collab.allocation import Decision
from moe_collab.calibration import RoundedModel, log_probabilities, mean_kl
from moe_collab.calibration import moments as moments_module
from moe_collab.calibration import study as study_module
from moe_collab.calibration.moments import token_weights
from moe_collab.formats import TERNARY, Scheme
from moe_collab.rounding import Rounder

from ..compress import tokens
from .bench import Bench
from .trained import BITS, UNIFORM

__all__ = ["ablation", "rank_correlation"]

COSTS_SAMPLED = 40


def ablation(bench: Bench, size: str) -> None:
    """Ours without tuning and pruning, less one ingredient each."""
    budget = bench.model.budget(size)
    decide = partial(bench.decide, budget)
    bench.decided("ablation", size, "all, untuned, no pruning", decide)
    for method, fields in {
        "without ternary": {"bits": BITS[1:]},
        "without 5, 6 and 8 bits": {"bits": BITS[:4]},
        "groups of 128 only": {"group_size": 128},
        "symmetric only": {"symmetric": True},
    }.items():
        bench.decided("ablation", size, method, partial(decide, **fields))
    rounding = {
        "rounding without Fisher weights": mock.patch.object(moments_module, "token_weights", _unweighted),
        "rounding without feedback within experts": mock.patch.object(study_module, "FEW_TOKENS", 1 << 60),
    }
    for method, patch in rounding.items():
        with patch:
            bench.decided("ablation", size, method, decide)
    plain = Rounder(descent=False, scale_dtype=bench.model.live.dtype)
    bench.decided("ablation", size, "rounding without coordinate descent", decide, plain)
    planner = bench.model.planner(budget=budget)
    bench.decided("ablation", size, "costs without Fisher", partial(planner.cheapest, bench.error_table))
    scheme = Scheme(*UNIFORM[size], False)
    uniform = Decision(dict.fromkeys(planner.experts, scheme))
    bench.decided("ablation", size, "no allocation: uniform, our rounding", lambda: uniform)


def rank_correlation(bench: Bench) -> dict[str, Any]:
    """Predicted against measured KL of rounding one expert's half, on selection tokens."""
    model, generator = bench.model, torch.Generator().manual_seed(0)
    heldout = [{"input_ids": ids} for ids in tokens("selection", model.source)[:64].split(16)]
    predicted, measured, errors = [], [], []
    rounder = Rounder(scale_dtype=model.live.dtype)
    schemes = [Scheme(TERNARY, 128), Scheme(2, 128), Scheme(3, 128)]
    with model.changed({}), torch.no_grad():
        base = [log_probabilities(model.live, batch) for batch in heldout]
    for _ in range(COSTS_SAMPLED):
        layer = model.moe.layers[int(torch.randint(len(model.moe.layers), (), generator=generator))]
        index = int(torch.randint(layer.num_experts, (), generator=generator))
        scheme = schemes[int(torch.randint(len(schemes), (), generator=generator))]
        half = ("gate_proj", "up_proj") if bool(torch.randint(2, (), generator=generator)) else ("down_proj",)
        chosen = {f"{layer.experts_name}.{index}.{projection}": scheme for projection in half}
        rounded = RoundedModel(model.calibration, rounder)
        weights = {name: rounded[name].values() for name in rounded.round(chosen)}
        with model.changed(weights):
            measured.append(mean_kl(model.live, heldout, base))
        predicted.append(sum(model.table.cost(name, scheme) for name in chosen))
        errors.append(sum(bench.error_table.cost(name, scheme) for name in chosen))
    return {
        "sampled": COSTS_SAMPLED,
        "spearman": round(float(spearmanr(predicted, measured).statistic), 4),
        "spearman_without_fisher": round(float(spearmanr(errors, measured).statistic), 4),
        "predicted_over_measured": round(sum(predicted) / sum(measured), 4),
        "kl": None,
    }


def _unweighted(squares: torch.Tensor, sizes: torch.Tensor, columns: int) -> torch.Tensor:
    return token_weights(torch.ones_like(squares), sizes, columns)
