"""`RouterCalibrationModifier`: small tensors learn to make up for what pruning and rounding did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from compressed_tensors.quantization import disable_quantization, enable_quantization
from compressed_tensors.quantization.lifecycle.forward import dequantize
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator
from torch import nn

from ..calibration import Workspace, float32_weights, held_out
from ..calibration.block_lessons import BlockLessons
from ..calibration.fit import one_block
from ..calibration.learning import LEARNING_COPIES, learn_blocks, learn_predictions, take_values, values_of
from ..calibration.results import Bookmark, Results
from ..calibration.small_tensors import Factors, SmallTensor, Whole, as_stored
from ..calibration.teacher import Lessons, kl_of
from ..distributed import agreed, store
from ..errors import MoeCollabError
from ..moe_model import MoEModel, describe
from .glue.calibration import calibrating, check_calibration, workspace_of
from .glue.data import calibration_batches
from .glue.lessons import goes_by_blocks, lessons_of
from .glue.recipe import check_unquantized, quantizers_before
from .glue.saving import install_save
from .glue.schemes import codes_of, is_rounded
from .glue.starved import counted_tokens, keep_starved, repair_starved
from .glue.weighed_inputs import call_experts_alike

__all__ = ["RouterCalibrationModifier"]

Target = Literal["router", "norms", "gains", "scales"]

_PACES: dict[Target, float] = {"router": 1e-2, "norms": 5e-3, "gains": 1e-2, "scales": 6e-3}
"""Learning rate of each target, found on the fixtures; the rates that are tried are multiples of these."""
_ALIKE = 1e-6
"""KL in nats per token below which two models count as predicting the same."""


class RouterCalibrationModifier(Modifier):
    """Tune small tensors so that the model predicts on calibration tokens what it predicted before the recipe.

    Put it last: after pruning, and at 2 to 3 bits after the quantizer. Matrices keep their weights, or their codes if
    they are quantized, but for the factors below. The learning rate is searched on held-out tokens, which also end the
    learning early; the result is stored only if, rounded as it will be stored, it lowers KL on them.

    :param targets: what learns: `router` weights; `norms`; `gains`, one factor per output channel of the routed
        experts' matrices, multiplied into their weights, or into the scales of a quantized one; `scales` of quantized
        Linears, one factor per scale, which takes the place of gains there.
    :param objective: `predictions`: KL of the model's predictions, end to end; `blocks`: error of each block's output,
        weighted with the Fisher information, one block after the other, one in memory; `auto`: `predictions` if that
        fits in memory, else `blocks`. The log says which, what `predictions` takes, and what is free.
    :param steps: steps of Adam, on 16 sequences each; before them, each of three learning rates is tried for a quarter
        as many.
    :param work: directory in which the run keeps what it has finished, so that it can be killed and started again;
        named by one modifier, or by `moe_collab.oneshot(work=...)`, for all.
    """

    requires_calibration_data: bool = False
    """False because this modifier makes its passes over the data itself, backward passes included."""

    targets: list[Target] = Field(default_factory=lambda: list(_PACES), min_length=1)
    objective: Literal["auto", "predictions", "blocks"] = "auto"
    steps: int = Field(200, ge=1)
    work: str | None = None

    _lessons: Lessons | BlockLessons | None = PrivateAttr(None)
    _workspace: Workspace | None = PrivateAttr(None)

    @field_validator("targets")
    @classmethod
    def _once(cls, value: list[Target]) -> list[Target]:
        return list(dict.fromkeys(value))

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the recipe, and record what the original model predicts before anything changes it."""
        model: Any = state.model
        check_unquantized(model, "RouterCalibrationModifier", schemes=True)
        check_calibration(state, self)
        moe = describe(model)
        batches = calibration_batches(state)
        if len(batches) < 2:
            raise MoeCollabError(
                "RouterCalibrationModifier: it needs two batches of calibration data, one of them to judge the other."
            )
        call_experts_alike(moe)
        install_save(model)
        self._workspace = workspace = workspace_of(state, self, "lessons")
        blocks = goes_by_blocks(state, workspace, "RouterCalibrationModifier", LEARNING_COPIES, self.objective)
        if blocks:
            fit = one_block(model, moe, batches, LEARNING_COPIES)
            logger.log("INFO" if fit.enough else "WARNING", "RouterCalibrationModifier: one block {}", fit)
        if workspace.results.noted("calibrated") is None:  # else an earlier process has learned
            with _quantization_off(model), counted_tokens(moe, len(held_out(batches)[0])) as routed_tokens:
                self._lessons = lessons_of(state, workspace, blocks)
            if isinstance(self._lessons, BlockLessons):
                routed_tokens = self._lessons.routed_tokens
            workspace.results.note("routed", routed_tokens)
        if quantizers_before(self):  # they may zero experts
            keep_starved(moe, workspace.results.noted("routed"))
        return True

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Tune the small tensors, and store them if that lowers KL on held-out tokens."""
        model: Any = state.model
        assert self._workspace is not None
        with calibrating(state), _quantization_off(model):
            repair_starved(model, snap=True)
            self._calibrate(model, describe(model), self._workspace.results)
        self._workspace.close()
        self._workspace = self._lessons = None

    def _calibrate(self, model: Any, moe: MoEModel, results: Results) -> None:
        tensors, bookmark = self._tensors(model, moe), Bookmark(results, "learning")
        if self._lessons is not None:
            kl = self._learned(model, moe, tensors, self._lessons, bookmark)
            results.put("learned", values_of(tensors))
            results.note("calibrated", kl)
        bookmark.remove()
        before, after = results.noted("calibrated")
        logger.info(
            "RouterCalibrationModifier: KL on held-out tokens from {:.4f} to {:.4f}{}",
            before,
            after,
            "" if after < before else "; nothing is changed",
        )
        if agreed(after < before):
            take_values(tensors, results.kept("learned"))
            for tensor in tensors.values():
                for name, value in tensor.stored().items():
                    store(tensor.module, name, value)

    def _learned(
        self,
        model: Any,
        moe: MoEModel,
        tensors: Mapping[str, SmallTensor],
        lessons: Lessons | BlockLessons,
        bookmark: Bookmark,
    ) -> tuple[float, float]:
        """KL on held-out tokens, nats each, before and after `tensors` have learned."""
        if isinstance(lessons, BlockLessons):
            before = lessons.results.number("before", partial(lessons.kl_of, model, moe))
        else:
            before = _kl(model, lessons)
        if before < _ALIKE:
            logger.info("RouterCalibrationModifier: the model predicts what it did before; nothing to do")
            return before, before
        if isinstance(lessons, BlockLessons):
            learned, after = learn_blocks(model, moe, tensors, lessons, self.steps)
            for name, found in learned.items():
                logger.info("{}: error of its output from {:.5f} to {:.5f} nats", name, found.before, found.after)
            return before, after
        found = learn_predictions(model, list(tensors.values()), lessons, self.steps, bookmark)
        logger.info("RouterCalibrationModifier: best at {} times the usual rates, step {}", found.rate, found.steps)
        with as_stored(tensors.values()):
            return before, _kl(model, lessons)

    def _tensors(self, model: Any, moe: MoEModel) -> dict[str, SmallTensor]:
        """The tensors that learn, by the names of their modules."""
        found: dict[str, SmallTensor] = {}
        names = {module: name for name, module in model.named_modules()}
        if "router" in self.targets:
            found |= {names[layer.router]: Whole(layer.router, _PACES["router"]) for layer in moe.layers}
        if "norms" in self.targets:
            found |= {name: Whole(module, _PACES["norms"]) for module, name in names.items() if _is_norm(module)}
        if "gains" in self.targets:
            experts = [layer.expert(index) for layer in moe.layers for index in layer.live_experts]
            for module in (module for expert in experts for module in expert.modules()):
                if isinstance(module, nn.Linear) and (_has_scales(module) or not _is_quantized(module)):
                    kind = Scales if _has_scales(module) else Factors
                    found[names[module]] = kind(module, 1, _PACES["gains"])
        if "scales" in self.targets:
            for name, module in _quantized(model).items():
                if _has_scales(module) and module is not model.get_output_embeddings():
                    found[name] = Scales(module, module.weight_scale.shape[1], _PACES["scales"])
        return found


class Scales(Factors):
    """A quantized Linear that learns a factor for each of its scales [rows, groups], or for each row [rows, 1]."""

    def __init__(self, module: Any, groups: int, pace: float) -> None:
        super().__init__(module, groups, pace)
        self._scale_dtype = module.weight_scale.dtype

    def stored(self) -> dict[str, torch.Tensor]:
        """As `SmallTensor.stored`; codes and zero points do not change."""
        codes, scale, zero_point = codes_of(self.module)
        scale = (scale.float() * self.learned.detach()).to(self._scale_dtype)
        module: Any = self.module
        weight = dequantize(codes, scale, zero_point, module.quantization_scheme.weights)
        return {"weight": weight.to(self._dtype), "weight_scale": scale}


@torch.no_grad()
def _kl(model: Any, lessons: Lessons) -> float:
    """KL(lessons || model) on held-out tokens, nats each."""
    with float32_weights(model):
        return kl_of(model, lessons.head, lessons.unseen)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and isinstance(weight, torch.Tensor) and weight.dim() == 1


def _is_quantized(module: Any) -> bool:
    return isinstance(module, nn.Linear) and is_rounded(module)


def _has_scales(module: Any) -> bool:
    """Whether `module` is quantized so that its scales can learn.

    Not at 7 and 8 bits: there weight / scale does not give the exact codes in bfloat16, and learning would gain little.
    """
    if not _is_quantized(module):
        return False
    weights = module.quantization_scheme.weights
    return weights.type == "int" and weights.strategy in ("group", "channel") and weights.num_bits < 7


def _quantized(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if _is_quantized(module)}


@contextmanager
def _quantization_off(model: nn.Module) -> Iterator[None]:
    """Within the block no module rounds anything: weights are used as they are, and activations as they come."""
    enabled = [module for module in model.modules() if getattr(module, "quantization_enabled", False)]
    model.apply(disable_quantization)
    try:
        yield
    finally:
        for module in enabled:
            enable_quantization(module)
