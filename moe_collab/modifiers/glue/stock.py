"""What llm-compressor's own modifiers of a recipe need, said before anything runs: it is not ours to bound."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from torch import nn

from ...calibration.fit import free_memory
from ...decoder import Decoder
from .data import one_pass
from .recipe import modifiers_of_this_pass
from .work import work_of

__all__ = ["announce_stock_modifiers", "find_stock_modifiers"]

_FOUND = "stock_modifiers"


def find_stock_modifiers(state: State) -> None:
    """Remember which calibrated modifiers of the recipe are llm-compressor's: a pass shows only those that share it."""
    others = [m for m in modifiers_of_this_pass() if not _is_ours(m) and getattr(m, "requires_calibration_data", False)]
    vars(state.data).setdefault(_FOUND, others)


def announce_stock_modifiers(state: State) -> None:
    """Log, once in a run, the memory that each of the modifiers found will take, and what a kill costs.

    Their pipelines hold a block of the model, and the hidden states of all calibration tokens before and after it; GPTQ
    also holds, for every Linear of the block, a float32 matrix of [columns, columns].
    """
    others, vars(state.data)[_FOUND] = vars(state.data).get(_FOUND), []
    if not others:
        return
    model: Any = state.model
    decoder = Decoder(model)
    tokens = sum(torch.as_tensor(batch["input_ids"]).numel() for batch in one_pass(state))
    with disable_onloading():
        block = max(sum(p.numel() * p.itemsize for p in block.parameters()) for block in decoder.blocks.values())
        squares = max(map(_squares, decoder.blocks.values()))
    hidden = 2 * tokens * decoder.embedding.embedding_dim * model.dtype.itemsize
    for modifier in others:
        needed = block + hidden + squares * isinstance(modifier, GPTQModifier)
        free = free_memory()
        logger.log(
            "WARNING" if free and needed > free else "INFO",
            "{} is llm-compressor's, which holds a block of the model in memory with all that its calibration takes: "
            "about {:.1f} GB; {:.1f} GB are free.{}",
            type(modifier).__name__,
            needed / 1e9,
            free / 1e9,
            " It keeps nothing in `work`: if the run is killed, it is done anew as a whole." if work_of(state) else "",
        )


def _is_ours(modifier: Modifier) -> bool:
    return type(modifier).__module__.startswith("moe_collab.")


def _squares(block: nn.Module) -> int:
    """Bytes of a float32 matrix [columns, columns] for every Linear."""
    return sum(4 * module.in_features**2 for module in block.modules() if isinstance(module, nn.Linear))
