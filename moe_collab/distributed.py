"""Calibration spread over the processes of `torchrun`: what they saw together, decided once for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from compressed_tensors.distributed import get_source_rank, is_distributed, is_source_process
from compressed_tensors.utils import update_offload_parameter
from torch import distributed, nn

__all__ = ["agreed", "everyones", "is_distributed", "is_source_process", "share", "store", "wait"]

T = TypeVar("T")


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of `items` that this process sees to; every one of them is one process's."""
    return items[distributed.get_rank() :: distributed.get_world_size()] if is_distributed() else items


def everyones(items: list[T]) -> list[T]:
    """The lists of all processes joined, by rank: the order of the data, of which each process has a run."""
    if not is_distributed():
        return items
    found: list[Any] = [None] * distributed.get_world_size()
    with _on_cpu() as group:
        distributed.all_gather_object(found, items, group)
    return [item for own in found for item in own]


def agreed(value: T) -> T:
    """The source process's value, in every process: what is decided from sums may differ in the last bit."""
    if not is_distributed():
        return value
    values = [value]
    with _on_cpu() as group:
        distributed.broadcast_object_list(values, get_source_rank(), group)
    return values[0]


def store(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter another value, under offload too.

    Processes share what is offloaded: none may write while another still reads, so all come here in the same order.
    """
    wait()
    update_offload_parameter(module, name, value)
    wait()


def wait() -> None:
    """Return when all processes have come here."""
    if is_distributed():
        distributed.barrier()


@contextmanager
def _on_cpu() -> Iterator[Any]:
    group = distributed.new_group(backend="gloo")
    try:
        yield group
    finally:
        distributed.destroy_process_group(group)
