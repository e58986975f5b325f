"""A decoder taken apart into blocks, so that one block at a time has to be in memory.

Any transformers decoder will do: how it calls its blocks is found out by running it with stand-ins for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["BlockCall", "Decoder", "decoder_of", "replaced_forward"]

Batch = Mapping[str, torch.Tensor]


def decoder_of(model: Any) -> Any:
    """The language model without its lm_head."""
    decoder = model.get_decoder()
    return getattr(decoder, "model", decoder)  # of Llama 4, get_decoder() gives a model with an lm_head


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let `module` compute `forward` within the block."""
    before = module.__dict__.get("forward")  # another tool may have replaced it too
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


class BlockCall(NamedTuple):
    """What a decoder gives one of its blocks for one batch, besides the hidden states."""

    positional: tuple
    named: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output [rows, length, H] for `hidden` [rows, length, H]."""
        output = block(hidden, *self.positional, **self.named)
        return output[0] if isinstance(output, tuple) else output


class Decoder:
    """The blocks of `model`'s decoder by name, in order; what goes into the first, and what follows the last.

    `model` may be on any device, offloaded, or, but for what `embed` and `finish` use, on the meta device.
    """

    def __init__(self, model: Any) -> None:
        self._decoder, self.embedding = decoder_of(model), model.get_input_embeddings()
        self.blocks: dict[str, nn.Module] = dict(_blocks(model, self._decoder))

    @property
    def outside(self) -> list[nn.Module]:
        """The decoder's modules that are in no block, without the embedding: final norm, rotary embeddings."""
        inside = {module for block in self.blocks.values() for module in block.modules()}
        return [module for module in self._decoder.modules() if module not in inside and module is not self.embedding]

    @property
    def names(self) -> list[str]:
        """Names of the blocks in the model, in order."""
        return list(self.blocks)

    def embed(self, batch: Batch) -> torch.Tensor:
        """The first block's input [rows, length, H] for the tokens of `batch`; the embedding is used, no block."""
        return self._run({}, None, **batch)[0]

    def calls(self, batch: Batch, like: torch.Tensor) -> dict[str, BlockCall]:
        """How each block is called for `batch`, by block name; neither blocks nor embedding are computed.

        Masks and rotary embeddings come in the type and on the device of `like` [rows, length, H].
        """
        calls: dict[str, BlockCall] = {}
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        # One zero for all: a decoder looks only at the shape, the type and the device of what it is given.
        empty = torch.zeros(1, 1, 1, dtype=like.dtype, device=like.device).expand(like.shape)
        self._run(calls, None, inputs_embeds=empty, **rest)
        return calls

    def finish(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """The input of lm_head [rows, length, H], given the last block's output `hidden`; gradients flow through."""
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        return self._run({}, hidden, inputs_embeds=hidden.detach(), **rest)[1]

    def _run(
        self, calls: dict[str, BlockCall], last: torch.Tensor | None, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(The first block's input, the decoder's output), with blocks that put out what comes in, or `last`."""
        first: list[torch.Tensor] = []

        def see(name: str, *args: Any, **named: Any) -> torch.Tensor:
            hidden = named.pop("hidden_states") if "hidden_states" in named else args[0]
            calls[name] = BlockCall(args[1:], named)
            first.append(hidden)
            return hidden if last is None else last

        with ExitStack() as stack:
            for name, block in self.blocks.items():
                stack.enter_context(replaced_forward(block, partial(see, name)))
            output = self._decoder(**inputs, use_cache=False).last_hidden_state
        return first[0], output


def _blocks(model: nn.Module, decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the decoder's only list of modules that stands directly in it, with their names in the model."""
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    assert len(lists) == 1, f"{type(decoder).__name__} has {len(lists)} lists of modules, so which are its blocks?"
    prefix = next(name for name, module in model.named_modules() if module is lists[0])
    for index, block in enumerate(lists[0]):
        yield f"{prefix}.{index}", block
