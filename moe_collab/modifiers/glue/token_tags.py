"""Which calibration tokens are padding, and of which domain the others are, seen from inside hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier

from ...distributed import everyones
from ...errors import MoeCollabError

__all__ = ["TokenTags"]

_PADDING = -1


class TokenTags:
    """The domain of each token of the current batch.

    Batches come in whatever order the pipeline draws them, layer by layer; a row is known by its token ids. A sample's
    domain is its `domain` in the data loader's dataset, which the collator may drop.
    """

    def __init__(self, modifier: Modifier, model: Any, loader: Any) -> None:
        self._rows: dict[bytes, torch.Tensor] = {}
        self._batches: dict[int, torch.Tensor] = {}
        named = dict(_named(getattr(loader, "dataset", ())))
        self.domains: list[str] = list(dict.fromkeys(everyones(list(dict.fromkeys(named.values()))))) or [""]
        for batch in loader:
            ids = torch.as_tensor(batch["input_ids"]).cpu()
            mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).cpu().bool()
            for row, valid in zip(ids, mask, strict=True):
                domain = self.domains.index(self._domain(named, row[valid]))
                self._rows[_key(row)] = torch.where(valid, domain, _PADDING)
        modifier.register_hook(model.get_input_embeddings(), self._remember, "forward_pre")

    def _domain(self, named: Mapping[bytes, str], ids: torch.Tensor) -> str:
        if not named:
            return self.domains[0]
        if (found := named.get(_key(ids))) is None:
            raise MoeCollabError(
                "the calibration set names a `domain` for some samples only, or its collator changes the tokens. Name "
                "one for every sample, or for none."
            )
        return found

    def _remember(self, _module: torch.nn.Module, args: tuple) -> None:
        ids = args[0].cpu()
        plain = torch.zeros(ids.shape[-1], dtype=torch.long)
        self._batches[_batch()] = torch.cat([self._rows.get(_key(row), plain) for row in ids])

    @property
    def valid(self) -> torch.Tensor:
        """Which tokens of the current batch are no padding, [tokens, bool]."""
        return self.current != _PADDING

    @property
    def current(self) -> torch.Tensor:
        """Domain of each token of the current batch, [tokens]; -1 for padding."""
        return self._batches[_batch()]


def _batch() -> int:
    return active_session().state.current_batch_idx


def _named(samples: Iterable) -> Iterable[tuple[bytes, str]]:
    for sample in samples:
        if not isinstance(sample, Mapping) or sample.get("domain") is None:
            continue
        ids = torch.as_tensor(sample["input_ids"])
        mask = torch.as_tensor(sample.get("attention_mask", torch.ones_like(ids))).bool()
        yield _key(ids[mask]), str(sample["domain"])


def _key(ids: torch.Tensor) -> bytes:
    return ids.long().numpy().tobytes()
