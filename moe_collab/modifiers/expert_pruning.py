"""`ExpertPruningModifier`: drop the experts that contribute least, in every layer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator

from ..calibration.observed import expert_statistics
from ..checkpoint.atomic import check_output_directory
from ..coverage import warn_of_seldom_reached
from ..distributed import agreed, is_source_process
from ..errors import MoeCollabError
from ..moe_model import MoELayer, MoEModel, describe
from ..pruning import (
    CRITERIA,
    importance,
    kept_experts,
    super_experts,
    unmasked_experts,
    wanted_num_experts,
    whole_groups,
)
from ..pruning.surgery import keep_experts, mask_experts
from ..statistics import ExpertStatistics, SavedStatistics
from .glue.calibration import calibrating, calibration_of, check_calibration
from .glue.compat import keep_attention_causal
from .glue.domains import token_domains
from .glue.outline import model_fingerprint
from .glue.recipe import check_layer_patterns, check_unquantized, rounds_to_nearest
from .glue.saving import install_save
from .glue.starved import keep_starved, repair_starved
from .glue.weighed_inputs import call_experts_alike

__all__ = ["ExpertPruningModifier"]


class ExpertPruningModifier(Modifier):
    """Keep the experts that score highest over the calibration set; nothing is changed until all layers are scored.

    :param retention: share of the experts to keep, in (0, 1]; with physical pruning their number is rounded up to a
        multiple of the number of routing groups.
    :param num_experts: experts to keep per layer, instead of `retention`.
    :param criterion: one of `pruning.CRITERIA`; `importance`, I_e = alpha * frequency + (1 - alpha) * mean router
        weight (arXiv 2509.25689); `package.module:function` of your own, from `ExpertStatistics` to scores [experts];
        or a JSON file with a list of scores by layer name.
    :param alpha: weight of the frequency in `importance`, in [0, 1].
    :param pruning: `physical`: expert tensors, router rows, the selection bias and the saved config shrink, and every
        layer and routing group keeps equally many experts; `masked`, for routers with a selection bias: the router
        never selects the dropped experts and their tensors are not stored, but router and config keep the number of
        experts, so that groups may lose different numbers.
    :param protect: this many of the best experts for each domain stay; calibration samples must name their `domain`.
    :param protect_super_experts: experts whose outputs hold the model's outliers stay (arXiv 2507.23279).
    :param statistics: folder for the statistics; if it exists they are read from it, whatever the criterion, otherwise
        they are measured and written there.
    :param ignore: regexes of MoE layer names to leave alone; only with `masked`, because a config has one expert count
        for all layers.
    :param work: directory in which the run keeps what it has finished, so that it can be killed and started again;
        named by one modifier, or by `moe_collab.oneshot(work=...)`, for all.
    """

    requires_calibration_data: bool = False
    """False because this modifier makes its pass over the data itself."""

    retention: float | None = Field(None, gt=0, le=1)
    num_experts: int | None = Field(None, ge=1)
    criterion: str = "frequency_reap"
    alpha: float = Field(0.5, ge=0, le=1)
    pruning: Literal["physical", "masked"] = "physical"
    protect: int = Field(0, ge=0)
    protect_super_experts: bool = False
    statistics: str | None = None
    ignore: list[str] = Field(default_factory=list)
    work: str | None = None

    _moe: MoEModel | None = PrivateAttr(None)
    _num_kept: int = PrivateAttr(0)
    _seen: dict[str, ExpertStatistics] = PrivateAttr(default_factory=dict)
    _fingerprint: str = PrivateAttr("")

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in (*CRITERIA, "importance") and ":" not in value and not value.endswith(".json"):
            raise ValueError(
                f"ExpertPruningModifier.criterion: {value!r} is none of importance, {', '.join(CRITERIA)}, no "
                "`package.module:function` and no .json file"
            )
        return value

    @model_validator(mode="after")
    def _one_size(self) -> ExpertPruningModifier:
        if (self.retention is None) == (self.num_experts is None):
            raise ValueError("ExpertPruningModifier needs exactly one of `retention` and `num_experts`")
        if self.protect and self.criterion.endswith(".json"):
            raise ValueError("ExpertPruningModifier.protect: scores of a file are not by domain")
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the recipe against the model before any data is read."""
        check_unquantized(state.model, "ExpertPruningModifier")
        check_calibration(state, self)
        self._moe = moe = describe(state.model, self.ignore)
        call_experts_alike(moe)
        check_layer_patterns(state.model, "ExpertPruningModifier.ignore", self.ignore)
        self._num_kept = wanted_num_experts(moe.limits, self.retention, self.num_experts)
        if self.pruning == "physical":
            self._num_kept = whole_groups(moe.limits, self._num_kept)
        if self._num_kept < moe.num_experts:
            self._check_form(len(describe(state.model).layers))
        if ":" in self.criterion:
            self._own_function()
        if self.statistics and is_source_process() and not SavedStatistics.exist(self.statistics):
            check_output_directory(self.statistics)
        keep_attention_causal(state.model)
        install_save(state.model)
        return True

    def _check_form(self, num_layers: int) -> None:
        assert self._moe is not None
        if self.pruning == "masked":
            for layer in self._moe.layers:
                if layer.bias_holder is None:
                    raise MoeCollabError(
                        f"ExpertPruningModifier.pruning: the router of {layer.name} has no selection bias to mask "
                        "experts by. Use `physical`."
                    )
                unmasked_experts(self._moe.limits, layer.name, torch.zeros(layer.num_experts), self._num_kept)
        elif len(self._moe.layers) < num_layers:
            raise MoeCollabError(
                "ExpertPruningModifier.ignore: config.json has one expert count for all layers, so some layers "
                "cannot keep all their experts while others are pruned. Remove `ignore`."
            )

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Read what an earlier run saw, if that was kept."""
        moe = self._moe
        assert moe is not None
        if self._num_kept == moe.num_experts:
            logger.info("ExpertPruningModifier: all {} experts are kept, nothing to do", self._num_kept)
            return
        self._fingerprint = model_fingerprint(state.model)
        if self.statistics and SavedStatistics.exist(self.statistics):
            domains, self._seen = SavedStatistics.load(self.statistics, self._fingerprint)
            self._check_domains(domains)
            logger.info("ExpertPruningModifier: reusing {}", self.statistics)

    def _check_domains(self, domains: list[str]) -> None:
        if self.protect and domains == [""]:
            raise MoeCollabError(
                "ExpertPruningModifier.protect: no sample of the calibration set names its `domain`. Name them in the "
                "dataset, or leave `protect` out. Of a dataset of `text` or `messages` llm-compressor drops all other "
                "columns: tokenize it first."
            )

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Score the experts of all layers, then prune them."""
        assert self._moe is not None
        if self._num_kept == self._moe.num_experts:
            return
        seen, self._seen = self._seen or self._measure(state), {}
        counts = {name: statistics.counts.long().tolist() for name, statistics in seen.items()}
        warn_of_seldom_reached(counts)
        keep_starved(self._moe, counts)
        scores = self._scores(seen)
        kept = agreed({layer.name: self._kept(layer, scores[layer.name]) for layer in self._moe.layers})
        for layer in self._moe.layers:
            self._prune(layer, kept[layer.name])

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Round to nearest what a stock quantizer zeroed: experts that no calibration token was routed to."""
        repair_starved(state.model, snap=rounds_to_nearest())
        return True

    def _measure(self, state: State) -> dict[str, ExpertStatistics]:
        """See what every expert does with the calibration tokens, and keep that if it was asked for."""
        assert self._moe is not None and state.model is not None
        names, domains = token_domains(state)
        self._check_domains(names)
        calibration = calibration_of(state, self)
        with calibrating(state):
            seen = expert_statistics(calibration, self._moe.layers, domains, len(names))
        calibration.close()
        for name, statistics in seen.items():
            statistics.check(name)
        if self.statistics and is_source_process():
            saved = SavedStatistics(
                model_fingerprint=self._fingerprint,
                domains=names,
                num_experts=self._moe.num_experts,
                layers=list(seen),
            )
            saved.save(self.statistics, seen)
        return seen

    def _scores(self, seen: Mapping[str, ExpertStatistics]) -> dict[str, torch.Tensor]:
        """Layer name -> scores [experts], float64; protected experts score above all others."""
        if self.criterion.endswith(".json"):
            scores = self._from_file(seen)
        else:
            scores = {name: self._score(statistics, name) for name, statistics in seen.items()}
        outliers = super_experts(seen) if self.protect_super_experts else {}
        for name, statistics in seen.items():
            safe = set(outliers.get(name, ()))
            for domain in range(statistics.num_domains if self.protect else 0):
                own = self._score(statistics.domain(domain), name)
                safe |= set(own.argsort(descending=True, stable=True)[: self.protect].tolist())
            if safe:
                logger.info("{}: protected experts {}", name, sorted(safe))
                scores[name][sorted(safe)] += 2 * scores[name].abs().max() + 1
        return scores

    def _score(self, statistics: ExpertStatistics, layer: str) -> torch.Tensor:
        if self.criterion == "importance":
            return importance(statistics, self.alpha)
        score = CRITERIA[self.criterion] if self.criterion in CRITERIA else self._own_function()
        found = torch.as_tensor(score(statistics), dtype=torch.float64).clone()
        self._check_scores(found, layer)
        return found

    def _own_function(self) -> Callable[[ExpertStatistics], torch.Tensor]:
        module, _, name = self.criterion.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise MoeCollabError(f"ExpertPruningModifier.criterion: cannot import {self.criterion}: {error}") from error

    def _from_file(self, seen: Mapping[str, ExpertStatistics]) -> dict[str, torch.Tensor]:
        try:
            stored = json.loads(Path(self.criterion).read_text())
            scores = {name: torch.tensor(stored[name], dtype=torch.float64) for name in seen}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MoeCollabError(
                f"ExpertPruningModifier.criterion: {self.criterion} does not hold a list of scores for each of "
                f"{list(seen)}: {error!r}"
            ) from error
        for name, found in scores.items():
            self._check_scores(found, name)
        return scores

    def _check_scores(self, scores: torch.Tensor, layer: str) -> None:
        assert self._moe is not None
        if scores.shape != (self._moe.num_experts,) or not torch.isfinite(scores).all():
            raise MoeCollabError(
                f"ExpertPruningModifier.criterion: {self.criterion} gives {layer} no {self._moe.num_experts} finite "
                "scores; nothing was changed."
            )

    def _kept(self, layer: MoELayer, scores: torch.Tensor) -> list[int]:
        assert self._moe is not None
        if self.pruning == "masked":
            return unmasked_experts(self._moe.limits, layer.name, scores, self._num_kept)
        return kept_experts(scores, self._num_kept, self._moe.n_group)

    def _prune(self, layer: MoELayer, kept: list[int]) -> None:
        if self.pruning == "masked":
            mask_experts(layer, [index for index in range(layer.num_experts) if index not in kept])
        else:
            keep_experts(layer, kept)
        logger.info("{}: kept experts {}", layer.name, kept)
