"""`ActivationSmoothModifier`: fewer activated experts, and activations that quantize more easily."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator

from ..calibration import Calibration
from ..calibration.observed import LayerPeaks, kl_by_top_k, matches_and_peaks
from ..errors import MoeCollabError
from ..moe_model import MoELayer, MoEModel, describe
from ..pruning import check_masks, scaled_top_k, wanted_num_experts, whole_groups
from ..pruning.surgery import activating, set_top_k
from .expert_pruning import ExpertPruningModifier
from .glue.calibration import calibrating, calibration_of, check_calibration
from .glue.channel_scales import (
    Rescaling,
    norm_and_readers,
    rescale_norm,
    rescale_outputs,
    rescale_up_down,
)
from .glue.compat import keep_attention_causal
from .glue.recipe import check_layer_patterns, check_unquantized, modifiers_of_this_pass, rounds_to_nearest
from .glue.saving import install_save
from .glue.starved import repair_starved
from .glue.top_k import report_top_k
from .glue.weighed_inputs import call_experts_alike

__all__ = ["ActivationSmoothModifier"]


class ActivationSmoothModifier(Modifier):
    """Adjust how many experts are activated per token, and smooth what makes experts hard to quantize.

    Nothing is changed until calibration is over and all that it saw is finite. With another number of experts, the
    routed experts' outputs of each layer are multiplied, in `down_proj`, by the one factor that brings them nearest to
    what they were (`OutputMatch`). Both smoothings move powers of two from one weight to the next, and leave the
    model's function unchanged bit for bit in float32 and bfloat16; they are off by default, for they pay only where
    single channels stand out. On the trained Qwen3-MoE fixture, whose channels are even, KL after rounding to nearest
    (groups of 128, zero points) goes from 0.049 to 0.065 nats at 3 bits and from 0.247 to 0.359 at 2 bits with
    `strength: 0.5`; with `norm_strength: 0.5` every scale rounds to 1 and nothing changes. With channels made to stand
    out by a factor of 64, either more than halves KL at 3 bits.

    :param num_experts_per_tok: an integer; a share in (0, 1) of the present number; `scale` = in proportion to the
        experts that pruning kept; both rounded half up, at least 1; `auto` = the smallest number that keeps `max_kl`;
        or `keep`.
    :param max_kl: for `auto`: KL in nats per token not to exceed, measured end to end on held-out calibration tokens
        (every eighth batch) against the model as this modifier finds it: with its original number of activated
        experts, but already pruned if it was pruned before, and neither smoothed nor quantized.
    :param compensate: whether another number of experts changes `down_proj` by the factor described above.
    :param strength: of `up_proj -> down_proj` smoothing, in [0, 1]: row j of `up_proj` is divided and column j of
        `down_proj` multiplied by s_j = max|x_j|^strength / max|W_down,j|^(1 - strength), over the tokens routed to the
        expert (SmoothQuant, arXiv 2211.10438, eq. 4). Leave it out for none.
    :param norm_strength: the same smoothing, from the norm before the MoE block to its router and to gate_proj and
        up_proj of routed and shared experts. Leave it out for none.
    :param ignore: regexes of MoE layer names not to smooth.
    :param work: directory in which the run keeps what it has finished, so that it can be killed and started again;
        named by one modifier, or by `moe_collab.oneshot(work=...)`, for all.
    """

    requires_calibration_data: bool = False
    """False because this modifier makes its passes over the data itself."""

    num_experts_per_tok: int | float | Literal["scale", "auto", "keep"] = "keep"
    max_kl: float | None = Field(None, gt=0)
    compensate: bool = True
    strength: float | None = Field(None, ge=0, le=1)
    norm_strength: float | None = Field(None, ge=0, le=1)
    ignore: list[str] = Field(default_factory=list)
    work: str | None = None

    _original: tuple[int, int] = PrivateAttr((0, 0))

    @field_validator("num_experts_per_tok")
    @classmethod
    def _positive(cls, value: int | float | str) -> int | float | str:
        who = "ActivationSmoothModifier.num_experts_per_tok"
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{who} must be at least 1, got {value}")
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"{who}: a share must lie between 0 and 1, got {value}")
        return value

    @model_validator(mode="after")
    def _limited(self) -> ActivationSmoothModifier:
        if (self.num_experts_per_tok == "auto") != (self.max_kl is not None):
            raise ValueError("ActivationSmoothModifier: `num_experts_per_tok: auto` and `max_kl` need each other")
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the recipe against the model, and remember it as it was before pruning, which `scale` refers to."""
        check_unquantized(state.model, "ActivationSmoothModifier")
        check_calibration(state, self)
        moe = describe(state.model)
        self._original = (_live_experts(moe), moe.top_k)
        self._check_family(moe)
        call_experts_alike(moe)
        if isinstance(self.num_experts_per_tok, int):
            _check_reachable(self.num_experts_per_tok, self._reachable_after_pruning(moe))
        check_layer_patterns(state.model, "ActivationSmoothModifier.ignore", self.ignore)
        self._check_norms(state.model)
        keep_attention_causal(state.model)
        install_save(state.model)
        return True

    def _reachable_after_pruning(self, moe: MoEModel) -> int:
        """How many experts a token can reach once the recipe comes to this modifier; with masking an upper bound."""
        reachable = moe.limits.reachable(moe.num_experts)
        for modifier in modifiers_of_this_pass():
            if modifier is self:
                break
            if isinstance(modifier, ExpertPruningModifier):
                kept = wanted_num_experts(moe.limits, modifier.retention, modifier.num_experts)
                physical = modifier.pruning == "physical"
                reachable = min(reachable, moe.limits.reachable(whole_groups(moe.limits, kept)) if physical else kept)
        return reachable

    def _check_norms(self, model: torch.nn.Module) -> None:
        for layer in self._smoothed(model):
            if self.norm_strength is not None:
                norm_and_readers(model, describe(model), layer)

    def _smoothed(self, model: torch.nn.Module) -> tuple[MoELayer, ...]:
        """The layers to smooth, if any smoothing is asked for."""
        wanted = self.strength is not None or self.norm_strength is not None
        return describe(model, self.ignore).layers if wanted else ()

    def _check_family(self, moe: MoEModel) -> None:
        fixed = moe.family.fixed_top_k or moe.family.weighs_inputs
        if fixed and self.num_experts_per_tok not in ("keep", moe.top_k):
            raise MoeCollabError(
                f"ActivationSmoothModifier.num_experts_per_tok: routers of {moe.family.model_types[0]} always activate "
                f"{moe.top_k} experts. Use `keep`."
            )
        if self.strength is not None and not moe.family.linear_in_up:
            raise MoeCollabError(
                f"ActivationSmoothModifier.strength: experts of {moe.family.model_types[0]} clamp what up_proj puts "
                "out, so smoothing would change them. Leave it out."
            )

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Refuse to share a calibration pass."""
        others = [type(modifier).__name__ for modifier in modifiers_of_this_pass() if modifier is not self]
        if others:
            raise MoeCollabError(
                f"ActivationSmoothModifier shares its calibration pass with {others}, but it changes weights at the "
                "end of it. Use oneshot(pipeline='independent'), the default."
            )

    def _candidates(self, moe: MoEModel) -> list[int]:
        """Other numbers of activated experts to choose from: for `auto` all smaller ones, else the one asked for."""
        num_experts, top_k = self._original
        wanted = self.num_experts_per_tok
        if wanted == "auto":
            return list(range(1, moe.top_k))
        if wanted == "scale":
            top_k = scaled_top_k(top_k, num_experts, _live_experts(moe))
        elif isinstance(wanted, float):
            top_k = max(1, math.floor(wanted * moe.top_k + 0.5))
        else:
            top_k = moe.top_k if wanted == "keep" else int(wanted)
        _check_reachable(top_k, moe.limits.reachable(moe.num_experts))
        with activating(moe, top_k):
            check_masks(moe)
        return [] if top_k == moe.top_k else [top_k]

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Look at the experts, decide and compute everything, then change the model."""
        model: Any = state.model
        moe = describe(model)
        candidates = self._candidates(moe)
        smoothed = self._smoothed(model)
        if not candidates and not smoothed:
            return
        calibration = calibration_of(state, self, moe)
        with calibrating(state):
            matches, peaks = matches_and_peaks(calibration, candidates if self.compensate else [])
            factors: dict[int, dict[str, float]] = {
                top_k: {
                    layer.name: matches[top_k][layer.name].factor if self.compensate else 1.0 for layer in moe.layers
                }
                for top_k in candidates
            }
            top_k = self._choose(calibration, factors)
        calibration.close()
        rescalings = self._smoothings(model, moe, peaks)
        if top_k != moe.top_k:
            report_top_k(state.model, moe, top_k, factors[top_k])
            if self.compensate:
                rescalings += [r for layer in moe.layers for r in rescale_outputs(layer, factors[top_k][layer.name])]
        for rescaling in rescalings:
            rescaling.apply()
        set_top_k(moe, top_k)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Put weights on the grid of their scales where a stock quantizer has left that to compression."""
        repair_starved(state.model, snap=rounds_to_nearest())
        return True

    def _choose(self, calibration: Calibration, factors: Mapping[int, Mapping[str, float]]) -> int:
        moe = calibration.moe
        if self.max_kl is None:
            return next(iter(factors), moe.top_k)
        costs = kl_by_top_k(calibration, factors)
        logger.info(
            "ActivationSmoothModifier: KL on held-out tokens by activated experts: {}",
            ", ".join(f"{top_k}: {kl:.4f}" for top_k, kl in costs.items()),
        )
        return min((top_k for top_k, kl in costs.items() if kl <= self.max_kl), default=moe.top_k)

    def _smoothings(self, model: torch.nn.Module, moe: MoEModel, peaks: Mapping[str, LayerPeaks]) -> list[Rescaling]:
        """The rescalings for everything that calibration tokens reached.

        Norms come first, because their scales are computed from the weights as they are before any rescaling.
        """
        found: list[Rescaling] = []
        for layer in self._smoothed(model):
            seen = peaks[layer.name]
            if self.norm_strength is not None and len(seen.inputs):
                found += rescale_norm(model, moe, layer, seen.inputs, self.norm_strength)
            if self.strength is not None:
                for index in layer.live_experts:
                    if index in seen.inner:
                        found += rescale_up_down(layer.expert(index), seen.inner[index], self.strength)
        return found


def _live_experts(moe: MoEModel) -> int:
    """Number of experts that have weights, over all layers."""
    return sum(len(layer.live_experts) for layer in moe.layers)


def _check_reachable(top_k: int, reachable: int) -> None:
    if top_k > reachable:
        raise MoeCollabError(
            f"ActivationSmoothModifier.num_experts_per_tok: a token can reach only {reachable} experts, not {top_k}. "
            "Choose a smaller number."
        )
