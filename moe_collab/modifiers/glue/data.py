"""The calibration data of a run, as our modifiers read them: the same batches in the same order, however often."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from compressed_tensors.offload import set_onload_device
from llmcompressor.core import State
from torch.utils.data import DataLoader, IterableDataset

from ...calibration import inputs_of
from ...calibration.at_hand import compute_device
from ...distributed import everyones
from ...errors import MoeCollabError

__all__ = ["calibration_batches", "check_data", "digest", "one_pass", "row_indices"]

_SEED = 0
"""Of samples that are drawn at random where the user gave no generator."""


class _FrozenOrder(list):
    """What a sampler drew once: indices into the dataset, or lists of them for each batch."""


def check_data(state: State, who: str) -> None:
    """Freeze the calibration sample, which all passes of all modifiers then see; no data is read.

    Raises `MoeCollabError` if oneshot() was given none. Every modifier of ours calls it before anything is read.
    """
    if state.data is None or state.data.calib is None:
        raise MoeCollabError(f"{who}: it needs calibration data. Give oneshot() a dataset.")
    _freeze(state.data.calib)


def calibration_batches(state: State) -> list[dict[str, torch.Tensor]]:
    """What the model is called with for each calibration batch, of all processes, on the accelerator if there is one.

    The model is onloaded there too from now on, where llm-compressor's own pipelines have not seen to it yet.
    """
    set_onload_device(state.model, compute_device())
    batches = everyones([inputs_of(batch, torch.device("cpu")) for batch in one_pass(state)])
    return [inputs_of(batch, compute_device()) for batch in batches]


def one_pass(state: State) -> Iterator[Mapping[str, Any]]:
    """This process's calibration batches; `MoeCollabError` if they are not those of the run's earlier passes.

    Only a map-style dataset behind a `DataLoader` can be frozen. Streams and datasets or collators that draw at random
    are found out here.
    """
    seen: list[bytes] = []
    known: list[bytes] | None = vars(state.data).get("seen_batches")
    for batch in state.data.calib or ():
        seen.append(digest(batch))
        if known is not None and known[: len(seen)] != seen:
            break
        yield batch
    if known is None:
        vars(state.data)["seen_batches"] = seen
    elif known != seen:
        raise MoeCollabError(
            f"the calibration data changed between two passes over it, at batch {_first_difference(known, seen)} of "
            f"{len(known)}. Several passes must see the same tokens, or what is decided in one does not hold in the "
            "next. Give oneshot() a list, a datasets.Dataset or a DataLoader over one, whose rows and collator draw "
            "nothing at random; of a stream, take as many rows as are needed into a list."
        )


def digest(batch: Mapping[str, Any]) -> bytes:
    """Of a batch's `input_ids`: equal for equal tokens in an equal shape."""
    if "input_ids" not in batch:
        raise MoeCollabError(
            f"a calibration batch has no `input_ids`, only {sorted(batch)}. Give oneshot() tokenized samples, or a "
            "dataset with a `text` or `messages` column."
        )
    ids = torch.as_tensor(batch["input_ids"]).cpu().long().contiguous()
    return blake2b(ids.numpy().tobytes() + str(tuple(ids.shape)).encode(), digest_size=16).digest()


def row_indices(loader: Any) -> list[list[int]] | None:
    """The dataset's indices that each batch is made of, if the order is frozen."""
    order = _index_sampler(loader)
    if not isinstance(order, _FrozenOrder):
        return None
    return [list(batch) if isinstance(batch, Iterable) else [batch] for batch in order]


def _freeze(loader: Any) -> None:
    """Let a `DataLoader` draw its sample once and for all; what has no sampler is left as it is.

    oneshot() shuffles with a `RandomSampler` without a generator: then each pass sees other rows in another order.
    """
    sampler = _index_sampler(loader)
    if sampler is None or isinstance(sampler, _FrozenOrder):
        return
    # Samplers without a generator of their own draw from torch's, which gets its state back.
    before = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(_SEED)
    try:
        order = _FrozenOrder(sampler)
    finally:
        torch.random.set_rng_state(before)
    # DataLoader.__setattr__ forbids it; persistent workers of an earlier pass would go on with the old sampler.
    object.__setattr__(loader, "sampler" if loader.batch_sampler is None else "batch_sampler", order)
    loader._iterator = None


def _index_sampler(loader: Any) -> Any:
    """What chooses the rows: of batches, or of single rows with `batch_size=None`; None for streams."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _first_difference(known: list[bytes], seen: list[bytes]) -> int:
    same = (position for position, pair in enumerate(zip(known, seen, strict=False)) if pair[0] != pair[1])
    return next(same, min(len(known), len(seen)))
