"""`MixedBitAllocModifier`: a bit-width per expert tensor, under a budget in bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator

from ..allocation import parse_bytes
from ..architectures import MoEModel, describe
from ..calibration import inputs_of
from ..errors import MoeCollabError
from ..formats import TERNARY, Scheme
from ..plan import CompressionPlan, fingerprint
from .common import check_unquantized, following_quantizers, modifiers_of_this_pass
from .expert_pruning import ExpertPruningModifier
from .fisher_costs import Measured, fisher_costs
from .fisher_gptq import FisherGPTQModifier
from .planner import Planner, model_fingerprint
from .propagation import kl_per_squared_error
from .routing import RoutingTap
from .saving import expect_plan, install_save
from .schemes import attach_scheme, is_sound, round_in_place, rounded, weight_arguments
from .sensitivity import Sensitivity

__all__ = ["SUPPORTED_BITS", "MixedBitAllocModifier"]

SUPPORTED_BITS = (TERNARY, 2, 3, 4, 5, 6, 8, 16)
FEW_TOKENS = 32
"""Experts with fewer routed calibration tokens keep a copy of their weights: GPTQ may leave them at zero."""


class MixedBitAllocModifier(Modifier):
    """Choose how many bits each expert tensor gets, so that the checkpoint fits a budget in bytes.

    The method is the paper's (arXiv 2509.25689): start at the lowest precision, measure what every upgrade
    would bring, spend the bytes where they save most, back off where the exact size exceeds the budget. Before
    `FisherGPTQModifier` costs are measured in KL with its own rounding; before other quantizers a cost is the
    error at the experts' output on the calibration tokens the router sent there, times what such an error was
    measured to do to the model's predictions (KL), layer by layer. The next quantizer in the recipe, such
    as `GPTQModifier: {ignore: [lm_head]}`, rounds at the chosen bits.

    :param budget: size of all `*.safetensors` files together: bytes, `"3.1MB"`, `"103GB"`, `"128GiB"`.
    :param bpw: instead of `budget`, mean bits per routed-expert weight, scales included.
    :param bits: bit-widths to choose from; 16 leaves a tensor as it is; `ternary` needs `FisherGPTQModifier`.
    :param group_size: weights that share a scale; -1 for one scale per output channel.
    :param symmetric: leave out zero points.
    :param fixed: regex of module names -> bits, for any Linear; the first match counts.
    :param granularity: what gets one bit-width together: an `expert`, a `projection` (gate and up of an
        expert; its down), or all experts of a `layer`.
    :param plan: JSON file of the decision; written if it does not exist, reused if it does.
    :param ignore: modules that keep their precision.
    """

    requires_calibration_data: bool = True

    budget: int | str | None = None
    bpw: float | None = Field(None, gt=0, le=16)
    bits: list[int] = Field(default_factory=lambda: [2, 3, 4, 8])
    group_size: int = 128
    symmetric: bool = False
    fixed: dict[str, int] = Field(default_factory=dict)
    granularity: Literal["expert", "projection", "layer"] = "projection"
    plan: str | None = None
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])

    _moe: MoEModel | None = PrivateAttr(None)
    _sensitivity: Sensitivity | None = PrivateAttr(None)
    _faithful: bool = PrivateAttr(False)
    _reused: CompressionPlan | None = PrivateAttr(None)
    _originals: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    @field_validator("bits", mode="before")
    @classmethod
    def _known_bits(cls, value: object) -> object:
        bits = [TERNARY if b == "ternary" else b for b in value] if isinstance(value, list) else []
        if not bits or any(b not in SUPPORTED_BITS for b in bits):
            known = ["ternary", *SUPPORTED_BITS[1:]]
            raise ValueError(f"MixedBitAllocModifier.bits: {value!r} must be a list from {known}")
        return sorted(set(bits))

    @field_validator("fixed")
    @classmethod
    def _valid_fixed(cls, value: dict[str, int]) -> dict[str, int]:
        for pattern, bits in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"MixedBitAllocModifier.fixed: {pattern!r} is no regex: {error}") from error
            if bits not in SUPPORTED_BITS:
                raise ValueError(f"MixedBitAllocModifier.fixed: {pattern!r} -> {bits} is not in {list(SUPPORTED_BITS)}")
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> MixedBitAllocModifier:
        if (self.budget is None) == (self.bpw is None):
            raise ValueError("MixedBitAllocModifier needs exactly one of `budget` (bytes) and `bpw`")
        if self.group_size != -1 and self.group_size < 16:
            raise ValueError(f"MixedBitAllocModifier.group_size: {self.group_size} must be -1 or at least 16")
        if self.budget is not None:
            parse_bytes(self.budget, "MixedBitAllocModifier.budget")
        return self

    def on_initialize(self, state: State, **kwargs) -> bool:
        """Check the recipe against the model before any data is read."""
        check_unquantized(state.model, "MixedBitAllocModifier")
        describe(state.model)
        self._check_quantizer_follows()
        self._check_group_size(state.model)
        if not any(isinstance(m, ExpertPruningModifier) for m in modifiers_of_this_pass()):
            self._check_budget(state.model)
        install_save(state.model)
        return True

    def _check_quantizer_follows(self) -> None:
        followers = following_quantizers(self)
        self._faithful = any(isinstance(follower, FisherGPTQModifier) for follower in followers)
        if TERNARY in self.bits and not self._faithful:
            raise MoeCollabError(
                "MixedBitAllocModifier.bits: only FisherGPTQModifier rounds to ternary. Put it after "
                "MixedBitAllocModifier, or take `ternary` out."
            )
        if not followers:
            raise MoeCollabError(
                "MixedBitAllocModifier: no quantizer comes after it in the recipe, so nothing would be rounded. "
                "Add `GPTQModifier: {ignore: [lm_head]}` after it."
            )
        for quantizer in followers:
            who = type(quantizer).__name__
            if quantizer.scheme is not None or quantizer.config_groups is not None:
                raise MoeCollabError(
                    f"{who}: its `scheme` or `config_groups` would override the allocated bits. Remove them; name "
                    "the bits of other tensors in MixedBitAllocModifier.fixed."
                )
            if str(getattr(quantizer, "actorder", None)) in ("group", "ActivationOrdering.GROUP"):
                raise MoeCollabError(
                    f"{who}.actorder: `group` stores weight_g_idx, which no mixed-bit kernel serves. Use `static`."
                )

    def _check_group_size(self, model: torch.nn.Module) -> None:
        if self.group_size == -1 or self.bits == [16]:
            return
        for name, module in self._targets(model):
            if module.in_features % self.group_size:
                raise MoeCollabError(
                    f"MixedBitAllocModifier.group_size: {self.group_size} does not divide the {module.in_features} "
                    f"inputs of {name}. Choose a divisor, or -1 for one scale per channel."
                )

    def _check_budget(self, model: torch.nn.Module) -> None:
        """Raise `MoeCollabError` with the bytes needed if no allocation fits; needs no data."""
        Planner(model, describe(model), self._targets(model), Measured(), {}, self).plan("", "")

    def _targets(self, model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
        """Every Linear that may lose bits: routed experts, and whatever `fixed` names."""
        experts = {id(module) for layer in describe(model).layers for *_, module in layer.projections()}
        linears = match_named_modules(model, ["Linear"], self.ignore)
        return [(n, m) for n, m in linears if id(m) in experts or self._fixed_bits(n) not in (None, 16)]

    def _fixed_bits(self, name: str) -> int | None:
        return next((bits for pattern, bits in self.fixed.items() if re.search(pattern, name)), None)

    def on_calibration_start(self, state: State, event: Event, **kwargs) -> None:
        """Reuse the plan if there is one; otherwise watch what reaches every expert."""
        others = [type(m).__name__ for m in modifiers_of_this_pass() if m is not self]
        if any(isinstance(m, QuantizationMixin) for m in modifiers_of_this_pass()):
            raise MoeCollabError(
                f"MixedBitAllocModifier shares its calibration pass with {others}, but it decides about all layers at "
                "once, before any is rounded. Use oneshot(pipeline='independent'), the default."
            )
        self._moe = describe(state.model)
        if self.plan and Path(self.plan).exists():
            self._reused = CompressionPlan.load(self.plan)
            self._reused.check_matches(self.plan, model_fingerprint(state.model), self._recipe_fingerprint())
            logger.info("MixedBitAllocModifier: reusing {}", self.plan)
            return
        self._check_budget(state.model)
        if self._faithful:
            return
        self._sensitivity = Sensitivity(self._round, self.bits)
        for layer in self._moe.layers:
            tap = RoutingTap(self, layer)
            self._sensitivity.watch(layer)
            self.register_hook(layer.experts, partial(self._sensitivity.see, layer, tap), "forward")

    def _round(self, weight: torch.Tensor, num_bits: int) -> torch.Tensor:
        return rounded(weight, weight_arguments(num_bits, self.group_size, self.symmetric))

    def _recipe_fingerprint(self) -> str:
        return fingerprint(self.model_dump(include=_DECIDING_FIELDS))

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list | None = None, **kwargs) -> None:
        """Turn the statistics of finished layers into costs, and let them go."""
        done = {id(module) for module in modules or ()}
        for layer in self._moe.layers if self._moe and self._sensitivity else ():
            if id(layer.router) in done:
                self._sensitivity.close(layer)

    def on_calibration_end(self, state: State, event: Event, **kwargs) -> None:
        """Decide, write the plan down, and hand the bits to the next quantizer."""
        self.remove_hooks()
        plan = self._reused or self._decide(state)
        if self.plan and not self._reused:
            plan.save(self.plan)
        self._apply(state.model, plan)
        expect_plan(state.model, plan)

    def _decide(self, state: State) -> CompressionPlan:
        assert self._moe is not None
        model = state.model
        measured, factors = self._measure(model, state.data.calib)
        planner = Planner(model, self._moe, self._targets(model), measured, factors, self)
        plan = planner.plan(model_fingerprint(model), self._recipe_fingerprint())
        planner.report(plan)
        return plan

    def _measure(self, model: torch.nn.Module, data: Iterable[dict]) -> tuple[Measured, dict[str, float]]:
        """(costs, KL per unit of cost by layer)."""
        assert self._moe is not None
        if self._faithful:
            device = next(model.parameters()).device
            schemes = {b: Scheme(b, self.group_size, self.symmetric or b == TERNARY) for b in self.bits if b != 16}
            measured = fisher_costs(model, self._moe, [inputs_of(batch, device) for batch in data], schemes)
            return measured, dict.fromkeys((layer.name for layer in self._moe.layers), 1.0)
        assert self._sensitivity is not None
        for layer in self._moe.layers:
            self._sensitivity.close(layer)
        return self._sensitivity.measured, kl_per_squared_error(model, self._moe, data)

    def _apply(self, model: torch.nn.Module, plan: CompressionPlan) -> None:
        for name, bits in plan.num_bits.items():
            if bits != 16:
                attach_scheme(model.get_submodule(name), Scheme(bits, plan.group_size, plan.symmetric))
        self._keep_starved(plan)

    def _keep_starved(self, plan: CompressionPlan) -> None:
        """Copy the weights of experts that hardly any token reaches: GPTQ zeroes what it has seen no input of."""
        assert self._moe is not None
        for layer in self._moe.layers:
            few = {e for e, tokens in enumerate(plan.routed_tokens[layer.name]) if tokens < FEW_TOKENS}
            for name, index, _, module in layer.projections():
                if index in few and plan.num_bits.get(name, 16) != 16:
                    self._originals[name] = module.weight.detach().clone()

    def on_finalize(self, state: State, **kwargs) -> bool:
        """Round to nearest what GPTQ could not: experts that no calibration token was routed to."""
        repaired = []
        for name, module in state.model.named_modules():
            if getattr(module, "quantization_scheme", None) is None or not hasattr(module, "weight_scale"):
                continue
            if is_sound(module):
                continue
            if name not in self._originals:
                raise MoeCollabError(
                    f"{name}: the quantizer left it all zero, not finite or unrounded, and its original is gone. "
                    "Calibrate with more tokens, or with oneshot(moe_calibrate_all_experts=True)."
                )
            round_in_place(module, self._originals[name])
            repaired.append(name)
        if repaired:
            logger.warning(
                "{} expert tensors saw no calibration token and were rounded to nearest: {} ...",
                len(repaired),
                repaired[0],
            )
        self._originals.clear()
        return True


_DECIDING_FIELDS = {"budget", "bpw", "bits", "group_size", "symmetric", "fixed", "granularity", "ignore"}
