"""The names, types and shapes that the tensors of a live model will have in the saved checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.modeling.moe.conversion_mappings import set_save_conversion_mapping
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...architectures import PROJECTIONS, family_of
from ...checkpoint.sizes import TORCH_TYPES, TensorEntry

__all__ = [
    "checkpoint_entries",
    "checkpoint_names",
    "checkpoint_tensors",
    "dtype_name",
    "saved_shapes",
    "use_checkpoint_names",
]

_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}


def use_checkpoint_names(model: Any) -> None:
    """Make the model save its linearized experts under the names its family's checkpoints use.

    llm-compressor 0.14 would save Mixtral's experts as gate_proj, up_proj and down_proj, which vLLM does
    not know as w1, w3 and w2.
    """
    saved = family_of(model.config).checkpoint_projections
    if saved == PROJECTIONS:
        return
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_checkpoint_conversion_mapping(model.config.model_type) or []
    # Converters would fuse the experts again; the renamings below stand in for them.
    kept = [c for c in conversions if not isinstance(c, WeightConverter)]
    ours = [_expert_renaming(a, b) for a, b in zip(saved, PROJECTIONS, strict=True)]
    known = {str(c.source_patterns) for c in kept}
    set_save_conversion_mapping(model, kept + [c for c in ours if str(c.source_patterns) not in known])


def _expert_renaming(saved: str, live: str) -> WeightRenaming:
    return WeightRenaming(source_patterns=rf"\.experts\.(\d+)\.{saved}\.", target_patterns=rf".experts.\1.{live}.")


def checkpoint_names(model: Any, modules: list[str]) -> dict[str, str]:
    """Module name -> name in the saved checkpoint."""
    saved = checkpoint_tensors(model, [f"{name}.weight_packed" for name in modules])
    return {name: saved[f"{name}.weight_packed"].removesuffix(".weight_packed") for name in modules}


def checkpoint_tensors(model: Any, tensors: list[str]) -> dict[str, str]:
    """Tensor name -> name in the saved checkpoint."""
    # Each tensor's first dimension is its position, so that it is known again under its new name.
    positions = {name: torch.empty(i + 1, 0, device="meta") for i, name in enumerate(tensors)}
    saved = revert_weight_conversion(model, dict(positions))
    return {tensors[t.shape[0] - 1]: name for name, t in saved.items()}


def saved_shapes(model: Any) -> dict[str, torch.Tensor]:
    """Live name -> tensor without data, for each that is saved. None is read."""
    ignored = set(model._keys_to_ignore_on_save or ())
    with disable_onloading():
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
        return {n: torch.empty_like(tensor, device="meta") for n, tensor in state.items() if n not in ignored}


def checkpoint_entries(model: Any) -> list[TensorEntry]:
    """Every tensor that would be saved of the unquantized model, in its order; none is read."""
    saved = revert_weight_conversion(model, saved_shapes(model)).items()
    return [TensorEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in saved]


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    return _NAMES[dtype]
