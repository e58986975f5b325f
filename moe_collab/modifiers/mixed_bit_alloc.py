"""`MixedBitAllocModifier`: a bit-width per expert tensor, no bits at all included, under a budget in bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.utils.helpers import eval_context
from loguru import logger
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from ..allocation import parse_bytes
from ..allocation.memory import weights_budget
from ..architectures import MoEModel, describe
from ..calibration import inputs_of
from ..calibration.costs import CostTable
from ..calibration.study import FEW_TOKENS
from ..calibration.tuning import teach
from ..errors import MoeCollabError
from ..formats import DENSE, TERNARY, Scheme
from ..plan import CompressionPlan, fingerprint
from ..pruning import check_mask
from ..rounding import Rounder
from .common import check_data, check_unquantized, following_quantizers, is_on_disk, modifiers_of_this_pass
from .compat import keep_attention_causal
from .expert_pruning import ExpertPruningModifier
from .fisher_gptq import FisherGPTQModifier
from .notices import coverage, outcome
from .planner import Planner, model_fingerprint
from .propagation import kl_per_squared_error
from .routing import RoutingTap
from .saving import expect_plan, install_save
from .schemes import attach_scheme, forget_empty_schemes, is_sound, round_in_place, rounded, settle, weight_arguments
from .search import Found, Search
from .sensitivity import Sensitivity
from .surgery import keep_experts, mask_experts
from .weighed_inputs import call_experts_alike

__all__ = ["SUPPORTED_BITS", "MixedBitAllocModifier"]

Batches = Sequence[Mapping[str, torch.Tensor]]

SUPPORTED_BITS = (TERNARY, 2, 3, 4, 5, 6, 8, 16)
_ASYMMETRIC_BITS = 4
"""Widths up to which zero points are worth their bytes."""
_FEWEST_ROWS = 16
"""Rows of a matrix; vLLM wants smaller ones, such as the gate of a shared expert, unquantized."""


class MixedBitAllocModifier(Modifier):
    """Choose how each expert tensor is stored, or that an expert goes, so that the checkpoint fits a budget in bytes.

    One multiple-choice knapsack over all experts, after the paper's search (arXiv 2509.25689): costs in KL are
    measured in a forward and a backward pass with the rounding that will be used, `FisherGPTQModifier`'s if it comes
    next in the recipe, to nearest before others such as `GPTQModifier: {ignore: [lm_head]}`. On held-out calibration
    tokens the decision is compared with the best uniform scheme that fits, and gives way to it if it is no better.

    :param budget: size of all `*.safetensors` files together: bytes, `"3.1MB"`, `"103GB"`, `"128GiB"`.
    :param bpw: instead of `budget`, mean bits per routed-expert weight, scales included.
    :param fit: instead of `budget`, memory of the machine that will serve: weights, KV cache of `concurrency` requests
        of `context` tokens, activations and runtime together.
    :param max_kl: KL on held-out tokens that may not be exceeded, nats per token. Alone, the smallest checkpoint that
        keeps it is made; with a budget, an error says what was reached.
    :param bits: bit-widths to choose from; 16 leaves a tensor as it is; `ternary` needs `FisherGPTQModifier`.
    :param group_size: weights that share a scale, one or several to choose from; -1 for one scale per output channel.
    :param symmetric: leave out zero points; `auto` chooses, up to 4 bits.
    :param pruning: whether experts may go: `none`; `physical`, equally many per layer and routing group; `masked`,
        freely, for routers with a selection bias.
    :param scope: `experts`, or `model` for every Linear that `ignore` does not name.
    :param fixed: regex of module names -> bits, for any Linear; the first match counts.
    :param floors: regex of module names -> fewest bits, for Linears other than routed experts; the first match counts.
    :param granularity: what gets one scheme together: an `expert`, a `projection` (gate and up of an expert; its
        down), or all experts of a `layer`.
    :param speed: KL, in nats per token, that one gigabyte less to read per token would be worth.
    :param plan: JSON file of the decision; written if it does not exist, reused if it does.
    :param costs: JSON file of the measured costs, for other budgets; written if it does not exist, reused if it does.
    :param ignore: modules that keep their precision.
    """

    requires_calibration_data: bool = True

    budget: int | str | None = None
    bpw: float | None = Field(None, gt=0, le=16)
    fit: int | str | None = None
    context: int = Field(4096, ge=1)
    concurrency: int = Field(1, ge=1)
    max_kl: float | None = Field(None, gt=0)
    bits: list[int] = Field(default_factory=lambda: [2, 3, 4, 8])
    group_size: int | list[int] = 128
    symmetric: bool | Literal["auto"] = "auto"
    pruning: Literal["none", "physical", "masked"] = "none"
    scope: Literal["experts", "model"] = "experts"
    fixed: dict[str, int] = Field(default_factory=dict)
    floors: dict[str, int] = Field(default_factory=lambda: {"lm_head$": 4, ".": 3})
    granularity: Literal["expert", "projection", "layer"] = "projection"
    speed: float = Field(0.0, ge=0)
    plan: str | None = None
    costs: str | None = None
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])

    _moe: MoEModel | None = PrivateAttr(None)
    _planner: Planner | None = PrivateAttr(None)
    _sensitivity: Sensitivity | None = PrivateAttr(None)
    _to_nearest: bool = PrivateAttr(False)
    _fisher: list[FisherGPTQModifier] = PrivateAttr(default_factory=list)
    _backward: bool = PrivateAttr(True)
    _reused: CompressionPlan | None = PrivateAttr(None)
    _originals: dict[torch.nn.Module, torch.Tensor] = PrivateAttr(default_factory=dict)

    @field_validator("bits", mode="before")
    @classmethod
    def _known_bits(cls, value: object) -> object:
        bits = [TERNARY if b == "ternary" else b for b in value] if isinstance(value, list) else []
        if not bits or any(b not in SUPPORTED_BITS for b in bits):
            known = ["ternary", *SUPPORTED_BITS[1:]]
            raise ValueError(f"MixedBitAllocModifier.bits: {value!r} must be a list from {known}")
        return sorted(set(bits))

    @field_validator("fixed", "floors")
    @classmethod
    def _valid_patterns(cls, value: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        key = f"MixedBitAllocModifier.{info.field_name}"
        for pattern, bits in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{key}: {pattern!r} is no regex: {error}") from error
            if bits not in SUPPORTED_BITS:
                raise ValueError(f"{key}: {pattern!r} -> {bits} is not in {list(SUPPORTED_BITS)}")
        return value

    @field_validator("group_size")
    @classmethod
    def _valid_group_size(cls, value: int | list[int]) -> int | list[int]:
        sizes = value if isinstance(value, list) else [value]
        if not sizes or any(size != -1 and size < 16 for size in sizes):
            raise ValueError(f"MixedBitAllocModifier.group_size: {value} must be -1 or at least 16, or a list of such")
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> MixedBitAllocModifier:
        who, given = "MixedBitAllocModifier", [self.budget, self.bpw, self.fit]
        number = sum(value is not None for value in given)
        if number > 1 or (number == 0 and self.max_kl is None):
            raise ValueError(f"{who} needs exactly one of `budget` (bytes), `bpw` and `fit`, or `max_kl` alone")
        for key, value in (("budget", self.budget), ("fit", self.fit)):
            if value is not None:
                parse_bytes(value, f"{who}.{key}")
        if self.pruning != "none" and (self.granularity == "layer" or number == 0):
            raise ValueError(f"{who}.pruning: {self.pruning} needs a budget and no granularity of whole layers")
        if self.scope == "model" and self.bpw is not None:
            raise ValueError(f"{who}.bpw counts routed experts only; with scope: model, name a `budget` or `fit`")
        return self

    def schemes(self) -> list[Scheme]:
        """All that routed experts can be stored as."""
        sizes = self.group_size if isinstance(self.group_size, list) else [self.group_size]
        packed = [
            Scheme(bits, size, symmetric)
            for bits, size in product(self.bits, sizes)
            if bits != 16
            for symmetric in self._symmetries(bits)
        ]
        return packed + [DENSE] * (16 in self.bits)

    def _symmetries(self, bits: int) -> tuple[bool, ...]:
        if bits == TERNARY:
            return (True,)
        if self.symmetric == "auto":
            return (True, False) if bits <= _ASYMMETRIC_BITS else (True,)
        return (self.symmetric,)

    def options(self, name: str, module: torch.nn.Linear, is_expert: bool) -> list[Scheme]:
        """What `module` can be stored as. Raises `MoeCollabError` if no group size divides its inputs."""
        fixed, floor = self.fixed_bits(name), 0 if is_expert else _first(self.floors, name) or 0
        if fixed == 16:
            return [DENSE]
        offered = self.schemes()
        if fixed is not None:
            offered = self.model_copy(update={"bits": [fixed]}).schemes()
        fitting = [s for s in offered if not s.is_packed or module.in_features % s.group_of(module.in_features) == 0]
        if not fitting:
            raise MoeCollabError(
                f"MixedBitAllocModifier.group_size: {self.group_size} does not divide the {module.in_features} "
                f"inputs of {name}. Choose a divisor, or -1 for one scale per channel."
            )
        return [s for s in fitting if fixed is not None or s.num_bits >= floor] or [DENSE]

    def fixed_bits(self, name: str) -> int | None:
        """What `fixed` says of module `name`."""
        return _first(self.fixed, name)

    def on_initialize(self, state: State, **kwargs) -> bool:
        """Check the recipe against the model before any data is read."""
        check_unquantized(state.model, "MixedBitAllocModifier")
        check_data(state, "MixedBitAllocModifier")
        self._check_quantizer_follows()
        self._check_passes(state.model)
        planner = self.planner(state.model)
        if not any(isinstance(m, ExpertPruningModifier) for m in modifiers_of_this_pass()):
            self._check_budget(planner)
        keep_attention_causal(state.model)
        call_experts_alike(describe(state.model))
        install_save(state.model)
        return True

    def planner(self, model: torch.nn.Module) -> Planner:
        """For this recipe on `model`. Raises `MoeCollabError` if its routers lack what pruning needs."""
        moe = describe(model)
        if self.pruning == "masked" and (bare := [layer.name for layer in moe.layers if layer.bias_holder is None]):
            raise MoeCollabError(
                f"MixedBitAllocModifier.pruning: the router of {bare[0]} has no selection bias to mask experts by. "
                "Use pruning: physical."
            )
        if self.pruning != "none" and not {"weights", "indices"} <= {*moe.family.router_output}:
            raise MoeCollabError(
                f"MixedBitAllocModifier.pruning: routers of {moe.family.model_types[0]} do not return what they chose, "
                "as trying the loss of an expert takes. Use ExpertPruningModifier."
            )
        return Planner(model, moe, self._targets(model, moe), self, self._bytes(model))

    def _bytes(self, model: Any) -> int | None:
        """The budget for all safetensors files, if there is one."""
        if self.fit is not None:
            config = model.config.to_dict()
            return weights_budget(parse_bytes(self.fit), config, self.context, self.concurrency)
        return None if self.budget is None else parse_bytes(self.budget)

    def _check_budget(self, planner: Planner) -> None:
        """Raise `MoeCollabError` with the bytes needed if no allocation fits; needs no data."""
        if self.max_kl is None or self.budget or self.bpw or self.fit:
            planner.decide(CostTable(), None if self.pruning == "none" else {})

    def _check_passes(self, model: torch.nn.Module) -> None:
        """Raise `MoeCollabError` if the model is on disk and something asked for needs a backward pass."""
        self._backward = not is_on_disk(model)
        # With a backward pass, this modifier's passes are its own.
        self.requires_calibration_data = not self._backward
        for key, used in (
            ("pruning", self.pruning != "none"),
            ("scope", self.scope == "model"),
            ("max_kl", self.max_kl is not None),
        ):
            if used and not self._backward:
                raise MoeCollabError(
                    f"MixedBitAllocModifier.{key}: {getattr(self, key)} needs a backward pass, but the model is "
                    "offloaded to disk. Load it without offloading, or leave the field out."
                )

    def _check_quantizer_follows(self) -> None:
        followers = following_quantizers(self)
        self._to_nearest = any(isinstance(follower, QuantizationModifier) for follower in followers)
        self._fisher = [follower for follower in followers if isinstance(follower, FisherGPTQModifier)]
        if TERNARY in self.bits and not self._fisher:
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

    def _targets(self, model: torch.nn.Module, moe: MoEModel) -> dict[str, torch.nn.Linear]:
        """Every Linear that may lose bits: routed experts, what `fixed` names, and with scope `model` all others."""
        experts = {id(module) for layer in moe.layers for *_, module in layer.projections()}
        routers = {id(layer.router) for layer in moe.layers}
        found = {}
        for name, module in match_named_modules(model, ["Linear"], self.ignore):
            if id(module) in routers:
                continue
            others = self.scope == "model" and module.out_features >= _FEWEST_ROWS and not _is_tied(model, module)
            if id(module) in experts or others or self.fixed_bits(name) not in (None, 16):
                found[name] = module
        return found

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
        self._planner = self.planner(state.model)
        self._check_budget(self._planner)
        if self._backward:
            return
        logger.warning(
            "MixedBitAllocModifier: the model is offloaded to disk; costs come from errors at the experts' outputs, "
            "and the decision is not compared with uniform schemes."
        )
        self._sensitivity = Sensitivity(self._round_to_nearest, [s for s in self.schemes() if s.is_packed])
        for layer in self._moe.layers:
            tap = RoutingTap(self, layer)
            self._sensitivity.watch(layer)
            self.register_hook(layer.experts, partial(self._sensitivity.see, layer, tap), "forward")

    def _round_to_nearest(self, weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        return rounded(weight, weight_arguments(*scheme))

    def _recipe_fingerprint(self) -> str:
        mine = type(self).model_fields.keys() - Modifier.model_fields.keys() - {"plan", "costs"}
        return fingerprint(self.model_dump(include=mine))

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
        assert self._moe is not None and self._planner is not None
        model, planner = state.model, self._planner
        if self._sensitivity is not None:
            table = self._sensitivity.finished(kl_per_squared_error(model, self._moe, state.data.calib))
            found = Found(planner.decide(table), table)
        else:
            device = next(model.parameters()).device
            batches = [inputs_of(batch, device) for batch in state.data.calib]
            with eval_context(model):
                search = Search(model, self._moe, planner, self, self._rounder(model))
                found = search.run(batches, model_fingerprint(model))
                if found.decision.dropped:
                    self._let_quantizers_see(model, batches)
        plan = self._plan(model, planner, found)
        coverage(plan.routed_tokens)
        outcome(plan)
        return plan

    def _rounder(self, model: Any) -> Rounder:
        """As the next quantizer rounds, or to nearest: other quantizers round better, but alike for all."""
        faithful = bool(self._fisher)
        return Rounder(feedback=faithful, descent=faithful, scale_dtype=model.dtype)

    def _plan(self, model: Any, planner: Planner, found: Found) -> CompressionPlan:
        assert self._moe is not None
        decision = found.decision
        gone = max(map(len, decision.dropped.values()), default=0) if self.pruning == "physical" else 0
        return CompressionPlan(
            model_fingerprint=model_fingerprint(model),
            recipe_fingerprint=self._recipe_fingerprint(),
            num_experts=self._moe.num_experts - gone,
            num_experts_per_tok=self._moe.top_k,
            pruning=self.pruning,
            dropped=decision.dropped,
            schemes={name: str(scheme) for name, scheme in decision.schemes.items()},
            budget_bytes=self._bytes(model),
            budget_bpw=self.bpw,
            predicted_bytes=planner.file_bytes(decision),
            expert_bpw=planner.expert_bpw(decision.schemes),
            predicted_kl=decision.cost,
            bound_kl=min(decision.bound, decision.cost),
            heldout_kl=found.kl,
            uniform=found.uniform,
            uniform_kl=found.uniform_kl,
            routed_tokens=found.table.routed_tokens,
        )

    def _let_quantizers_see(self, model: Any, batches: Batches) -> None:
        """Have tuning aim at the model as it is before experts go."""
        for quantizer in self._fisher:
            if quantizer.tuning_steps:
                quantizer.learn_from(teach(model, batches))

    def _apply(self, model: torch.nn.Module, plan: CompressionPlan) -> None:
        assert self._moe is not None
        forget_empty_schemes(model)
        for name, scheme in plan.parsed().items():
            if scheme.is_packed:
                attach_scheme(model.get_submodule(name), scheme)
        self._keep_starved(plan)
        for layer in self._moe.layers:
            if not (gone := plan.dropped.get(layer.name)):
                continue
            if plan.pruning == "masked":
                check_mask(self._moe, layer.name, gone)
                mask_experts(layer, gone)
            else:
                keep_experts(layer, [index for index in range(layer.num_experts) if index not in gone])

    def _keep_starved(self, plan: CompressionPlan) -> None:
        """Copy the weights of experts that hardly any token reaches: GPTQ zeroes what it has seen no input of."""
        assert self._moe is not None
        for layer in self._moe.layers:
            few = {e for e, tokens in enumerate(plan.routed_tokens[layer.name]) if tokens < FEW_TOKENS}
            for _, index, _, module in layer.projections():
                if index in few and hasattr(module, "quantization_scheme"):
                    self._originals[module] = module.weight.detach().clone()

    def on_finalize(self, state: State, **kwargs) -> bool:
        """Round to nearest what GPTQ could not: experts that no calibration token was routed to."""
        repaired = []
        for name, module in state.model.named_modules():
            if getattr(module, "quantization_scheme", None) is None or not hasattr(module, "weight_scale"):
                continue
            if not is_sound(module) and self._to_nearest:
                settle(module)
            if is_sound(module):
                continue
            if module not in self._originals:
                raise MoeCollabError(
                    f"{name}: the quantizer left it all zero, not finite or unrounded, and its original is gone. "
                    "Calibrate with more tokens, or with oneshot(moe_calibrate_all_experts=True)."
                )
            round_in_place(module, self._originals[module])
            repaired.append(name)
        if repaired:
            logger.warning(
                "{} expert tensors saw no calibration token and were rounded to nearest: {} ...",
                len(repaired),
                repaired[0],
            )
        self._originals.clear()
        return True


def _first(patterns: Mapping[str, int], name: str) -> int | None:
    """Value of the first pattern found in `name`."""
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), None)


def _is_tied(model: Any, module: torch.nn.Linear) -> bool:
    return module is model.get_output_embeddings() and bool(getattr(model.config, "tie_word_embeddings", False))
