"""`ActivationSmoothModifier`: fewer activated experts, and activations that quantize more easily."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator

from ..calibration import float32_weights, held_out
from ..errors import MoeCollabError
from ..moe_model import MoELayer, MoEModel, describe
from ..pruning import check_masks, scaled_top_k, wanted_num_experts, whole_groups
from ..pruning.surgery import activating, set_top_k
from .expert_pruning import ExpertPruningModifier
from .glue.channel_scales import (
    Rescaling,
    everyones_peaks,
    norm_and_readers,
    rescale_norm,
    rescale_outputs,
    rescale_up_down,
)
from .glue.compat import keep_attention_causal
from .glue.data import calibration_batches, check_data
from .glue.recipe import check_layer_patterns, check_unquantized, is_on_disk, modifiers_of_this_pass, rounds_to_nearest
from .glue.routing_tap import RoutingTap
from .glue.saving import install_save
from .glue.starved import repair_starved
from .glue.top_k import Factors, OutputMatch, everyones_factors, kl_by_top_k, output_at, report_top_k
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
    """

    requires_calibration_data: bool = True

    num_experts_per_tok: int | float | Literal["scale", "auto", "keep"] = "keep"
    max_kl: float | None = Field(None, gt=0)
    compensate: bool = True
    strength: float | None = Field(None, ge=0, le=1)
    norm_strength: float | None = Field(None, ge=0, le=1)
    ignore: list[str] = Field(default_factory=list)

    _original: tuple[int, int] = PrivateAttr((0, 0))
    _matches: dict[int, dict[str, OutputMatch]] = PrivateAttr(default_factory=dict)
    _largest: dict[torch.nn.Module, torch.Tensor] = PrivateAttr(default_factory=dict)

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
        check_data(state, "ActivationSmoothModifier")
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
        """Watch the inputs of the experts, and their outputs with the other numbers of activated experts to try."""
        others = [type(modifier).__name__ for modifier in modifiers_of_this_pass() if modifier is not self]
        if others:
            raise MoeCollabError(
                f"ActivationSmoothModifier shares its calibration pass with {others}, but it changes weights at the "
                "end of it. Use oneshot(pipeline='independent'), the default."
            )
        moe = describe(state.model)
        self._matches = {top_k: {layer.name: OutputMatch() for layer in moe.layers} for top_k in self._candidates(moe)}
        if self._matches and self.compensate:
            for layer in moe.layers:
                self.register_hook(layer.experts, partial(self._compare, moe, layer), "forward", with_kwargs=True)
        for layer in self._smoothed(state.model):
            if self.norm_strength is not None:
                self.register_hook(layer.experts, partial(self._see_inputs), "forward_pre", with_kwargs=True)
            if self.strength is not None:
                tap = RoutingTap(self, layer)
                for index in layer.live_experts:
                    see = partial(self._see_routed, tap, index)
                    self.register_hook(layer.expert(index).down_proj, see, "forward")

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

    def _compare(
        self, moe: MoEModel, layer: MoELayer, _module: object, args: tuple, kwargs: dict, output: torch.Tensor
    ) -> None:
        hidden = _hidden(args, kwargs)
        for top_k, matches in self._matches.items():
            matches[layer.name].add(output, output_at(moe, layer, hidden, top_k))

    def _see_inputs(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self._see(module, _hidden(args, kwargs))

    def _see_routed(self, tap: RoutingTap, index: int, module: torch.nn.Module, args: tuple, _output: object) -> None:
        self._see(module, tap.routed(index, args[0])[0])

    def _see(self, module: torch.nn.Module, rows: torch.Tensor) -> None:
        if len(rows):
            largest = rows.detach().abs().amax(0).float()
            self._largest[module] = (
                torch.maximum(self._largest[module], largest) if module in self._largest else largest
            )

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Decide and compute everything, then change the model."""
        self.remove_hooks()
        moe = describe(state.model)
        factors, largest = everyones_factors(self._matches), everyones_peaks(state.model, self._largest)
        self._matches, self._largest = {}, {}
        _check_finite(factors, largest)
        top_k = self._choose(state, moe, factors)
        rescalings = self._smoothings(state.model, moe, largest)
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

    def _choose(self, state: State, moe: MoEModel, factors: Factors) -> int:
        if self.max_kl is None:
            return next(iter(factors), moe.top_k)
        model: Any = state.model
        _, batches = held_out(calibration_batches(state))
        with nullcontext() if is_on_disk(model) else float32_weights(model):
            costs = kl_by_top_k(model, moe, factors, batches)
        if not all(map(math.isfinite, costs.values())):
            raise MoeCollabError(
                "the model's predictions on the calibration data are NaN or infinite; nothing was changed."
            )
        logger.info(
            "ActivationSmoothModifier: KL on held-out tokens by activated experts: {}",
            ", ".join(f"{top_k}: {kl:.4f}" for top_k, kl in costs.items()),
        )
        return min((top_k for top_k, kl in costs.items() if kl <= self.max_kl), default=moe.top_k)

    def _smoothings(
        self, model: torch.nn.Module, moe: MoEModel, largest: Mapping[torch.nn.Module, torch.Tensor]
    ) -> list[Rescaling]:
        """The rescalings for everything that calibration tokens reached.

        Norms come first, because their scales are computed from the weights as they are before any rescaling.
        """
        found: list[Rescaling] = []
        for layer in self._smoothed(model):
            if self.norm_strength is not None and layer.experts in largest:
                found += rescale_norm(model, moe, layer, largest[layer.experts], self.norm_strength)
            if self.strength is not None:
                for expert in map(layer.expert, layer.live_experts):
                    if expert.down_proj in largest:
                        found += rescale_up_down(expert, largest[expert.down_proj], self.strength)
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


def _hidden(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states [tokens, hidden] among the arguments that an experts container is called with."""
    return args[0] if args else kwargs["hidden_states"]


def _check_finite(factors: Factors, largest: Mapping[torch.nn.Module, torch.Tensor]) -> None:
    numbers = (factor for by_layer in factors.values() for factor in by_layer.values())
    if not all(map(math.isfinite, numbers)) or not all(bool(seen.isfinite().all()) for seen in largest.values()):
        raise MoeCollabError(
            "ActivationSmoothModifier: what reaches the experts in calibration is NaN or infinite; nothing was changed."
        )
