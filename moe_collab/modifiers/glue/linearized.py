"""A model as llm-compressor wants it, of any checkpoint that we can read: in memory, or left on disk as published."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from llmcompressor.modeling.moe.conversion_mappings import (
    get_linearize_load_mappings,
    has_linearize_load_mappings,
    set_save_conversion_mapping,
)
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from loguru import logger
from torch import nn

from ...architectures import family_of, text_config
from ...calibration.at_hand import compute_device
from ...checkpoint.empty import EmptyModel, stock_conversions
from ...checkpoint.hub import model_folder
from ...checkpoint.lazy import LazyTensor
from ...checkpoint.twin import separate_experts
from ...distributed import agreed, everyones, is_source_process
from ...errors import MoeCollabError
from ...kernels.memory import available_memory
from .compat import DEQUANTIZED
from .naming import checkpoint_tensors, use_checkpoint_names
from .source_cache import offload_to_source

__all__ = ["load_linearized"]


def load_linearized(
    path: str | Path, dtype: torch.dtype | None = None, offload_folder: str | Path | None = None
) -> Any:
    """A model for `oneshot(model=...)`, with a Linear for each matrix of an expert; `path` is a folder or a hub's name.

    Quantized weights are dequantized tensor by tensor as they are read (README, "Published checkpoints", says which
    can be), to `dtype` or else that of config.json. With `offload_folder` all weights stay where they are, in the
    checkpoint, and are read whenever they are needed; those that are changed are written to that folder. Without it the
    model is in memory. Raises `MoeCollabError`, before any weight is read, for a checkpoint that lacks a tensor, has
    one of the wrong shape, or is quantized in a way we cannot read.
    """
    empty = EmptyModel(model_folder(path), dtype)
    model = empty.model
    family_of(model.config)  # of one that we do not know nothing could be compressed
    fused = _linearize(model)
    use_checkpoint_names(model)
    setattr(model, DEQUANTIZED, json.dumps(empty.checkpoint.config.get("quantization_config"), sort_keys=True))
    wanted = dict(model.state_dict(keep_vars=True))
    sources = _sources(empty, wanted, fused)
    if offload_folder is not None:
        _leave(model, sources | {name: sources[other] for name, other in empty.tied().items()}, Path(offload_folder))
        return model
    _check_memory(sum(wanted[name].nbytes for name in sources), path)
    for name, source in sources.items():
        values = source.read().to(wanted[name].dtype)
        _set(model, name, nn.Parameter(values) if isinstance(wanted[name], nn.Parameter) else values)
    for name, other in empty.tied().items():
        _set(model, name, model.get_parameter(other))
    return model


def _check_memory(needed: int, path: str | Path) -> None:
    """Raise `MoeCollabError` if the dense weights do not fit in memory, once for each process."""
    free, copies = available_memory(), len(everyones([None]))
    needed *= copies
    if free and needed > free:
        raise MoeCollabError(
            f"{path}: the dense weights of {copies} processes take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of "
            "memory are free. Name an `offload_folder`: then they stay on disk."
        )


def _linearize(model: Any) -> list[str]:
    """Give each MoE layer its experts one by one, on the meta device; names of the modules that held them stacked."""
    model_type, fused = model.config.model_type, []
    with stock_conversions():
        if has_linearize_load_mappings(model_type):
            _, _, saving = get_linearize_load_mappings(model_type)
            set_save_conversion_mapping(model, saving)
    for name, module in get_non_linearized_moes(model):
        with torch.device("meta"):
            experts = _linear_experts(module, getattr(module, "config", model.config))
        model.set_submodule(name, experts.to(model.dtype))
        fused.append(name)
    return fused


def _linear_experts(module: Any, config: Any) -> nn.Module:
    """llm-compressor's experts in the place of `module`, with no weights taken from it."""
    linear = LinearExperts2D.get_linear_experts_cls(type(module))
    if issubclass(linear, Llama4LinearExperts):
        return linear(module.num_experts, module.hidden_size, module.expert_dim, text_config(config))
    return linear(config)


def _sources(empty: EmptyModel, wanted: Mapping[str, torch.Tensor], fused: list[str]) -> dict[str, LazyTensor]:
    """What is read for each of the tensors `wanted` that is stored, `fused` being where the experts were stacked."""
    stored, prefixes = separate_experts(empty.checkpoint, empty.stored), tuple(f"{name}." for name in fused)
    experts = [name for name in wanted if name.startswith(prefixes)]
    found = {name: stored.get(saved) for name, saved in checkpoint_tensors(empty.model, experts).items()}
    for name in wanted.keys() & empty.sources.keys():
        found[name] = None if name in empty.converted else next(iter(empty.sources[name].values()))
    sources = {}
    for name, source in found.items():
        if source is None or source.like.shape != wanted[name].shape:
            what = "there is no one tensor" if source is None else f"the checkpoint has {list(source.like.shape)}"
            raise MoeCollabError(
                f"{empty.checkpoint.path}: for {name} {list(wanted[name].shape)} {what}. Load this model with "
                "llm-compressor's load_context()."
            )
        sources[name] = source
    return sources


def _leave(model: nn.Module, sources: Mapping[str, LazyTensor], folder: Path) -> None:
    """Leave the model's tensors where they are stored; what changes is to be written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of its own for each model, so that none finds what another has changed; the same in all processes.
    own = Path(agreed(mkdtemp(prefix="changed-", dir=folder) if is_source_process() else "")).absolute()
    by_module: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    for name, source in sources.items():
        owner, _, attribute = name.rpartition(".")
        by_module[owner][attribute] = source
    for name, module in model.named_modules():
        if module._parameters or module._buffers:
            offload_to_source(name, module, by_module[name], compute_device(), own)
    logger.info("{} tensors stay in their checkpoint; what changes is written to {}", len(sources), own)


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)
