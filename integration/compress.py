"""The fixture through llm-compressor: stock uniform GPTQ at its best, and ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from loguru import logger
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_collab  # noqa: F401  (registers the modifiers)

__all__ = [
    "FIXTURE",
    "calibration",
    "checkpoint_size",
    "expert_bpw",
    "log_warnings_only",
    "mixed_recipe",
    "recipe",
    "run_oneshot",
    "tokens",
    "uniform_recipe",
]

FIXTURE = Path(__file__).parent / "fixture" / "qwen3_moe"
"""The trained model; its token sets lie beside it."""


def log_warnings_only() -> None:
    """Of what llm-compressor says: it reports every rounded tensor, above the level of warnings, as METRIC."""
    logger.remove()
    logger.add(sys.stderr, level="WARNING", filter=lambda record: record["level"].name != "METRIC")


def tokens(split: str, model: Path = FIXTURE) -> torch.Tensor:
    """Sequences [rows, 128] of the `calibration`, `selection` or `test` set, going round the domains."""
    return load_file(model.with_name(f"{model.name}_tokens.safetensors"))[split].long()


def calibration(rows: int | None = None, batch_size: int = 8, model: Path = FIXTURE) -> DataLoader:
    """The fixture's calibration sequences as oneshot() takes them."""
    chosen = tokens("calibration", model)[:rows]
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in chosen]
    return DataLoader(samples, batch_size=batch_size)


def recipe(*modifiers: dict) -> str:
    """A YAML recipe that runs `modifiers` ({class name: fields} each) in order, each in a group of its own."""
    groups = {f"step{position}_modifiers": modifier for position, modifier in enumerate(modifiers)}
    return yaml.safe_dump({"compress_stage": groups}, sort_keys=False)


def uniform_recipe(num_bits: int, group_size: int) -> str:
    """Stock GPTQ on the routed experts: asymmetric, MSE-searched scales, static activation order."""
    return f"""
uniform_stage:
  quant_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        experts:
          targets: ['re:.*\\.experts\\.\\d+\\.(gate|up|down)_proj$']
          weights: {{num_bits: {num_bits}, type: int, symmetric: false, strategy: group, group_size: {group_size},
                     actorder: static, observer: mse}}
"""


def mixed_recipe(tuning_steps: int = 0, **fields) -> str:
    """Ours with every option there is; `fields` of MixedBitAllocModifier such as `budget`, `plan` and `costs`."""
    allocate = {"bits": ["ternary", 2, 3, 4, 5, 6, 8], "group_size": [32, 64, 128]} | fields
    quantize = {"ignore": ["lm_head"], "tuning_steps": tuning_steps}
    return recipe({"MixedBitAllocModifier": allocate}, {"FisherGPTQModifier": quantize})


def run_oneshot(
    recipe: str,
    output: Path,
    source: Path = FIXTURE,
    data: DataLoader | None = None,
    model_class: Any = AutoModelForCausalLM,
    **options: Any,
) -> Any:
    """Load `source`, run `recipe` on its calibration data, save to `output`; returns the compressed model."""
    from llmcompressor import oneshot
    from llmcompressor.utils import load_context

    from moe_collab.modifiers.glue.compat import keep_attention_causal

    with load_context(model_class):
        model = model_class.from_pretrained(source, dtype="auto")
    keep_attention_causal(model)  # for stock quantizers too: they are to be at their best
    return oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(source),
        recipe=recipe,
        dataset=data or calibration(model=source),
        output_dir=str(output),
        **options,
    )


def checkpoint_size(path: Path) -> int:
    """Bytes of all `*.safetensors` files, headers included."""
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


def expert_bpw(path: Path) -> float:
    """Stored bits per weight over the routed experts, scales and zero points included."""
    bits = weights = 0
    for file in path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if ".experts." not in name:
                continue
            bits += 8 * tensor.nbytes
            if name.endswith("weight_shape"):
                weights += int(tensor.prod())
            elif name.endswith(".weight"):
                weights += tensor.numel()
    return bits / weights
