"""Move per-channel scales from one weight to the next, which evens out weights and activations and leaves the model's
outputs as they are; and check that a norm and its readers, the modules that its output reaches, allow that exactly.

Scales are powers of two, so that float32 and bfloat16 models stay the same bit for bit; in float16 weights that
become subnormal lose bits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from llmcompressor.modeling.offset_norm import NormCalibrationModule
from torch import nn

from ...distributed import store
from ...errors import MoeCollabError
from ...moe_model import MoELayer, MoEModel
from .starved import rescaled

__all__ = [
    "Rescaling",
    "multiplies_by_weight",
    "norm_and_readers",
    "rescale_norm",
    "rescale_outputs",
    "rescale_up_down",
    "smoothing_scale",
]


@dataclass(frozen=True)
class Rescaling:
    """A change to make: multiply one parameter of `module` by `factor`, a number or powers of two that broadcast."""

    module: nn.Module
    parameter: str
    factor: torch.Tensor | float

    @torch.no_grad()
    def apply(self) -> None:
        """Make the change, also if the module is offloaded, and also to a copy that `starved` keeps of its weight."""
        value = getattr(self.module, self.parameter)
        factor = self.factor.to(value) if isinstance(self.factor, torch.Tensor) else self.factor
        store(self.module, self.parameter, value * factor)
        if self.parameter == "weight":
            rescaled(self.module, factor)


def smoothing_scale(activations: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """Powers of two near activations^strength / weights^(1 - strength), float32 [channels], geometric mean near 1.

    `activations` and `weights` [channels] are each channel's largest magnitudes (SmoothQuant, arXiv 2211.10438, eq. 4).
    """
    exponent = strength * activations.to(weights.device).float().clamp_min(1e-5).log2()
    exponent -= (1 - strength) * weights.float().clamp_min(1e-5).log2()
    # 2^8 either way is more than any channel gains.
    return torch.exp2((exponent - exponent.mean()).round().clamp(-8, 8))


def rescale_up_down(expert: nn.Module, activations: torch.Tensor, strength: float) -> Iterable[Rescaling]:
    """Divide the rows of `up_proj` and multiply the columns of `down_proj` by one scale per channel.

    `activations` [intermediate] are the largest magnitudes of each channel at the input of `down_proj`.
    """
    up, down = expert.up_proj, expert.down_proj
    assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    scale = smoothing_scale(activations, down.weight.detach().abs().amax(0), strength)
    yield Rescaling(up, "weight", 1 / scale[:, None])
    if up.bias is not None:
        yield Rescaling(up, "bias", 1 / scale)
    yield Rescaling(down, "weight", scale)


def rescale_norm(
    model: nn.Module, moe: MoEModel, layer: MoELayer, activations: torch.Tensor, strength: float
) -> Iterable[Rescaling]:
    """Divide the weight of the norm before a MoE block, and multiply the columns of every weight that reads its output.

    `activations` [hidden] are the largest magnitudes of each channel at the norm's output.
    """
    norm, readers = norm_and_readers(model, moe, layer)
    matrices = [module for *_, name, module in layer.projections() if name != "down_proj"]
    columns = torch.stack([module.weight.detach().abs().amax(0) for module in matrices]).amax(0)
    scale = smoothing_scale(activations, columns, strength)
    yield Rescaling(norm, "weight", 1 / scale)
    for reader in readers:
        yield Rescaling(reader, "weight", scale)


def rescale_outputs(layer: MoELayer, factor: float) -> Iterable[Rescaling]:
    """Multiply the outputs of all routed experts of a layer by `factor`."""
    for index in layer.live_experts:
        down = layer.expert(index).down_proj
        assert isinstance(down, nn.Linear)
        yield Rescaling(down, "weight", factor)
        if down.bias is not None:
            yield Rescaling(down, "bias", factor)


def multiplies_by_weight(norm: nn.Module) -> bool:
    """Whether half the norm's weight halves its output: not if it multiplies by 1 + weight, or adds a bias.

    llm-compressor puts another norm in the place of one with 1 + weight until oneshot() ends; taking the 1 off again
    rounds, the more the smaller the weight has become.
    """
    if isinstance(norm, NormCalibrationModule):
        return False
    weight = norm.weight.detach()  # type: ignore[union-attr, operator]
    inputs = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)[None]

    def output(factor: float) -> torch.Tensor:
        probe = copy.copy(norm)
        own = dict(norm._parameters.items()) | {"weight": nn.Parameter(weight * factor, requires_grad=False)}
        probe.__dict__["_parameters"] = own
        return type(norm).forward(probe, inputs)

    with torch.no_grad():
        return torch.equal(output(0.5), 0.5 * output(1))


def norm_and_readers(model: nn.Module, moe: MoEModel, layer: MoELayer) -> tuple[nn.Module, list[nn.Module]]:
    """The norm before a MoE block, and every module of the block whose weight [rows, hidden] multiplies its output:
    router, gate_proj and up_proj of routed and shared experts, the shared expert's gate.

    Raises `MoeCollabError` where a scale cannot be moved between them exactly.
    """
    norm = getattr(model.get_submodule(layer.name.rpartition(".")[0]), moe.family.norm, None)
    if norm is None or not multiplies_by_weight(norm):
        raise MoeCollabError(
            f"ActivationSmoothModifier.norm_strength: the block {layer.name} has no {moe.family.norm} before it that "
            "multiplies by its weight (Gemma's and Qwen3-Next's multiply by 1 + weight), so no scale can be moved out "
            "of it exactly. Leave norm_strength out."
        )
    readers = []
    for name, module in layer.block.named_modules():
        kind = name.rpartition(".")[2]
        if kind == "down_proj" or not any(True for _ in module.parameters(recurse=False)):
            continue
        if module is not layer.router and kind not in ("gate_proj", "up_proj", "shared_expert_gate"):
            raise MoeCollabError(
                f"ActivationSmoothModifier.norm_strength: {layer.name}.{name} is no part of a MoE block that "
                "moe-collab knows; it may read the norm too. Leave norm_strength out."
            )
        readers.append(module)
    return norm, readers
