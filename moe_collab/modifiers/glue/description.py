"""What stands beside the weights of a saved model: config.json, generation_config.json, recipe.yaml, its own code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import QuantizationStatus
from llmcompressor.pytorch.model_load.helpers import copy_python_files_from_model_cache
from llmcompressor.transformers.compression.compressed_tensors_utils import resave_config, update_and_save_recipe
from loguru import logger
from transformers.dynamic_module_utils import custom_object_save

from ...checkpoint.companions import copy_companions, source_directory
from ...moe_model import describe
from ...pruning.surgery import sync_config

__all__ = ["write_description"]


def write_description(model: Any, directory: Path, compressed: bool, ties_head: bool) -> None:
    """Write into `directory` all that llm-compressor writes beside weights, then correct and complete it.

    `ties_head` says whether lm_head was left out because it equals the embeddings.
    """
    _write_configs(model, directory)
    resave_config(model.config, str(directory))
    _write_quantization(model, directory, compressed)
    update_and_save_recipe(model.name_or_path, str(directory))
    copy_python_files_from_model_cache(model, str(directory))
    _correct_config(model, directory / "config.json", ties_head)
    origin = getattr(model.config, "_name_or_path", "")
    source = source_directory(origin, getattr(model.config, "_commit_hash", None))
    if source is None:
        logger.warning("{!r} is no local directory: no tokenizer or licence was copied from there", origin)
    else:
        copy_companions(source, directory)


def _write_configs(model: Any, directory: Path) -> None:
    """What transformers' own `save_pretrained` writes beside weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, str(directory), config=model.config)
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def _write_quantization(model: Any, directory: Path, compressed: bool) -> None:
    """Add `quantization_config` to config.json, if any module has a scheme."""
    with _formats_kept(model):
        compressor = ModelCompressor.from_pretrained_model(model, quantization_format=None if compressed else "dense")
        if compressor.quantization_config is not None and compressed:
            compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
        compressor.update_config(str(directory))


@contextmanager
def _formats_kept(model: Any) -> Iterator[None]:
    """compressed-tensors writes the format that it infers, or is told, into the schemes of the live modules."""
    schemes = [m.quantization_scheme for m in model.modules() if getattr(m, "quantization_scheme", None) is not None]
    formats = [scheme.format for scheme in schemes]
    try:
        yield
    finally:
        for scheme, was in zip(schemes, formats, strict=True):
            scheme.format = was


def _correct_config(model: Any, path: Path, ties_head: bool) -> None:
    """Write the live expert counts over those llm-compressor copied from the original config, and vLLM's class."""
    moe = describe(model)
    counts = sync_config(model, moe)
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    for key in counts.keys() & text.keys():
        text[key] = counts[key]
    if ties_head:
        text["tie_word_embeddings"] = True
    if moe.family.architecture:
        config["architectures"] = [moe.family.architecture]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
