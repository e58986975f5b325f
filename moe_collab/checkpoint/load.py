"""Compressed checkpoints in transformers, dequantized; neither llm-compressor nor vLLM is needed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..architectures import find_family
from ..errors import MoeCollabError
from .experts import check_experts, stack_experts, zeros_of_masked
from .reader import Checkpoint

__all__ = ["load", "stock_conversions", "write_dense_twin"]


def load(path: str | Path, dtype: torch.dtype | None = None, **from_pretrained: Any) -> Any:
    """The transformers model that config.json names, or else a causal language model, with the dequantized weights.

    `dtype` None keeps the checkpoint's. Raises `MoeCollabError` if a tensor is missing, unknown to the model,
    or unreadable; no weight is ever left at its random start.
    """
    import transformers

    with tempfile.TemporaryDirectory(prefix="moe-collab-") as folder, stock_conversions():
        write_dense_twin(path, folder, dtype)
        name = next(iter(Checkpoint(folder).config.get("architectures") or []), "")
        model_class = getattr(transformers, name, transformers.AutoModelForCausalLM)
        arguments = {"dtype": dtype or "auto", "output_loading_info": True} | from_pretrained
        try:
            loaded: Any = model_class.from_pretrained(folder, **arguments)
        except RuntimeError as error:  # transformers' word for shapes that do not fit
            raise MoeCollabError(f"{path}: its tensors do not fit the model in config.json. {error}") from error
        model, report = loaded
    model.config._name_or_path = str(path)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            raise MoeCollabError(f"{path}: {kind.replace('_', ' ')} when loading: {sorted(map(str, report[kind]))[:5]}")
    return model.eval()


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


def write_dense_twin(path: str | Path, output: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the same model unquantized, as its family's own checkpoints: what the one at `path` computes with.

    Dequantized weights get `dtype`, or else that of their scales; other tensors stay as they are.
    """
    checkpoint, output = Checkpoint(path), Path(output)
    check_experts(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    dense = checkpoint.dense_tensors(dtype)
    dense |= zeros_of_masked(checkpoint, dense)
    family = find_family(checkpoint.config.get("model_type"))
    if family and family.stacked:
        dense = stack_experts(dense, family.stacked)
    save_file(dense, output / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in checkpoint.path.glob("*.json"):
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy2(file, output / file.name)
