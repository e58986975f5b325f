"""Which calibration tokens are padding, and of which domain the others are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from llmcompressor.core import State

from ...distributed import everyones
from ...errors import MoeCollabError
from .data import one_pass, row_indices

__all__ = ["token_domains"]

_PADDING = -1


def token_domains(state: State) -> tuple[list[str], torch.Tensor]:
    """(names of the domains, each token's domain by its place there, -1 for padding), for the tokens of all batches.

    A sample's domain is its `domain` in the data loader's dataset, which the collator may drop. Where no sample names
    one, all are of one domain without a name.
    """
    masks: list[torch.Tensor] = []
    names: list[list[str | None]] = []
    next_samples = _sample_reader(state.data.calib)
    for batch in one_pass(state):
        ids, mask = _ids_and_mask(batch)
        masks.append(mask)
        names.append(_domain_names(next_samples(len(ids)), ids, mask))
    own = dict.fromkeys(name for rows in names for name in rows if name is not None)
    found = list(dict.fromkeys(everyones(list(own))))
    tags = everyones([_tags(mask, rows, found) for mask, rows in zip(masks, names, strict=True)])
    return found or [""], torch.cat(tags) if tags else torch.empty(0, dtype=torch.int16)


def _ids_and_mask(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's tokens and which of them are no padding, both [rows, length]."""
    ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"]).cpu())
    mask = torch.atleast_2d(torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).cpu().bool())
    if ids.shape != mask.shape:
        raise MoeCollabError(
            f"a calibration batch has an `attention_mask` of shape {list(mask.shape)} for `input_ids` of shape "
            f"{list(ids.shape)}, so nobody knows which tokens are padding. Give both the shape [rows, length]."
        )
    return ids, mask


def _sample_reader(loader: Any) -> Callable[[int], list[Any]]:
    """A function that gives the dataset's samples of the next batch, which has so many rows.

    Only sampled rows are touched. Where the loader's order is not known, they are taken as the dataset comes.
    """
    indices = row_indices(loader)
    if indices is None:
        stream = iter(getattr(loader, "dataset", ()))
        return lambda count: list(islice(stream, count))
    batches = iter(indices)
    return lambda _count: [loader.dataset[index] for index in next(batches)]


def _domain_names(samples: Sequence[Any], ids: torch.Tensor, mask: torch.Tensor) -> list[str | None]:
    """The `domain` of each row of a batch, by the samples it was made of; None where there is none."""
    named = [sample.get("domain") if isinstance(sample, Mapping) else None for sample in samples]
    if all(name is None for name in named):
        return [None] * len(ids)
    if len(named) != len(ids) or not all(map(_is_made_of, ids, mask, samples)):
        raise MoeCollabError(
            "the calibration samples name a `domain`, but the collator gives rows that are not the samples' own tokens "
            "in their order, so nobody knows which row is of which domain. Use a collator that only pads and truncates."
        )
    return [None if name is None else str(name) for name in named]


def _is_made_of(ids: torch.Tensor, mask: torch.Tensor, sample: Mapping[str, Any]) -> bool:
    """Whether a row holds the sample's tokens, of which either may be cut off at the beginning or at the end."""
    if "input_ids" not in sample:
        return True
    own = torch.as_tensor(sample["input_ids"]).flatten()
    own = own[torch.as_tensor(sample.get("attention_mask", torch.ones_like(own))).flatten().bool()]
    row = ids[mask]
    common = min(len(own), len(row))
    return torch.equal(own[:common], row[:common]) or torch.equal(own[-common:], row[-common:])


def _tags(mask: torch.Tensor, names: Sequence[str | None], domains: Sequence[str]) -> torch.Tensor:
    """The domain's index for each token, -1 for padding: [tokens], two bytes each."""
    if domains and None in names:
        raise MoeCollabError(
            "the calibration set names a `domain` for some samples only. Name one for every sample, or for none."
        )
    indices = torch.tensor([domains.index(name) if name is not None else 0 for name in names], dtype=torch.int16)
    return torch.where(mask, indices[:, None], _PADDING).to(torch.int16).flatten()
