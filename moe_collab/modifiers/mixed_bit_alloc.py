"""`MixedBitAllocModifier`: choose a bit-width for each expert tensor, or drop the expert, within a budget in bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from ..allocation import AllocationRequest, CostTable, Planner, compression_plan, decide, parse_bytes
from ..allocation.memory import weights_budget
from ..allocation.notices import report_decision
from ..allocation.request import FLOORS, IGNORED, SUPPORTED_BITS
from ..calibration import Calibration, RoundedModel
from ..calibration.measurements import LiveMeasurements
from ..coverage import warn_of_seldom_reached
from ..distributed import agreed, is_source_process
from ..errors import MoeCollabError
from ..formats import TERNARY
from ..moe_model import MoEModel, describe
from ..plan import CompressionPlan, description_digest
from ..rounding import Rounder
from .expert_pruning import ExpertPruningModifier
from .fisher_gptq import FisherGPTQModifier
from .glue.calibration import calibrating, calibration_of, check_calibration
from .glue.compat import keep_attention_causal
from .glue.execution import apply_plan
from .glue.outline import model_fingerprint, outline_of
from .glue.published_plan import check_needs_of_followers, check_plan, packed_by
from .glue.quantizers import check_followers, check_own_pass, check_rounded
from .glue.recipe import (
    check_unquantized,
    modifier_after,
    modifiers_of_this_pass,
    quantizers_after,
    rounds_to_nearest,
)
from .glue.saving import install_save
from .glue.starved import repair_starved
from .glue.weighed_inputs import call_experts_alike

__all__ = ["MixedBitAllocModifier"]


class MixedBitAllocModifier(Modifier):
    """Choose how each expert tensor is stored, or drop the expert, so that the checkpoint fits a budget in bytes.

    It solves one multiple-choice knapsack over all experts, after the paper's search (arXiv 2509.25689). Costs in KL
    are measured in a forward and a backward pass, with the rounding of `FisherGPTQModifier` if that comes later in the
    recipe, and rounding to nearest for other quantizers, such as `GPTQModifier: {ignore: [lm_head]}`. If the best
    uniform scheme that fits the budget has a lower KL on held-out calibration tokens, it is used instead.

    In `fixed`, `floors` and `ignore` modules may be called by their names in the model or in the checkpoint; a pattern
    that matches nothing is an error.

    :param budget: size of all `*.safetensors` files together: bytes, `"3.1MB"`, `"103GB"`, `"128GiB"`.
    :param bpw: instead of `budget`, mean bits per routed-expert weight, scales included.
    :param fit: instead of `budget`, memory of the machine that will serve, which must hold the weights, the KV cache of
        `concurrency` requests of `context` tokens, activations and the runtime.
    :param max_kl: largest KL allowed on held-out tokens, nats per token. Alone, it asks for the smallest checkpoint
        that keeps to it; with a budget, a larger KL is an error, which says what was reached.
    :param bits: bit-widths to choose from; 16 leaves a tensor unquantized; `ternary` needs `FisherGPTQModifier`.
    :param group_size: weights that share a scale, one or several to choose from; -1 for one scale per output channel.
    :param symmetric: whether to leave out zero points; `auto` chooses for each tensor up to 4 bits, `true` above.
    :param pruning: whether experts may be dropped: `none`; `physical`, equally many in every layer and routing group;
        `masked`, different numbers, for routers with a selection bias.
    :param scope: `experts`, or `model` for every Linear that `ignore` does not name.
    :param fixed: regex of module names -> bits, for any Linear; the first match counts. Group size and zero points are
        chosen by what they cost, as for the others.
    :param floors: regex of module names -> fewest bits, for Linears other than routed experts, of scope `model`; the
        first match counts.
    :param granularity: which tensors share a scheme: `projection` (gate and up of an expert share one, its down has its
        own), or `layer` (all experts of a layer share one), which makes checkpoints that stock vLLM serves.
    :param plan: JSON file of the decision; written if it does not exist, reused if it does. If neither a budget nor any
        other field is given, it must exist and is applied, whatever recipe made it, which takes no data.
    :param costs: JSON file of the measured costs, for other budgets; written if it does not exist, reused if it does.
    :param ignore: modules that keep their precision: names, or regexes that begin with `re:`.
    :param work: directory in which the run keeps what it has finished, so that it can be killed and started again;
        named by one modifier, or by `moe_collab.oneshot(work=...)`, for all.
    """

    requires_calibration_data: bool = False
    """False because this modifier makes its passes over the data itself, backward passes included."""

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
    floors: dict[str, int] = Field(default_factory=lambda: dict(FLOORS))
    granularity: Literal["projection", "layer"] = "projection"
    plan: str | None = None
    costs: str | None = None
    ignore: list[str] = Field(default_factory=lambda: list(IGNORED))
    work: str | None = None

    _moe: MoEModel | None = PrivateAttr(None)
    _planner: Planner | None = PrivateAttr(None)
    _direct: FisherGPTQModifier | None = PrivateAttr(None)
    _fisher: list[FisherGPTQModifier] = PrivateAttr(default_factory=list)
    _reused: CompressionPlan | None = PrivateAttr(None)

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
                found_in_nothing = re.compile(pattern).search("") is not None
            except re.error as error:
                raise ValueError(f"{key}: {pattern!r} is no regex: {error}") from error
            if found_in_nothing:
                raise ValueError(f"{key}: {pattern!r} is found in the empty string, so in every name. Write '.'.")
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
        if number > 1 or (number == 0 and self.max_kl is None and not self.plan):
            raise ValueError(
                f"{who} needs exactly one of `budget` (bytes), `bpw` and `fit`, or `max_kl` alone, or a `plan` to apply"
            )
        for key, value in (("budget", self.budget), ("fit", self.fit)):
            if value is not None:
                parse_bytes(value, f"{who}.{key}")
        if self.only_applies:
            usual = type(self).model_construct()
            others = [name for name in (*self._decisive(), "costs") if getattr(self, name) != getattr(usual, name)]
            if others:
                raise ValueError(
                    f"{who}: {others} decide nothing where a `plan` is only applied. Remove them, or name a budget"
                )
        if self.pruning != "none" and (self.granularity == "layer" or number == 0):
            raise ValueError(f"{who}.pruning: {self.pruning} needs a budget and no granularity of whole layers")
        if self.scope == "model" and self.bpw is not None:
            raise ValueError(f"{who}.bpw counts routed experts only; with scope: model, name a `budget` or `fit`")
        return self

    @property
    def only_applies(self) -> bool:
        """Whether the plan's file decides, whatever recipe it was made for."""
        return self.budget is self.bpw is self.fit is self.max_kl is None

    @classmethod
    def _decisive(cls) -> list[str]:
        """The fields that a plan depends on."""
        return [name for name in cls.model_fields if name not in {*Modifier.model_fields, "plan", "costs", "work"}]

    def request(self, config: Any, strict: bool = True) -> AllocationRequest:
        """What this modifier's fields ask for, given the transformers `config` of the model.

        `strict` says whether a pattern that matches nothing is an error.
        """
        budget = None if self.budget is None else parse_bytes(self.budget)
        if self.fit is not None:
            budget = weights_budget(parse_bytes(self.fit), config.to_dict(), self.context, self.concurrency)
        return AllocationRequest(
            budget=budget,
            bpw=self.bpw,
            max_kl=self.max_kl,
            bits=tuple(self.bits),
            group_sizes=tuple(self.group_size if isinstance(self.group_size, list) else [self.group_size]),
            symmetric=self.symmetric,
            pruning=self.pruning,
            scope=self.scope,
            fixed=tuple(self.fixed.items()),
            floors=tuple(self.floors.items()),
            granularity=self.granularity,
            ignore=tuple(self.ignore),
            strict=strict,
        )

    def planner(self, model: Any, strict: bool = True) -> Planner:
        """The planner for this recipe and `model`. Raises `MoeCollabError` if the recipe does not suit the model."""
        moe = describe(model)
        if self.pruning != "none" and not {"weights", "indices"} <= {*moe.family.router_output}:
            raise MoeCollabError(
                f"MixedBitAllocModifier.pruning: routers of {moe.family.model_types[0]} do not return what they chose, "
                "as trying the loss of an expert takes. Use ExpertPruningModifier."
            )
        return Planner(outline_of(model, moe), self.request(model.config, strict))

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the recipe against the model before any data is read."""
        model: Any = state.model
        check_unquantized(model, "MixedBitAllocModifier")
        check_calibration(state, self, needs_data=not self.only_applies)
        followers = quantizers_after(self)
        self._fisher = [follower for follower in followers if isinstance(follower, FisherGPTQModifier)]
        self._check_objectives()
        following = modifier_after(self)
        self._direct = following if isinstance(following, FisherGPTQModifier) else None
        if self.only_applies:
            assert self.plan is not None
            schemes = packed_by(self.plan, model)
            packed, ternary = list(schemes), any(scheme.num_bits == TERNARY for scheme in schemes.values())
            check_needs_of_followers(followers, state.data is not None and state.data.calib is not None)
        else:
            planner, ternary = self.planner(model), TERNARY in (*self.bits, *self.fixed.values())
            packed = [name for name in planner.matrices if any(s.is_packed for s in planner.table.options(name))]
            if not any(isinstance(m, ExpertPruningModifier) for m in modifiers_of_this_pass()):
                self._check_budget(planner)
        check_followers(followers, ternary, bool(self._fisher))
        if not self._fisher:
            check_rounded(model, packed, followers)
        keep_attention_causal(model)
        call_experts_alike(describe(model))
        install_save(model)
        return True

    def _check_objectives(self) -> None:
        """Raise `MoeCollabError` if a plan is to be made that would be tried with another rounding than it gets."""
        other = next((fisher for fisher in self._fisher if fisher.objective != "predictions"), None)
        if other is not None and not (self.plan and Path(self.plan).exists()):
            raise MoeCollabError(
                f"FisherGPTQModifier.objective: {other.objective} is for a plan that is there already. To make one "
                "takes a backward pass, and its KL is measured with `predictions`, so round for these."
            )

    def _check_budget(self, planner: Planner) -> None:
        """Raise `MoeCollabError` with the size needed if no allocation fits the budget; needs no data."""
        if planner.request.has_budget:
            planner.cheapest(CostTable(), None if self.pruning == "none" else {})

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Reuse the plan if its file exists; otherwise check that the budget can be met now."""
        check_own_pass()
        model: Any = state.model
        self._moe = describe(model)
        if self.plan and Path(self.plan).exists():
            self._reused = CompressionPlan.load(self.plan)
            recipe = None if self.only_applies else self._recipe_digest()
            self._reused.check_matches(self.plan, model_fingerprint(model), recipe)
            check_plan(self.plan, self._reused, self._moe, model)
            logger.info("MixedBitAllocModifier: applying {}", self.plan)
            return
        # Not strict: experts that a pattern names may have been pruned by now.
        self._planner = self.planner(model, strict=False)
        self._check_budget(self._planner)

    def _recipe_digest(self) -> str:
        return description_digest(self.model_dump(include=set(self._decisive())))

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Decide, save the plan, drop experts, and attach the schemes that the next quantizer will round to."""
        self.remove_hooks()
        assert self._moe is not None
        model: Any = state.model
        plan = self._reused
        if plan is None or self._direct is not None:
            plan = self._calibrated(state)
        if any(plan.dropped.values()):
            self._let_quantizers_see(state)
        apply_plan(model, self._moe, plan)

    def _calibrated(self, state: State) -> CompressionPlan:
        """The plan, decided unless there is one, and saved; `FisherGPTQModifier` goes on with what that took."""
        model: Any = state.model
        calibration = calibration_of(state, self, self._moe)
        calibration.later = self._bytes_to_come()
        # FisherGPTQModifier's rounding, or to nearest: other quantizers round better, but alike for all schemes.
        faithful = bool(self._fisher)
        rounded = RoundedModel(calibration, Rounder(faithful, faithful, model.dtype))
        plan = self._reused or agreed(self._decide(state, calibration, rounded))
        if self._direct is not None and not any(plan.dropped.values()):
            self._direct.go_on_with(calibration, rounded)
        else:
            calibration.close()
        if self.plan and not self._reused and is_source_process():
            plan.save(self.plan)
        return plan

    def _bytes_to_come(self) -> int:
        """What the rounded weights may take."""
        if self._reused is not None:
            return self._reused.predicted_bytes
        assert self._planner is not None
        return self._planner.request.budget or 0

    def _decide(self, state: State, calibration: Calibration, rounded: RoundedModel) -> CompressionPlan:
        assert self._moe is not None and self._planner is not None
        model: Any = state.model
        planner, fingerprint = self._planner, model_fingerprint(model)
        with calibrating(state):
            found = decide(planner, LiveMeasurements(calibration, planner, rounded, fingerprint, self.costs))
        plan = compression_plan(planner, found, fingerprint, self._recipe_digest())
        warn_of_seldom_reached(plan.routed_tokens)
        report_decision(plan)
        return plan

    def _let_quantizers_see(self, state: State) -> None:
        """Let `FisherGPTQModifier` tune towards the model before experts are dropped."""
        for quantizer in self._fisher:
            quantizer.learn_from_present(state)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Round to nearest what GPTQ could not: experts that no calibration token was routed to."""
        repair_starved(state.model, snap=rounds_to_nearest())
        return True
