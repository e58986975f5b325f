"""`FisherGPTQModifier`: rounding of routed experts that better keeps the model's predictions than GPTQ does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import get_offloaded_device
from compressed_tensors.quantization import QuantizationScheme, disable_quantization
from compressed_tensors.utils import update_offload_parameter
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.utils.helpers import eval_context
from loguru import logger
from torch import nn

from ..architectures import MoELayer, describe
from ..calibration import capture_layers, float32_weights, inputs_of
from ..calibration.study import ExpertGrids, LayerStudy
from ..errors import MoeCollabError
from ..formats import DENSE, TERNARY, Scheme
from ..rounding import Grid, Rounder
from .common import check_unquantized
from .saving import install_save
from .schemes import is_ternary

__all__ = ["FisherGPTQModifier"]

_NOWHERE = torch.device("meta")
"""Of modules without parameters."""


class FisherGPTQModifier(Modifier, QuantizationMixin):
    """Round at the schemes chosen before, such as `MixedBitAllocModifier`'s, or at its own as GPTQModifier does.

    Tokens weigh by the Fisher information of the model's predictions, seen in one backward pass, and an expert's
    tokens are those really routed to it. Scales are searched and refitted, codes found by error feedback and then
    coordinate descent, and an expert's down_proj makes up for its rounded gate and up. Other Linears with a scheme are
    rounded by the plain second moment of their inputs.
    """

    requires_calibration_data: bool = False
    """The passes it needs, backward ones too, are its own."""

    def on_initialize(self, state: State, **kwargs) -> bool:
        """Check data and model; attach this modifier's own schemes, if it has any."""
        check_unquantized(state.model, "FisherGPTQModifier")
        if state.data is None or state.data.calib is None:
            raise MoeCollabError("FisherGPTQModifier: it needs calibration data. Give oneshot() a dataset.")
        describe(state.model)
        if any(get_offloaded_device(module, _NOWHERE) == "disk" for module in state.model.modules()):
            raise MoeCollabError(
                "FisherGPTQModifier: the model is offloaded to disk, and its backward pass needs all weights at hand. "
                "Load it without offloading, or use GPTQModifier."
            )
        if self.has_config():
            self.initialize_quantization(state.model)
        _check_schemes(state.model)
        install_save(state.model)
        return True

    def on_calibration_end(self, state: State, event: Event, **kwargs) -> None:
        """Round every module that has a scheme, layer by layer."""
        model, moe = state.model, describe(state.model)
        # An earlier modifier's pass may have left it on, with scales that nobody has set yet.
        model.apply(disable_quantization)
        _check_schemes(model)
        schemes = {name: _scheme_of(module) for name, module in model.named_modules() if _has_scheme(module)}
        if not schemes:
            raise MoeCollabError(
                "FisherGPTQModifier: no module has a scheme. Put MixedBitAllocModifier before it, or give it "
                "`config_groups` or `scheme`."
            )
        device = next(model.parameters()).device
        batches = [inputs_of(batch, device) for batch in state.data.calib]
        experts = {name for layer in moe.layers for name, *_ in layer.projections()}
        others = {name: scheme for name, scheme in schemes.items() if name not in experts}
        rounder, found = Rounder(scale_dtype=model.dtype), {}
        with eval_context(model), float32_weights(model):
            if others:
                found |= _round_others(model, others, batches, rounder)
            for layer, samples in capture_layers(model, moe.layers, batches):
                found |= _round_layer(LayerStudy(layer, samples), schemes, rounder)
        for name, grid in found.items():
            _write(model.get_submodule(name), grid)
        self.end_calibration(model)
        logger.info("FisherGPTQModifier: rounded {} tensors", len(found))


def _has_scheme(module: nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return scheme is not None and scheme.weights is not None


def _check_schemes(model: nn.Module) -> None:
    """Raise `MoeCollabError` naming a module whose scheme is not ours to round."""
    for name, module in model.named_modules():
        if not _has_scheme(module):
            continue
        scheme, weights = module.quantization_scheme, module.quantization_scheme.weights
        kind, strategy = (str(getattr(value, "value", value)) for value in (weights.type, weights.strategy))
        weight_only = isinstance(module, nn.Linear) and scheme.input_activations is None
        if not (weight_only and kind == "int" and strategy in ("group", "channel") and 2 <= weights.num_bits <= 8):
            raise MoeCollabError(
                f"{name}: FisherGPTQModifier rounds weights of Linears to integers of 2 to 8 bits, in groups or per "
                f"channel; its scheme asks for {weights.num_bits}-bit {kind}, strategy {strategy}, or for "
                "activations. Use GPTQModifier or QuantizationModifier for it."
            )


def _scheme_of(module: nn.Module) -> Scheme:
    described: QuantizationScheme = module.quantization_scheme
    weights = described.weights
    bits = TERNARY if is_ternary(described) else weights.num_bits
    return Scheme(bits, -1 if weights.group_size in (None, -1) else weights.group_size, bool(weights.symmetric))


def _round_layer(study: LayerStudy, schemes: dict[str, Scheme], rounder: Rounder) -> dict[str, Grid]:
    """Module name -> grid of one layer's experts."""
    layer = study.layer
    wanted = {index: _pair(layer, index, schemes) for index in layer.live_experts}
    if all(pair == (DENSE, DENSE) for pair in wanted.values()):
        return {}
    found: dict[str, Grid] = {}
    for index, grids in study.round_all(rounder, study.moments(), wanted).items():
        found |= _split(f"{layer.experts_name}.{index}", grids)
    unseen = [index for index in layer.live_experts if not study.counts[index]]
    if unseen:
        logger.warning("{}: no calibration token was routed to experts {}", layer.name, unseen)
    return found


def _pair(layer: MoELayer, index: int, schemes: dict[str, Scheme]) -> tuple[Scheme, Scheme]:
    gate, up, down = (
        schemes.get(f"{layer.experts_name}.{index}.{p}", DENSE) for p in ("gate_proj", "up_proj", "down_proj")
    )
    if gate != up:
        raise MoeCollabError(
            f"{layer.experts_name}.{index}: gate_proj is to be {gate}, up_proj {up}; they are one fused matrix and "
            "need one scheme."
        )
    return gate, down


def _split(expert: str, grids: ExpertGrids) -> dict[str, Grid]:
    found = {}
    if grids.gate_up is not None:
        gate, up = (grids.gate_up.reshaped(2).select(half) for half in (0, 1))
        found |= {f"{expert}.gate_proj": gate, f"{expert}.up_proj": up}
    if grids.down is not None:
        found[f"{expert}.down_proj"] = grids.down
    return found


@torch.no_grad()
def _round_others(
    model: Any, schemes: dict[str, Scheme], batches: list[dict[str, torch.Tensor]], rounder: Rounder
) -> dict[str, Grid]:
    """Round Linears outside the experts by the second moment of their inputs."""
    modules = {name: model.get_submodule(name) for name in schemes}
    moments = {name: torch.zeros(m.in_features, m.in_features) for name, m in modules.items()}

    def add(name: str, _module: nn.Module, args: tuple) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).float()
        moments[name].addmm_(rows.T, rows)

    # During calibration llm-compressor replaces the forward of lm_head, so what it would see is added by hand.
    heads = [name for name, module in modules.items() if module is model.get_output_embeddings()]
    handles = [module.register_forward_pre_hook(partial(add, name)) for name, module in modules.items()]
    try:
        for batch in batches:
            hidden = model.base_model(**batch, use_cache=False).last_hidden_state
            for name in heads:
                add(name, modules[name], (hidden,))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, module in modules.items():
        moment = moments[name] + 1e-6 * torch.eye(module.in_features)
        found[name] = rounder(module.weight.detach()[None], moment[None, None], schemes[name])
    return found


@torch.no_grad()
def _write(module: nn.Module, grid: Grid) -> None:
    """Put the rounded weight, its scales and zero points into a module whose scheme is attached."""
    update_offload_parameter(module, "weight", grid.values()[0].to(module.weight.dtype))
    update_offload_parameter(module, "weight_scale", grid.scales[0].to(module.weight_scale.dtype))
    if hasattr(module, "weight_zero_point"):
        update_offload_parameter(module, "weight_zero_point", grid.zeros[0].to(module.weight_zero_point.dtype))
