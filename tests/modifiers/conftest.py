"""Tiny models, tiny calibration data, one way to run a recipe."""

from __future__ import annotations

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.utils import load_context
from loguru import logger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import moe_collab  # noqa: F401  (registers the modifiers)
from integration.compress import recipe
from integration.tiny_models import build_tiny

QUANTIZE = {"GPTQModifier": {"ignore": ["lm_head"]}}


@pytest.fixture(scope="session", autouse=True)
def quiet():
    logger.remove()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """family -> directory of a tiny model, built once."""
    built = {}

    def get(family: str, **overrides):
        key = (family, *sorted(overrides.items()))
        if key not in built:
            built[key] = build_tiny(family, tmp_path_factory.mktemp("tiny") / family, **overrides)
        return built[key]

    return get


def load(path):
    with load_context():
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def on_disk(path, folder):
    """As `load`, but all weights stay on disk; those that change are written to `folder`."""
    with load_context():
        return AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", device_map="auto_offload", max_memory={"cpu": 100_000}, offload_folder=str(folder)
        )


def samples(count: int = 16, length: int = 32) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 250, (length,), generator=generator) for _ in range(count)]
    return DataLoader([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows], batch_size=4)


def run(model, *modifiers: dict, output=None, data=None, **options):
    """oneshot() with a recipe of `modifiers` ({class name: fields} each)."""
    model = model if isinstance(model, torch.nn.Module) else load(model)
    return oneshot(
        model=model,
        recipe=recipe(*modifiers),
        dataset=data or samples(),
        output_dir=str(output) if output else None,
        **options,
    )
