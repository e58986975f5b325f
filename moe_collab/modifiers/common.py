"""What every modifier needs: the recipe around it, its checks, and the model's state of quantization."""

from __future__ import annotations

import torch
from compressed_tensors.offload import get_execution_device, get_offloaded_device
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin

from ..calibration import inputs_of
from ..errors import MoeCollabError
from .distributed import everyones

__all__ = [
    "calibration_batches",
    "check_data",
    "check_unquantized",
    "following_quantizers",
    "is_on_disk",
    "modifiers_of_this_pass",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def modifiers_of_this_pass() -> list[Modifier]:
    """The recipe's modifiers, in order; within a calibration pass, those that share the pass."""
    return list(active_session().lifecycle.recipe.modifiers)


def following_quantizers(modifier: Modifier) -> list[Modifier]:
    """The quantizers that come after `modifier` in the recipe."""
    modifiers = modifiers_of_this_pass()
    position = next((i for i, other in enumerate(modifiers) if other is modifier), -1)
    return [other for other in modifiers[position + 1 :] if isinstance(other, QuantizationMixin)]


def check_data(state: State, who: str) -> None:
    """Raise `MoeCollabError` if oneshot() was given no calibration data."""
    if state.data is None or state.data.calib is None:
        raise MoeCollabError(f"{who}: it needs calibration data. Give oneshot() a dataset.")


def calibration_batches(state: State) -> list[dict[str, torch.Tensor]]:
    """What the model is called with for each calibration batch, of all processes."""
    device = get_execution_device(state.model.get_input_embeddings())
    batches = everyones([inputs_of(batch, torch.device("cpu")) for batch in state.data.calib])
    return [inputs_of(batch, device) for batch in batches]


def is_on_disk(model: torch.nn.Module) -> bool:
    """Whether any of the model's weights are offloaded to disk, where no backward pass reaches them."""
    nowhere = torch.device("meta")  # of modules without parameters
    return any(get_offloaded_device(module, nowhere) == "disk" for module in model.modules())


def check_unquantized(model: torch.nn.Module, who: str, schemes: bool = False) -> None:
    """Raise `MoeCollabError` if the model's weights are already quantized (block-fp8, MXFP4, GPTQ, ...).

    With `schemes`, those that a quantizer earlier in the recipe has attached, but not yet rounded to, are welcome.
    """
    found = getattr(model.config, "quantization_config", None)
    method = None
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", "unknown")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        waiting = schemes and getattr(module, "quantization_status", None) == QuantizationStatus.INITIALIZED
        if is_module_quantized(module) and not waiting:
            method = method or f"compressed-tensors at {name}"
        elif isinstance(weight, torch.Tensor) and weight.dtype not in _FLOATS:
            method = method or f"{weight.dtype} weights at {name}"
        if method:
            raise MoeCollabError(
                f"{who}: the model is already quantized ({method}). Start from the full-precision checkpoint, "
                "or dequantize it first with compressed-tensors' convert_checkpoint."
            )
