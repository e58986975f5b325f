"""Results that come from the accelerator many at a time, so that it does not wait for the host after each of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Arrivals"]

_WAITING = 256 << 20
"""Bytes of results on the accelerator that are fetched together."""


class Arrivals:
    """Hands tensors to functions that want them on the CPU, in the order in which they were sent.

    Those of the CPU are handed over at once. Those of an accelerator stay there until there are 256 MiB of them, or the
    block ends, so that the host waits once for the results of many experts.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[torch.Tensor, Callable[[torch.Tensor], object]]] = []
        self._bytes = 0

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is None:
            self._hand_over()

    def send(self, tensor: torch.Tensor, use: Callable[[torch.Tensor], object]) -> None:
        """Have `use` called with `tensor` on the CPU."""
        if tensor.device.type == "cpu":
            use(tensor)
            return
        self._sent.append((tensor, use))
        self._bytes += tensor.nbytes
        if self._bytes >= _WAITING:
            self._hand_over()

    def _hand_over(self) -> None:
        sent, self._sent, self._bytes = self._sent, [], 0
        for tensor, use in sent:
            use(tensor.cpu())
