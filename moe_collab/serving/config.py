"""Which checkpoints are ours, and which layers of them."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.model_executor.kernels.linear import choose_mp_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    WNA16_SUPPORTED_TYPES_MAP,
    WNA16_ZP_SUPPORTED_TYPES_MAP,
)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.layers.quantization.utils.marlin_utils import MARLIN_SUPPORTED_GROUP_SIZES
from vllm.platforms import current_platform

from ..checkpoint.groups import NOTE_KEY, PLUGIN_NOTE
from ..formats import DENSE, PRUNED, TERNARY_PACKED, Scheme
from ..kernels.backends import backend
from .experts import ExpertSchemes, MixedBitMoEMethod
from .linear import SERVED, MixedBitLinearMethod
from .needs import has_stock_int4, needs_this_package, num_experts_of, routes_in_groups
from .weights import is_packed, stored_scheme

__all__ = ["NAME", "MoeCollabConfig"]

NAME = "moe_collab"


class MoeCollabConfig(CompressedTensorsConfig):
    """compressed-tensors with routed experts of any mix of bits; every other layer is vLLM's own."""

    def get_name(self) -> str:
        """The registry name."""
        return NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoeCollabConfig:
        """As the parent's, without the note that is meant for those who lack this package."""
        note = (NOTE_KEY, PLUGIN_NOTE)
        return super().from_config({key: value for key, value in config.items() if (key, value) != note})

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a checkpoint only if stock vLLM cannot serve it on this platform, or the user asks for us."""
        if hf_quant_cfg.get("quant_method") != "compressed-tensors":
            return None
        if user_quant not in (None, "compressed-tensors", NAME):
            return None
        ours = needs_this_package(hf_quant_cfg, routes_in_groups(hf_config), num_experts_of(hf_config))
        return NAME if user_quant == NAME or ours else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Our methods for routed experts, for ternary and for linear layers that stock vLLM cannot or not well serve.

        Of linear layers in packed integers stock vLLM has, for CPUs, only a 4-bit kernel, if any: slower than ours but
        faster than the reference; for GPUs, kernels for 4 and 8 bits, alike in all parts fused into one. On GPUs it
        also keeps experts that are alike in a way it knows: its kernels for them are tuned for years.
        """
        if isinstance(layer, RoutedExperts):
            schemes = self._expert_schemes(layer, prefix)
            if current_platform.is_cpu() or not _is_stock(schemes, layer.moe_config):
                return MixedBitMoEMethod(layer.moe_config, schemes)
            return super().get_quant_method(layer, schemes.prefix)
        if type(layer) in SERVED:
            names = self._parts(prefix)
            parts = [self._scheme(layer, name) for name in names]
            if _serves_linear(layer, parts):
                return MixedBitLinearMethod(names, [stored_scheme(n, p) for n, p in zip(names, parts, strict=True)])
        return super().get_quant_method(layer, prefix)

    def _parts(self, prefix: str) -> list[str]:
        """Checkpoint names of the modules that vLLM fuses into `prefix`."""
        parent, _, name = prefix.rpartition(".")
        return [f"{parent}.{part}" for part in self.packed_modules_mapping.get(name, [])] or [prefix]

    def _scheme(self, layer: torch.nn.Module, name: str) -> dict[str, Any] | None:
        """None where the module is ignored or no target names it."""
        try:
            return self.get_scheme_dict(layer, name)
        except ValueError:
            return None

    def _expert_schemes(self, layer: RoutedExperts, prefix: str) -> ExpertSchemes:
        self._add_fused_moe_to_target_scheme_map()
        projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        experts = range(layer.moe_config.num_logical_experts)
        # vLLM's MiniMax-M2 passes `mlp` for what the checkpoint, and its own module, call `block_sparse_moe`.
        for place in (prefix, prefix.replace(".mlp.", ".block_sparse_moe.")):
            found = [[self._stored(layer, f"{place}.{expert}.{p}") for p in projections] for expert in experts]
            if any(any(schemes) for schemes in found):
                break
        # Where a selection bias can mask experts, those that neither a target nor `ignore` names are absent.
        masks = layer.e_score_correction_bias is not None and any(any(schemes) for schemes in found)
        unnamed = PRUNED if masks else DENSE
        return ExpertSchemes(place, projections, [tuple(s or unnamed for s in schemes) for schemes in found])

    def _stored(self, layer: RoutedExperts, name: str) -> Scheme | None:
        """How an expert's matrix is stored; None if neither a target nor `ignore` names it."""
        described = self._scheme(layer, name)
        if described is None and not should_ignore_layer(name, self.ignore, self.packed_modules_mapping):
            return None
        return stored_scheme(name, described)


def _serves_linear(layer: torch.nn.Module, parts: list[dict[str, Any] | None]) -> bool:
    """Whether a linear layer with these parts (None = unquantized) is ours."""
    bits = {part["weights"].num_bits if is_packed(part) else part and 0 for part in parts}
    if not bits - {None} or 0 in bits:
        return False
    if any(part and part["format"] == TERNARY_PACKED for part in parts):
        return True
    if not current_platform.is_cpu():
        weights = parts[0] and parts[0]["weights"]
        return not (bits <= {4, 8} and all(part == parts[0] for part in parts) and _has_kernel(layer, weights))
    return bits != {4} or backend().is_fast or not has_stock_int4()


def _has_kernel(layer: Any, weights: QuantizationArgs) -> bool:
    """Whether vLLM has a kernel on this GPU for this rank's part of such a layer."""
    columns = getattr(layer, "input_size_per_partition", layer.input_size)
    types = WNA16_SUPPORTED_TYPES_MAP if weights.symmetric else WNA16_ZP_SUPPORTED_TYPES_MAP
    group = weights.group_size or -1
    wanted = MPLinearLayerConfig(
        full_weight_shape=(layer.input_size, layer.output_size),
        partition_weight_shape=(columns, getattr(layer, "output_size_per_partition", layer.output_size)),
        weight_type=types[weights.num_bits],
        act_type=torch.get_default_dtype(),
        group_size=group,
        zero_points=not weights.symmetric,
    )
    try:
        choose_mp_linear_kernel(wanted)
    except ValueError:
        return False
    return group == -1 or columns % group == 0


def _is_stock(experts: ExpertSchemes, moe: FusedMoEConfig) -> bool:
    """Whether stock vLLM has a GPU kernel for a layer of these experts: all unquantized, or alike in 4 or 8 bits."""
    first = experts.table[0][0]
    if any(scheme != first for schemes in experts.table for scheme in schemes):
        return False
    if first == DENSE:
        return True
    if first.num_bits not in (4, 8) or not first.symmetric or first.group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
        return False
    width = moe.intermediate_size_per_partition_unpadded
    return moe.hidden_dim % 128 == 0 and (first.group_size == -1 or width % first.group_size == 0)
