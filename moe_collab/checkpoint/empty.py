"""A transformers model without weights, and where in the checkpoint the weights of each of its parameters are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..architectures import text_config
from ..errors import MoeCollabError
from .lazy import LazyTensor
from .reader import Checkpoint
from .twin import complete_tensors, stacked, stacked_experts

__all__ = ["EmptyModel", "model_of", "no_progress_bars", "stock_conversions"]


class EmptyModel:
    """The model of the checkpoint in a directory, on the meta device; only buffers that are not stored have values.

    Raises `MoeCollabError` unless the checkpoint has exactly the tensors that the model needs, in the right shapes.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        self.checkpoint = Checkpoint(path)
        self.stored = complete_tensors(self.checkpoint, dtype)
        """The checkpoint's tensors by the names that they have there, or would have unquantized."""
        twin = stacked_experts(self.checkpoint, self.stored)
        unread = {name: _Unread(tensor.like, tensor.read) for name, tensor in twin.items()}
        with no_progress_bars():
            self.model: Any = model_of(self.checkpoint, unread, dtype)
        self.parameters: dict[str, torch.Tensor] = dict(self.model.state_dict(keep_vars=True))
        """Parameters and stored buffers by name; those that are one weight are one object."""
        with stock_conversions():
            from transformers.conversion_mapping import get_model_conversion_mapping

            self.conversions: list[Any] = get_model_conversion_mapping(self.model)
        """How transformers gets from the checkpoint's tensors to the model's."""
        self.converted: set[str] = set()
        """Parameters that transformers makes of the checkpoint's tensors, instead of taking one under another name."""
        self.sources = self._find_sources(twin)
        """Parameter -> what to load for it, by name in the checkpoint."""

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, LazyTensor]:
        """The tensors to load for the parameters `names`, or for all; of a tied weight, those of its other name."""
        if names is None:
            return {name: tensor for tensors in self.sources.values() for name, tensor in tensors.items()}
        return {name: tensor for one in names for name, tensor in self.sources.get(one, {}).items()}

    def tied(self) -> dict[str, str]:
        """Parameters that are not stored, as they are the same weight as another, by name -> that other's name."""
        stored = {id(tensor): name for name, tensor in self.parameters.items() if name in self.sources}
        same = {name: stored.get(id(tensor), name) for name, tensor in self.parameters.items()}
        return {name: other for name, other in same.items() if name != other}

    def _find_sources(self, twin: Mapping[str, LazyTensor]) -> dict[str, dict[str, LazyTensor]]:
        """Name in the model -> what to load for it, by name in the checkpoint.

        Where transformers would stack experts, of which it first reads all, it gets the stack under its name in the
        model, and that is filled expert by expert.
        """
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        renamings = [one for one in self.conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in self.conversions if isinstance(one, WeightConverter)]
        stacks = {pattern: one for one in converters if _only_stacks(one) for pattern in one.source_patterns}
        prefix = self.model.base_model_prefix
        sources: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
        experts: dict[str, dict[str, list[LazyTensor]]] = defaultdict(lambda: defaultdict(list))
        for name in sorted(twin, key=dot_natural_key):  # the order in which transformers stacks experts
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.parameters)
            if target not in self.parameters and name in self.parameters:  # as transformers does
                target, pattern = name, None
            if pattern in stacks and target in self.parameters:
                experts[target][pattern].append(twin[name])
            else:
                sources[target][name] = twin[name]
                if pattern is not None:
                    self.converted.add(target)
        for target, found in experts.items():
            parts = [found[pattern] for pattern in stacks[next(iter(found))].source_patterns]
            sources[target][target] = stacked(target, parts, self.parameters[target].dtype)
        return sources


def model_of(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None, **from_pretrained: Any
) -> Any:
    """The model of the checkpoint's config with `tensors`, each sliced once: on any device, if it gives such a slice.

    Raises `MoeCollabError` if they are not exactly those that the model needs.
    """
    import transformers

    path = checkpoint.path
    model_class, config = _class_and_config(checkpoint)
    _check_layers(checkpoint, config)
    arguments = {"config": config, "state_dict": tensors, "dtype": dtype or "auto", "output_loading_info": True}
    if (path / "generation_config.json").exists():
        arguments["generation_config"] = transformers.GenerationConfig.from_pretrained(path)
    try:
        with stock_conversions():
            model, report = model_class.from_pretrained(None, **arguments, **from_pretrained)
    except MoeCollabError:
        raise
    except RuntimeError as error:  # transformers' word for shapes that do not fit
        raise MoeCollabError(f"{path}: its tensors do not fit the model in config.json. {error}") from error
    except ValueError as error:  # and for arguments that do not go together
        raise MoeCollabError(f"{path}: transformers cannot load it so. {error}") from error
    model.config._name_or_path = model.name_or_path = str(path)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            raise MoeCollabError(f"{path}: {kind.replace('_', ' ')} when loading: {sorted(map(str, report[kind]))[:5]}")
    return model.eval()


def _check_layers(checkpoint: Checkpoint, config: Any) -> None:
    """Raise `MoeCollabError` if the config has more layers than there are; to build so many could take for ever."""
    wanted = getattr(text_config(config), "num_hidden_layers", 0)
    stored = {match[1] for name in checkpoint.names() if (match := re.search(r"\blayers\.(\d+)\.", name))}
    if stored and wanted > len(stored):
        raise MoeCollabError(
            f"{checkpoint.path}: config.json says {wanted} layers, but there are tensors of {len(stored)}. Copy or "
            "make the checkpoint again."
        )


def _class_and_config(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The class that config.json names, or else that of a causal language model, and the config of the unquantized."""
    import transformers

    try:
        name = next(iter(checkpoint.config.get("architectures") or []), "")
        model_class: Any = getattr(transformers, name, None)
        config = (model_class.config_class if model_class else transformers.AutoConfig).from_pretrained(checkpoint.path)
        if model_class is None:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            model_class, config = type(model), model.config
    except Exception as error:  # transformers checks configs in many ways, each with errors of its own
        raise MoeCollabError(
            f"{checkpoint.path}/config.json: transformers cannot make a model of it: {error}"
        ) from error
    # Such as Kimi-K2's, whose class is DeepSeek-V3's: what transformers knows of the type it knows by that name.
    config.model_type = type(config).model_type
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return model_class, config


@contextmanager
def stock_conversions() -> Iterator[None]:
    """llm-compressor's load_context() replaces, for the whole process, how transformers fuses experts."""
    from transformers import conversion_mapping

    replaced = conversion_mapping._checkpoint_conversion_mapping_cache
    conversion_mapping._checkpoint_conversion_mapping_cache = None
    try:
        yield
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache = replaced


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within the block transformers shows none of those that it shows whenever it loads something."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Unread(LazyTensor):
    """Stands for a tensor while a model is built: transformers moves what it slices, and gets nothing but a shape."""

    def __getitem__(self, index: Any) -> Any:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor's shape in `dtype`, on the meta device whatever `device` says."""
        return self.like.to(dtype=dtype)


def _only_stacks(converter: Any) -> bool:
    """Whether it makes [experts, rows of all its sources, columns] of one or two matrices of each expert."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    wanted = [(MergeModulelist, 0), (Concatenate, 1)][: len(converter.source_patterns)]
    return len(kinds) == len(converter.operations) and kinds == wanted
