"""`ExpertPruningModifier`: drop the experts that contribute least, layer by layer."""

from __future__ import annotations

from functools import partial

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator

from ..architectures import MoELayer, MoEModel, describe
from ..pruning import importance, kept_experts, target_num_experts
from ..statistics import RouterStatistics
from .common import check_unquantized
from .saving import install_save
from .surgery import keep_experts

__all__ = ["ExpertPruningModifier"]


class ExpertPruningModifier(Modifier):
    """Keep the experts with the highest I_e = alpha * f_e + (1 - alpha) * s_e (arXiv 2509.25689).

    f_e is how often the router selects expert e per token, s_e its mean router weight when selected, both
    over the calibration set. Pruning is physical: expert tensors, router rows, the selection bias and the
    saved config all shrink; every layer and every routing group keeps equally many experts.

    :param alpha: weight of the frequency against the mean router weight, in [0, 1].
    :param retention: share of the experts to keep, in (0, 1]; rounded up to whole routing groups.
    :param num_experts: experts to keep per layer, instead of `retention`.
    :param ignore: regexes of MoE layer names to leave alone. All layers must keep equally many experts,
        so this is refused unless nothing would be pruned in the others.
    """

    requires_calibration_data: bool = True

    alpha: float = Field(0.5, ge=0, le=1)
    retention: float | None = Field(None, gt=0, le=1)
    num_experts: int | None = Field(None, ge=1)
    ignore: list[str] = Field(default_factory=list)

    _moe: MoEModel | None = PrivateAttr(None)
    _num_kept: int = PrivateAttr(0)
    _statistics: dict[str, RouterStatistics] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _one_size(self) -> ExpertPruningModifier:
        if (self.retention is None) == (self.num_experts is None):
            raise ValueError("ExpertPruningModifier needs exactly one of `retention` and `num_experts`")
        return self

    def on_initialize(self, state: State, **kwargs) -> bool:
        """Check the recipe against the model before any data is read."""
        check_unquantized(state.model, "ExpertPruningModifier")
        self._moe = describe(state.model, self.ignore)
        self._num_kept = target_num_experts(self._moe, self.retention, self.num_experts)
        everything = len(describe(state.model).layers)
        if self._num_kept < self._moe.num_experts and len(self._moe.layers) < everything:
            raise ValueError(
                "ExpertPruningModifier.ignore: config.json has one expert count for all layers, so some layers "
                "cannot keep all their experts while others are pruned. Remove `ignore`."
            )
        install_save(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs) -> None:
        """Watch every router's decisions."""
        assert self._moe is not None
        if self._num_kept == self._moe.num_experts:
            logger.info("ExpertPruningModifier: all {} experts are kept, nothing to do", self._num_kept)
            return
        for layer in self._moe.layers:
            self._statistics[layer.name] = RouterStatistics(layer.num_experts)
            self.register_hook(layer.router, partial(self._observe, layer.name), "forward")

    def _observe(self, name: str, _module: torch.nn.Module, _args: tuple, output: tuple) -> None:
        _logits, weights, indices = output
        assert self._moe is not None
        self._statistics[name].update(weights, indices, self._moe.routed_scaling_factor)

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list | None = None, **kwargs) -> None:
        """Prune the layers whose statistics are complete, before their outputs are propagated."""
        done = {id(module) for module in modules or ()}
        for layer in self._moe.layers if self._moe else ():
            if id(layer.router) in done:
                self._prune(layer)

    def on_calibration_end(self, state: State, event: Event, **kwargs) -> None:
        """Prune what a pipeline without layer-by-layer events has left."""
        self.remove_hooks()
        for layer in self._moe.layers if self._moe else ():
            self._prune(layer)

    def _prune(self, layer: MoELayer) -> None:
        statistics = self._statistics.pop(layer.name, None)
        if statistics is None:
            return
        assert self._moe is not None
        statistics.check_finite(layer.name)
        kept = kept_experts(importance(statistics, self.alpha), self._num_kept, self._moe.n_group)
        keep_experts(layer, kept)
        logger.info("{}: kept experts {}", layer.name, kept)
