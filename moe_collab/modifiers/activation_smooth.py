"""`ActivationSmoothModifier`: fewer activated experts, and activations that quantize more easily."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from compressed_tensors.utils import update_offload_parameter
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator

from ..architectures import MoELayer, MoEModel, describe
from ..errors import MoeCollabError
from ..pruning import scaled_top_k
from .common import check_unquantized
from .compat import keep_attention_causal
from .routing import RoutingTap
from .saving import install_save
from .surgery import set_top_k
from .weighed_inputs import call_experts_alike

__all__ = ["ActivationSmoothModifier"]


class ActivationSmoothModifier(Modifier):
    """Adjust how many experts are activated per token, and smooth each expert's `up_proj -> down_proj`.

    Smoothing divides row j of `up_proj` and multiplies column j of `down_proj` by the same
    s_j = max|x_j|^strength / max|W_down,j|^(1 - strength) (SmoothQuant, arXiv 2211.10438, eq. 4), over the
    tokens routed to the expert. s_j is rounded to a power of two, so the model's function is unchanged
    bit for bit in any floating-point format.

    :param num_experts_per_tok: an integer; `scale` = in proportion to the experts that pruning kept, rounded
        half up, at least 1; or `keep`.
    :param strength: smoothing strength in [0, 1]; leave it out for no smoothing.
    :param ignore: regexes of MoE layer names not to smooth.
    """

    requires_calibration_data: bool = True

    num_experts_per_tok: int | Literal["scale", "keep"] = "keep"
    strength: float | None = Field(None, ge=0, le=1)
    ignore: list[str] = Field(default_factory=list)

    _original: tuple[int, int] = PrivateAttr((0, 0))
    _taps: list[RoutingTap] = PrivateAttr(default_factory=list)
    _largest: dict[tuple[str, int], torch.Tensor] = PrivateAttr(default_factory=dict)

    @field_validator("num_experts_per_tok")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"ActivationSmoothModifier.num_experts_per_tok must be at least 1, got {value}")
        return value

    def on_initialize(self, state: State, **kwargs) -> bool:
        """Remember the model as it was before pruning, which `scale` refers to."""
        check_unquantized(state.model, "ActivationSmoothModifier")
        moe = describe(state.model)
        self._original = (moe.num_experts, moe.top_k)
        self._check_family(moe)
        call_experts_alike(moe)
        if isinstance(self.num_experts_per_tok, int):
            self._check_reachable(moe, self.num_experts_per_tok)
        keep_attention_causal(state.model)
        install_save(state.model)
        return True

    def _check_family(self, moe: MoEModel) -> None:
        if moe.family.fixed_top_k and self.num_experts_per_tok not in ("keep", moe.top_k):
            raise MoeCollabError(
                f"ActivationSmoothModifier.num_experts_per_tok: routers of {moe.family.model_types[0]} always activate "
                f"{moe.top_k} experts. Use `keep`."
            )
        if self.strength is not None and not moe.family.linear_in_up:
            raise MoeCollabError(
                f"ActivationSmoothModifier.strength: experts of {moe.family.model_types[0]} clamp what up_proj puts "
                "out, so smoothing would change them. Leave it out."
            )

    def on_calibration_start(self, state: State, event: Event, **kwargs) -> None:
        """Set the number of activated experts, then watch what reaches each `down_proj`."""
        moe = describe(state.model)
        top_k = self._resolve_top_k(moe)
        if top_k != moe.top_k:
            logger.info("ActivationSmoothModifier: {} -> {} experts activated per token", moe.top_k, top_k)
            set_top_k(moe, top_k)
        if self.strength is None:
            return
        for layer in describe(state.model, self.ignore).layers:
            tap = RoutingTap(self, layer)
            self._taps.append(tap)
            for index in layer.live_experts:
                hook = partial(self._observe, tap, index)
                self.register_hook(layer.expert(index).down_proj, hook, "forward")

    def _resolve_top_k(self, moe: MoEModel) -> int:
        num_experts, top_k = self._original
        if self.num_experts_per_tok == "keep":
            return moe.top_k
        if self.num_experts_per_tok == "scale":
            top_k = scaled_top_k(top_k, num_experts, moe.num_experts)
        else:
            top_k = int(self.num_experts_per_tok)
        self._check_reachable(moe, top_k)
        return top_k

    @staticmethod
    def _check_reachable(moe: MoEModel, top_k: int) -> None:
        if top_k > moe.reachable(moe.num_experts):
            raise MoeCollabError(
                f"ActivationSmoothModifier.num_experts_per_tok: a token can reach only "
                f"{moe.reachable(moe.num_experts)} experts, not {top_k}. Choose a smaller number."
            )

    def _observe(self, tap: RoutingTap, index: int, _module: torch.nn.Module, args: tuple, _out: object) -> None:
        hidden, _weights = tap.routed(index, args[0])
        if not hidden.numel():
            return
        largest = hidden.abs().amax(0).float()
        key = (tap.layer.name, index)
        self._largest[key] = torch.maximum(self._largest[key], largest) if key in self._largest else largest

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list | None = None, **kwargs) -> None:
        """Smooth the layers whose statistics are complete."""
        done = {id(module) for module in modules or ()}
        for tap in self._taps:
            down_projs = {id(tap.layer.expert(index).down_proj) for index in tap.layer.live_experts}
            if id(tap.layer.experts) in done or down_projs & done:
                self._smooth(tap.layer)

    def on_calibration_end(self, state: State, event: Event, **kwargs) -> None:
        """Smooth what is left."""
        self.remove_hooks()
        for tap in self._taps:
            self._smooth(tap.layer)
        self._taps.clear()

    @torch.no_grad()
    def _smooth(self, layer: MoELayer) -> None:
        assert self.strength is not None
        for index in layer.live_experts:
            largest = self._largest.pop((layer.name, index), None)
            if largest is None:
                continue
            if not torch.isfinite(largest).all():
                raise MoeCollabError(f"{layer.experts_name}.{index}.down_proj: its calibration inputs are not finite.")
            expert = layer.expert(index)
            scale = smoothing_scale(largest, expert.down_proj.weight, self.strength)
            _scale_rows(expert.up_proj, 1 / scale)
            weight = expert.down_proj.weight
            update_offload_parameter(expert.down_proj, "weight", weight * scale.to(weight.dtype))


def smoothing_scale(largest: torch.Tensor, down_weight: torch.Tensor, strength: float) -> torch.Tensor:
    """Powers of two [intermediate]: s_j near max|x_j|^a / max|W_j|^(1-a), with geometric mean near 1."""
    column = down_weight.detach().abs().amax(0).float().clamp(min=1e-5)
    exponent = strength * largest.clamp(min=1e-5).log2() - (1 - strength) * column.log2()
    # 2^8 either way is more than any channel gains and stays far from float16's limits.
    return torch.exp2((exponent - exponent.mean()).round().clamp(-8, 8))


def _scale_rows(linear: torch.nn.Linear, scale: torch.Tensor) -> None:
    update_offload_parameter(linear, "weight", linear.weight * scale.to(linear.weight.dtype)[:, None])
    if linear.bias is not None:
        update_offload_parameter(linear, "bias", linear.bias * scale.to(linear.bias.dtype))
