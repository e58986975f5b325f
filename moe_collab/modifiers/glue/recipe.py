"""The recipe around a modifier, and the state in which it finds the model."""

from __future__ import annotations

import re
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading, get_offloaded_device
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.core import active_session
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin

from ...allocation.patterns import nothing_matches
from ...errors import MoeCollabError
from ...moe_model import describe

__all__ = [
    "check_layer_patterns",
    "check_unquantized",
    "is_on_disk",
    "modifier_after",
    "modifiers_of_this_pass",
    "quantizers_after",
    "quantizers_before",
    "rounds_to_nearest",
    "starves_experts",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def modifiers_of_this_pass() -> list[Modifier]:
    """All modifiers of the recipe, in order; during a calibration pass, only those that share the pass."""
    return list(active_session().lifecycle.recipe.modifiers)


def modifier_after(modifier: Modifier) -> Modifier | None:
    """The modifier that comes next in the recipe."""
    return next(iter(modifiers_of_this_pass()[_position(modifier) + 1 :]), None)


def quantizers_after(modifier: Modifier) -> list[Any]:
    """The quantizers that come after `modifier` in the recipe."""
    return _quantizers(modifiers_of_this_pass()[_position(modifier) + 1 :])


def quantizers_before(modifier: Modifier) -> list[Any]:
    """The quantizers that come before `modifier` in the recipe."""
    return _quantizers(modifiers_of_this_pass()[: _position(modifier)])


def _position(modifier: Modifier) -> int:
    return next(i for i, other in enumerate(modifiers_of_this_pass()) if other is modifier)


def _quantizers(modifiers: list[Modifier]) -> list[Any]:
    return [other for other in modifiers if isinstance(other, QuantizationMixin)]


def starves_experts() -> bool:
    """Whether stock quantizers of this run see for each expert only the tokens routed to it, which may be none."""
    return not get_calibrate_all_experts_flag()


def rounds_to_nearest() -> bool:
    """Whether `QuantizationModifier` is in the recipe, which leaves it to compression to round the weights."""
    return any(isinstance(modifier, QuantizationModifier) for modifier in modifiers_of_this_pass())


def is_on_disk(model: torch.nn.Module) -> bool:
    """Whether any of the model's weights are offloaded to disk, where no backward pass reaches them."""
    nowhere = torch.device("meta")  # the answer for modules without parameters
    return any(get_offloaded_device(module, nowhere) == "disk" for module in model.modules())


def check_layer_patterns(model: Any, key: str, patterns: list[str]) -> None:
    """Raise `MoeCollabError` for a regex of recipe field `key` that is found in no MoE layer's name."""
    names = [layer.name for layer in describe(model).layers]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise nothing_matches(key, pattern, names, "matches no MoE layer")


def check_unquantized(model: Any, who: str, schemes: bool = False) -> None:
    """Raise `MoeCollabError` if the model's weights are already quantized (block-fp8, MXFP4, GPTQ, ...).

    With `schemes`, schemes are allowed that a quantizer earlier in the recipe has attached but not yet rounded to.
    """
    found = getattr(model.config, "quantization_config", None)
    method = None
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", "unknown")
    with disable_onloading():  # types are known without reading a model that is on disk
        method = method or _quantized_part(model, schemes)
    if method:
        raise MoeCollabError(
            f"{who}: the model is already quantized ({method}). Start from the full-precision checkpoint, "
            "or dequantize it first with compressed-tensors' convert_checkpoint."
        )


def _quantized_part(model: torch.nn.Module, schemes: bool) -> str | None:
    """What is quantized of the model, and where; None if nothing is."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        waiting = schemes and getattr(module, "quantization_status", None) == QuantizationStatus.INITIALIZED
        if is_module_quantized(module) and not waiting:
            return f"compressed-tensors at {name}"
        if isinstance(weight, torch.Tensor) and weight.dtype not in _FLOATS:
            return f"{weight.dtype} weights at {name}"
    return None
