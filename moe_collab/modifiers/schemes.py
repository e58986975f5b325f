"""From a number of bits to what llm-compressor needs to round a module at it, and to try that out."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    disable_quantization,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.utils import update_offload_parameter
from llmcompressor.observers import Observer

__all__ = ["attach_scheme", "is_sound", "round_in_place", "rounded", "weight_arguments"]


def weight_arguments(num_bits: int, group_size: int, symmetric: bool) -> QuantizationArgs:
    """Weight-only integers with MSE-searched scales: what GPTQ does best with; `group_size` -1 = per channel."""
    return QuantizationArgs(
        num_bits=num_bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
        actorder="static",
        observer="memoryless_mse",
    )


def attach_scheme(module: torch.nn.Linear, arguments: QuantizationArgs) -> None:
    """Give `module` the scheme that the next quantizer in the recipe will round it with."""
    # The saved targets are written anew from the modules themselves, so one name for all will do here.
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
    initialize_module_for_quantization(module, scheme)
    disable_quantization(module)


@torch.no_grad()
def _search(weight: torch.Tensor, arguments: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor | None]:
    observer = Observer.load_from_registry(arguments.observer, base_name="weight", args=arguments)
    observer(weight)
    found = observer.get_qparams()
    return found["scale"].to(weight.dtype), found["zero_point"]


@torch.no_grad()
def rounded(weight: torch.Tensor, arguments: QuantizationArgs) -> torch.Tensor:
    """`weight` [out, in] rounded to nearest with searched scales, in its own dtype."""
    scale, zero_point = _search(weight, arguments)
    return fake_quantize(weight, scale, zero_point, arguments)


@torch.no_grad()
def round_in_place(module: torch.nn.Linear, weight: torch.Tensor) -> None:
    """Round `weight` to nearest into `module`, whose scheme is attached: weight, scales and zero points."""
    arguments = module.quantization_scheme.weights
    scale, zero_point = _search(weight, arguments)
    update_offload_parameter(module, "weight", fake_quantize(weight, scale, zero_point, arguments))
    update_offload_parameter(module, "weight_scale", scale)
    if zero_point is not None and hasattr(module, "weight_zero_point"):
        update_offload_parameter(module, "weight_zero_point", zero_point.to(module.weight_zero_point.dtype))


@torch.no_grad()
def is_sound(module: torch.nn.Linear) -> bool:
    """Whether a quantizer left `module` finite, not all zero, and on the grid of its scales."""
    weight, scale = module.weight, module.weight_scale
    if not (torch.isfinite(weight).all() and torch.isfinite(scale).all() and weight.any() and (scale != 0).all()):
        return False
    arguments = module.quantization_scheme.weights
    again = fake_quantize(weight, scale, getattr(module, "weight_zero_point", None), arguments)
    if arguments.num_bits < 7:
        return torch.equal(again, weight)
    # Codes of 7 and 8 bits divide out one step off in bfloat16, here as in compressed-tensors' own packing.
    steps = (again - weight).float().reshape(*scale.shape, -1).abs() / scale.float().abs()[..., None]
    return bool((steps <= 1.5).all())
