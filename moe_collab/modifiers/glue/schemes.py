"""From a `Scheme` to what llm-compressor needs to round a module to it, and rounding to nearest with that."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    disable_quantization,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from llmcompressor.observers import Observer

from ...checkpoint.ternary_packed import ternary_codes
from ...distributed import store
from ...errors import MoeCollabError
from ...formats import TERNARY, TERNARY_PACKED, Scheme

__all__ = [
    "attach_scheme",
    "codes_of",
    "forget_empty_schemes",
    "is_rounded",
    "is_sound",
    "is_ternary",
    "round_in_place",
    "rounded",
    "snap_to_grid",
    "weight_arguments",
]


def weight_arguments(num_bits: int, group_size: int, symmetric: bool) -> QuantizationArgs:
    """Weight-only integers with MSE-searched scales: what GPTQ does best with; `group_size` -1 = per channel.

    `num_bits` `TERNARY` is described as 2 bits, symmetric: the scheme's format tells it apart.
    """
    ternary = num_bits == TERNARY
    return QuantizationArgs(
        num_bits=2 if ternary else num_bits,
        type="int",
        symmetric=symmetric or ternary,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
        actorder="static",
        observer="memoryless_mse",
    )


def attach_scheme(module: Any, scheme: Scheme) -> None:
    """Give `module` the scheme that the next quantizer in the recipe will round it with; it must be packed.

    The weight of a ternary module must lie on its scales times -1, 0, 1 when it is saved.
    """
    if not scheme.is_packed:
        raise MoeCollabError(f"{scheme} has no codes and scales to attach.")
    # The saved targets are written anew from the modules themselves, so one name for all will do here.
    described = QuantizationScheme(
        targets=["Linear"],
        weights=weight_arguments(*scheme),
        format=TERNARY_PACKED if scheme.num_bits == TERNARY else "pack-quantized",
    )
    initialize_module_for_quantization(module, described)
    disable_quantization(module)


def forget_empty_schemes(model: torch.nn.Module) -> None:
    """Remove schemes that round neither weights nor activations.

    Quantizers without a scheme of their own attach them, and AWQModifier fails where it finds them.
    """
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is None and scheme.input_activations is None:
            del module.quantization_scheme


@torch.no_grad()
def _observed_scales(weight: torch.Tensor, arguments: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor | None]:
    observer = Observer.load_from_registry(arguments.observer, base_name="weight", args=arguments)
    observer(weight)
    found = observer.get_qparams()
    return found["scale"].to(weight.dtype), found["zero_point"]


@torch.no_grad()
def rounded(weight: torch.Tensor, arguments: QuantizationArgs) -> torch.Tensor:
    """`weight` [out, in] rounded to nearest with searched scales, in its own dtype."""
    scale, zero_point = _observed_scales(weight, arguments)
    return fake_quantize(weight, scale, zero_point, arguments)


@torch.no_grad()
def round_in_place(module: Any, weight: torch.Tensor) -> None:
    """Round `weight` to nearest into `module`, whose scheme is attached: weight, scales and zero points."""
    arguments = module.quantization_scheme.weights
    scale, zero_point = _observed_scales(weight, arguments)
    store(module, "weight", fake_quantize(weight, scale, zero_point, arguments))
    store(module, "weight_scale", scale)
    if zero_point is not None and hasattr(module, "weight_zero_point"):
        store(module, "weight_zero_point", zero_point.to(module.weight_zero_point.dtype))


@torch.no_grad()
def snap_to_grid(module: Any) -> None:
    """Round the module's weight onto the grid of its scales; quantizers to nearest leave that step to compression."""
    zero_point = getattr(module, "weight_zero_point", None)
    snapped = fake_quantize(module.weight, module.weight_scale, zero_point, module.quantization_scheme.weights)
    store(module, "weight", snapped)


def is_rounded(module: torch.nn.Module) -> bool:
    """Whether a quantizer has been at `module`, so that its scales are more than the memory they were made in."""
    scheme = getattr(module, "quantization_scheme", None)
    waiting = getattr(module, "quantization_status", None) == QuantizationStatus.INITIALIZED
    return scheme is not None and scheme.weights is not None and not waiting and hasattr(module, "weight_scale")


@torch.no_grad()
def is_sound(module: Any) -> bool:
    """Whether a quantizer left `module` finite, not all zero, and on the grid of its scales."""
    weight, scale = module.weight, module.weight_scale
    if not (torch.isfinite(weight).all() and torch.isfinite(scale).all() and weight.any() and (scale != 0).all()):
        return False
    arguments = module.quantization_scheme.weights
    if is_ternary(module.quantization_scheme):
        return _lies_on_ternary(weight, scale)
    again = fake_quantize(weight, scale, getattr(module, "weight_zero_point", None), arguments)
    if arguments.num_bits < 7:
        return torch.equal(again, weight)
    # Codes of 7 and 8 bits divide out one step off in bfloat16, here as in compressed-tensors' own packing.
    steps = (again - weight).float().reshape(*scale.shape, -1).abs() / scale.float().abs()[..., None]
    return bool((steps <= 1.5).all())


def _lies_on_ternary(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    try:
        ternary_codes(weight, scale)
    except MoeCollabError:
        return False
    return True


def is_ternary(scheme: QuantizationScheme) -> bool:
    """Whether modules of `scheme` are stored `ternary-packed`."""
    return scheme.format == TERNARY_PACKED


@torch.no_grad()
def codes_of(module: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes int8 [rows, columns], scale, zero point or None) of a quantized module, as they will be stored."""
    scheme, scale = module.quantization_scheme, module.weight_scale
    arguments = scheme.weights
    if is_ternary(scheme):
        return ternary_codes(module.weight, scale), scale, None
    zero_point = None if arguments.symmetric else module.weight_zero_point
    return quantize(module.weight, scale, zero_point, arguments, dtype=torch.int8), scale, zero_point
