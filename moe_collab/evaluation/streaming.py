"""The same numbers for models larger than memory: one decoder block at a time, and a few tokens' logits at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, cast

import torch
from torch import nn

from ..architectures import logits_scaling, text_config
from ..checkpoint.streamed import StreamedModel
from ..decoder import BlockCall, Decoder, decoder_of
from ..errors import MoeCollabError
from .metrics import Evaluation, PerToken

__all__ = ["compare"]

_LOGITS = 64 << 20
"""About how many bytes the logits of one model take at a time; some eight tensors of that size are in memory."""

_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale")
"""Config keys of models that change the output of lm_head in ways that are not followed here."""


@torch.no_grad()
def compare(
    model: str | Path | nn.Module,
    base: str | Path | nn.Module,
    tokens: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    scratch: str | Path | None = None,
) -> Evaluation:
    """Compare `model` with `base` on `tokens` [rows, length], as `evaluate` does, where neither fits in memory.

    Each is a directory, of a compressed checkpoint or of an unquantized one as published, or a live transformers
    model. Of a directory only one decoder block at a time is in memory, read in `dtype` (None: the checkpoint's) to
    `device`, where it computes; besides, at the beginning the embedding, and at the end both lm_heads. The hidden
    states [rows, length, hidden] of both models lie in mapped files inside the folder `scratch`, or, if that is None,
    in memory. Raises `MoeCollabError` for a checkpoint that `load` would refuse, a model that cannot be run block by
    block, vocabularies that differ, and tokens outside of them.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise MoeCollabError(f"tokens are {list(tokens.shape)}, but must be [rows, length], at least two in a row.")
    tokens = tokens.long()
    models = [_Streamed(source, dtype, device) for source in (model, base)]
    _check_vocabularies(models, tokens)
    hidden = [one.hidden_states(tokens.split(batch_size), scratch) for one in models]
    with models[0].head(), models[1].head():
        return _per_token(models, hidden, tokens).means()


class _Streamed:
    """One of the models, run block by block over all tokens."""

    def __init__(self, source: str | Path | nn.Module, dtype: torch.dtype | None, device: str | torch.device) -> None:
        self._source = None if isinstance(source, nn.Module) else StreamedModel(source, dtype, device)
        self._model = self._source.model if self._source else cast(Any, source)
        self._device: torch.device = torch.device(device) if self._source else self._model.device
        self.name = str(source) if self._source else type(source).__name__
        if changes := [k for k in _CHANGES_LOGITS if getattr(text_config(self._model.config), k, None) is not None]:
            raise MoeCollabError(f"{self.name}: its config has {changes[0]}, so that compare() cannot know its logits.")
        try:
            self._decoder = Decoder(self._model)
        except (AssertionError, AttributeError) as error:
            raise MoeCollabError(f"{self.name}: it cannot be run block by block: {error}.") from error
        self._lm_head: Any = self._model.get_output_embeddings()
        self._scaling = logits_scaling(self._model.config)

    @property
    def vocabulary(self) -> int:
        """How many tokens it tells the probabilities of."""
        return self._lm_head.weight.shape[0]

    def hidden_states(self, batches: Sequence[torch.Tensor], scratch: str | Path | None) -> torch.Tensor:
        """The inputs of lm_head [rows, length, H] for the tokens of all batches, in a mapped file or in memory."""
        decoder, inputs = self._decoder, [{"input_ids": batch.to(self._device)} for batch in batches]
        calls: dict[int, dict[str, BlockCall]] = {}  # by rows of a batch: all rows are of one length, without padding
        with self._weights_of(*self._beside_blocks()):
            first = decoder.embed(inputs[0])
            hidden = _allocate((sum(map(len, batches)), *first.shape[1:]), first.dtype, scratch)
            parts = hidden.split([len(batch) for batch in batches])
            for part, batch in zip(parts, inputs, strict=True):
                part.copy_(embedded := decoder.embed(batch))
                if len(part) not in calls:
                    calls[len(part)] = decoder.calls(batch, embedded)
        for block_name, block in decoder.blocks.items():
            with self._weights_of(block_name):
                for part in parts:
                    part.copy_(calls[len(part)][block_name](block, part.to(self._device)))
        with self._weights_of(*self._beside_blocks()):
            for part, batch in zip(parts, inputs, strict=True):
                part.copy_(decoder.finish(batch, part.to(self._device)))
        return hidden

    def head(self) -> AbstractContextManager[None]:
        """Within it `log_probabilities` can be computed."""
        return self._weights_of(self._name_of(self._lm_head))

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token log-probabilities in float32, [tokens, vocabulary], for inputs of lm_head [tokens, H]."""
        return (self._lm_head(hidden.to(self._device)) / self._scaling).float().log_softmax(-1)

    def _weights_of(self, *modules: str) -> AbstractContextManager[None]:
        return self._source.weights_of(modules) if self._source else nullcontext()

    def _beside_blocks(self) -> list[str]:
        """Names of the decoder's modules that are no blocks: its embedding, its last norm."""
        return [self._name_of(m) for m in decoder_of(self._model).children() if not isinstance(m, nn.ModuleList)]

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self._model.named_modules() if other is module)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, folder: str | Path | None) -> torch.Tensor:
    """A tensor in memory, or in a mapped file in `folder` that goes when the tensor goes."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    try:
        with NamedTemporaryFile(prefix="moe-collab-hidden-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # so that the disk is not found full when a page is written
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)
    except OSError as error:
        raise MoeCollabError(
            f"{folder}: no file of {size} bytes for hidden states can be made there: {error}."
        ) from error


def _check_vocabularies(models: Sequence[_Streamed], tokens: torch.Tensor) -> None:
    one, other = models
    least, most = int(tokens.min()), int(tokens.max())
    if one.vocabulary != other.vocabulary or least < 0 or most >= one.vocabulary:
        raise MoeCollabError(
            f"{one.name} knows {one.vocabulary} tokens, {other.name} {other.vocabulary}, and the given ones are "
            f"{least} to {most}. Compare models of one tokenizer, on tokens of that tokenizer."
        )


def _per_token(models: Sequence[_Streamed], hidden: Sequence[torch.Tensor], tokens: torch.Tensor) -> PerToken:
    """What is found for each predicted token, [rows, length - 1], from the inputs of both lm_heads."""
    # The last token of a row predicts nothing; it is computed too, so that rows need not be told apart, and left out.
    text = tokens.roll(-1, dims=1).flatten()
    at_a_time = max(1, _LOGITS // (4 * models[0].vocabulary))
    parts = []
    for ids, *states in zip(*(t.split(at_a_time) for t in (text, *(h.flatten(0, 1) for h in hidden))), strict=True):
        found, base = (one.log_probabilities(state) for one, state in zip(models, states, strict=True))
        parts.append(PerToken.of(found, base.to(found.device), ids.to(found.device)))
    return PerToken(*(torch.cat(values).reshape(tokens.shape)[:, :-1] for values in zip(*parts, strict=True)))
