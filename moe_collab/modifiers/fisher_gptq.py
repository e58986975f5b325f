"""`FisherGPTQModifier`: rounding of routed experts that keeps the model's predictions better than GPTQ does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus, disable_quantization
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import nn

from ..calibration import Calibration, RoundedModel, Workspace
from ..calibration.at_hand import compute_device
from ..calibration.block_lessons import BlockLessons
from ..calibration.block_tuning import tune_blocks
from ..calibration.results import Bookmark
from ..calibration.teacher import Lessons
from ..calibration.tuning import TUNING_COPIES, tune_grids
from ..errors import MoeCollabError
from ..formats import Scheme
from ..moe_model import describe
from ..rounding import Rounder
from .glue.calibration import calibrating, calibration_of, check_calibration, workspace_of
from .glue.lessons import goes_by_blocks, lessons_of
from .glue.packed_weights import write_rounded
from .glue.recipe import check_unquantized
from .glue.saving import install_save
from .glue.weighed_inputs import call_experts_alike

__all__ = ["FisherGPTQModifier"]


class FisherGPTQModifier(Modifier, QuantizationMixin):
    """Round modules to the schemes that were attached to them, by `MixedBitAllocModifier` or by this modifier's fields.

    Its own schemes are given as for GPTQModifier, by `scheme` or `config_groups`. Every token is weighted by the Fisher
    information of the model's predictions, which a backward pass shows, and an expert is rounded by the tokens that are
    really routed to it. Scales are searched and refitted, codes are found by error feedback and then coordinate
    descent, and an expert's down_proj is refitted to make up for its rounded gate_proj and up_proj.

    :param objective: what is kept. `predictions`, as above, takes a forward and a backward pass. `outputs` of experts,
        tokens weighted by the router, take one forward pass, in which each expert is rounded while it is at hand: so a
        plan that exists is carried out in one reading of the model. `weights` are rounded to nearest with searched
        scales, without data.
    :param tuning_steps: steps of Adam after the rounding, which bring the predictions closer to the original model's by
        changing scales and codes; a few hundred steps help most at 2 to 3 bits. All learn together, end to end, if that
        fits in memory (the log says what it takes), else block by block, towards the original model's blocks. Their
        result is kept only if KL on held-out calibration tokens falls.
    :param work: directory in which the run keeps what it has finished, so that it can be killed and started again;
        named by one modifier, or by `moe_collab.oneshot(work=...)`, for all.
    """

    requires_calibration_data: bool = False
    """False because this modifier makes its passes over the data itself, backward passes included."""

    objective: Literal["predictions", "outputs", "weights"] = "predictions"
    tuning_steps: int = Field(0, ge=0)
    work: str | None = None

    _lessons: Lessons | BlockLessons | None = PrivateAttr(None)
    _workspace: Workspace | None = PrivateAttr(None)
    _begun: tuple[Calibration, RoundedModel] | None = PrivateAttr(None)

    def go_on_with(self, calibration: Calibration, rounded: RoundedModel) -> None:
        """Round by samples that were taken of the model as this modifier will find it, and keep what is rounded."""
        self._begun = calibration, rounded

    def learn_from_present(self, state: State) -> None:
        """Let tuning aim at the model as it is now, not as this modifier will find it."""
        if not self.tuning_steps:
            return
        self._workspace = workspace = workspace_of(state, self, "lessons")
        if workspace.results.noted("tuned") is None:  # else an earlier process has tuned
            blocks = goes_by_blocks(state, workspace, "FisherGPTQModifier", TUNING_COPIES)
            self._lessons = lessons_of(state, workspace, blocks)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check data and model; attach this modifier's own schemes, if it has any."""
        check_unquantized(state.model, "FisherGPTQModifier")
        check_calibration(state, self, self._needs_data())
        call_experts_alike(describe(state.model))
        if self.has_config():
            self.initialize_quantization(state.model)
        _check_schemes(state.model)
        install_save(state.model)
        return True

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Round every module that has a scheme, layer by layer."""
        model: Any = state.model
        # An earlier modifier's pass may have left quantization on, with scales that nobody has set yet.
        model.apply(disable_quantization)
        _check_schemes(model)
        schemes = {name: _scheme_of(module) for name, module in model.named_modules() if _has_scheme(module)}
        if not schemes:
            raise MoeCollabError(
                "FisherGPTQModifier: no module has a scheme. Put MixedBitAllocModifier before it, or give it "
                "`config_groups` or `scheme`."
            )
        calibration, rounded = self._begun or self._begin(state, schemes)
        with calibrating(state):
            names = self._rounding(rounded)(schemes)
            if self._workspace is None:
                self.learn_from_present(state)
            if self._workspace is not None:
                self._tune(calibration, rounded, names, self._workspace)
        for name in names:
            write_rounded(model.get_submodule(name), rounded[name])
        calibration.close()
        self.end_calibration(model)
        for name in names:  # what `ignore` names was rounded too, if MixedBitAllocModifier gave it a scheme
            model.get_submodule(name).quantization_status = QuantizationStatus.FROZEN
        self._lessons = self._begun = self._workspace = None
        logger.info("FisherGPTQModifier: rounded {} tensors", len(names))

    def _rounding(self, rounded: RoundedModel) -> Callable[[Mapping[str, Scheme]], list[str]]:
        ways = {"outputs": rounded.round_in_one_pass, "weights": rounded.round_to_nearest}
        return ways.get(self.objective, rounded.round)

    def _needs_data(self) -> bool:
        return self.objective != "weights" or self.tuning_steps > 0

    def _begin(self, state: State, schemes: Mapping[str, Scheme]) -> tuple[Calibration, RoundedModel]:
        calibration = calibration_of(state, self, needs_data=self._needs_data())
        sizes = ((calibration.model.get_submodule(name), scheme.num_bits) for name, scheme in schemes.items())
        calibration.later = int(sum(linear.in_features * linear.out_features * bits / 8 for linear, bits in sizes))
        return calibration, RoundedModel(calibration, Rounder(scale_dtype=calibration.model.dtype))

    def _tune(self, calibration: Calibration, rounded: RoundedModel, names: list[str], workspace: Workspace) -> None:
        """Tune the modules `names` of `rounded`, unless an earlier process has."""
        bookmark = Bookmark(workspace.results, "tuning")
        if self._lessons is not None:
            workspace.results.note("tuned", self._tuned(calibration, rounded, names, self._lessons, bookmark))
        bookmark.remove()
        before, after = workspace.results.noted("tuned")
        if after < before:
            rounded.take_replaced(names)
        workspace.close()
        logger.info(
            "FisherGPTQModifier: {} steps of tuning brought KL on held-out tokens from {:.4f} to {:.4f}{}",
            self.tuning_steps,
            before,
            after,
            "" if after < before else "; nothing is changed",
        )

    def _tuned(
        self,
        calibration: Calibration,
        rounded: RoundedModel,
        names: list[str],
        lessons: Lessons | BlockLessons,
        bookmark: Bookmark,
    ) -> tuple[float, float]:
        """KL on held-out tokens before and after tuning, nats each; if it has fallen, the modules are replaced."""
        model, moe, steps = calibration.model, calibration.moe, self.tuning_steps
        if isinstance(lessons, BlockLessons):
            return tune_blocks(model, moe, lessons, rounded, names, steps)
        grids = {name: rounded[name].grid(compute_device()) for name in names}
        tuned, before, after = tune_grids(model, grids, lessons, steps, model.dtype, bookmark)
        for name, grid in tuned.items():
            rounded.replace(name, grid)
        return before, after


def _has_scheme(module: nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return scheme is not None and scheme.weights is not None


def _check_schemes(model: nn.Module) -> None:
    """Raise `MoeCollabError` naming a module whose scheme this modifier cannot round to."""
    routers = [layer.router for layer in describe(model).layers]
    for name, module in model.named_modules():
        if not _has_scheme(module):
            continue
        if any(module is router for router in routers) and type(module).forward is not nn.Linear.forward:
            raise MoeCollabError(f"{name}: FisherGPTQModifier rounds no router; name it in `ignore`.")
        scheme, weights = module.quantization_scheme, module.quantization_scheme.weights
        kind, strategy = (str(getattr(value, "value", value)) for value in (weights.type, weights.strategy))
        weight_only = isinstance(module, nn.Linear) and scheme.input_activations is None
        if not (weight_only and kind == "int" and strategy in ("group", "channel") and 2 <= weights.num_bits <= 8):
            raise MoeCollabError(
                f"{name}: FisherGPTQModifier rounds weights of Linears to integers of 2 to 8 bits, in groups or per "
                f"channel; its scheme asks for {weights.num_bits}-bit {kind}, strategy {strategy}, or for "
                "activations. Use GPTQModifier or QuantizationModifier for it."
            )
        group = weights.group_size or -1
        if group > 0 and module.in_features % group:
            raise MoeCollabError(
                f"{name}: its {module.in_features} columns cannot be divided into groups of {group}. Take it out of "
                "`targets`, or give it another group size."
            )


def _scheme_of(module: nn.Module) -> Scheme:
    described: QuantizationScheme = module.quantization_scheme
    weights = described.weights
    return Scheme.described(weights.num_bits, weights.group_size, weights.symmetric, described.format)
