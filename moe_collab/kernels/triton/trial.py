"""Layers of random weights on the device, and how long a batch takes them: what tuner and benchmark measure with."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple, Protocol

import torch

from ..arena import Arena
from ..descriptors import Field, TensorSpec
from . import fused_experts, linear
from .layout import FieldLayout

__all__ = [
    "EXPERTS",
    "LINEARS",
    "Call",
    "Experts",
    "ExpertsShape",
    "Linear",
    "LinearShape",
    "Trial",
    "activations",
    "device",
    "seconds",
]

_CACHED_BYTES = 256 << 20
"""More than caches hold."""
_MEASURED_BYTES = 512 << 20
"""What the calls of one measurement read at least."""
_MOST_CALLS = 64 if torch.cuda.is_available() else 2

Call = Callable[[], torch.Tensor]


class ExpertsShape(NamedTuple):
    """Of a layer's routed experts: gate and up are [width, hidden]."""

    hidden: int
    width: int
    experts: int
    top_k: int

    def specs(self, bits: Sequence[int], group: int) -> list[TensorSpec]:
        """Gate, up and down of each expert, `bits` used in turn."""
        sizes = ((self.width, self.hidden), (self.width, self.hidden), (self.hidden, self.width))
        return [_spec(bits[(e + p) % len(bits)], *sizes[p], group) for e in range(self.experts) for p in range(3)]

    def routings(self, tokens: int) -> list[torch.Tensor]:
        """Experts drawn for each of several calls, int32 [tokens, top_k]."""
        generator = torch.Generator().manual_seed(tokens)
        read = min(tokens * self.top_k, self.experts) * 3 * self.hidden * self.width // 4
        scores = torch.rand(_num_calls(read), tokens, self.experts, generator=generator)
        return list(scores.topk(self.top_k).indices.int())

    def copies(self, bytes_per_weight: float) -> int:
        """So many layers alike, taken in turn, that a token's experts are never those that a cache still holds."""
        read = self.top_k * 3 * self.hidden * self.width * bytes_per_weight
        return min(math.ceil(_CACHED_BYTES / read), _MOST_CALLS)


class LinearShape(NamedTuple):
    """Of a linear layer's weight."""

    rows: int
    columns: int

    def specs(self, bits: Sequence[int], group: int) -> list[TensorSpec]:
        """Pieces of about equal size, one for each of `bits`."""
        pieces = [self.rows // len(bits)] * (len(bits) - 1)
        pieces.append(self.rows - sum(pieces))
        return [_spec(b, rows, self.columns, group) for b, rows in zip(bits, pieces, strict=True)]


def _spec(bits: int, rows: int, columns: int, group: int) -> TensorSpec:
    return TensorSpec(bits, rows, columns) if bits == 16 else TensorSpec(bits, rows, columns, math.gcd(group, columns))


def _num_calls(read: int) -> int:
    """Of a measurement whose calls read so many bytes each."""
    return min(max(2, -(-_MEASURED_BYTES // read)), _MOST_CALLS)


EXPERTS = {"qwen3-30b": ExpertsShape(2048, 768, 128, 8), "deepseek-v3": ExpertsShape(7168, 2048, 256, 8)}
"""Of Qwen3-30B-A3B and DeepSeek-V3: what is tuned and timed unless others are named."""
LINEARS = {"qwen3-30b": LinearShape(5120, 2048), "deepseek-v3": LinearShape(4096, 7168)}
"""Theirs: the fused q, k and v, and the shared expert's fused gate and up."""


class Trial(Protocol):
    """A layer, with a call for each of several inputs that share little in caches."""

    def calls(self, tokens: int) -> list[Call]:
        """At least two, of `tokens` random tokens each."""


def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU if they are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Experts:
    """Layers of routed experts alike; each call is of the next one, and chooses experts at random."""

    def __init__(self, shape: ExpertsShape, bits: Sequence[int], group: int = 128) -> None:
        self.shape, self.specs = shape, shape.specs(bits, group)
        self._op = fused_experts(self.specs)
        self.bytes = torch.tensor([_bytes(spec) for spec in self.specs]).view(shape.experts, 3)
        """Of the codes and scales of each expert's gate, up and down."""
        copies = shape.copies(int(self.bytes.sum()) / sum(spec.rows * spec.columns for spec in self.specs))
        self._arenas = [_random_arena(self.specs) for _ in range(copies)]

    def calls(self, tokens: int) -> list[Call]:
        """See `Trial`; one for each of the shape's routings."""
        x, place = activations(tokens, self.shape.hidden), device()
        weights = torch.rand(tokens, self.shape.top_k, device=place)
        rest = (None, None, "silu", False, 16)
        layers = cycle([_arguments(arena, (-1, 3)) for arena in self._arenas])
        every = [(ids.to(place), *next(layers)) for ids in self.shape.routings(tokens)]
        return [lambda a=a: self._op(x, weights, *a, *rest) for a in every]  # type: ignore[misc]


class Linear:
    """Linear layers alike, so many that a call finds its own cold; as many pieces as there are bits."""

    def __init__(self, shape: LinearShape, bits: Sequence[int], group: int = 128) -> None:
        self.shape, self.specs = shape, shape.specs(bits, group)
        self._op = linear(self.specs)
        self.bytes = sum(map(_bytes, self.specs))
        """Of codes and scales."""
        self._arenas = [_random_arena(self.specs) for _ in range(_num_calls(self.bytes))]

    def calls(self, tokens: int) -> list[Call]:
        """See `Trial`."""
        x = activations(tokens, self.shape.columns)
        every = [_arguments(arena, (-1,)) for arena in self._arenas]
        return [lambda a=a: self._op(x, *a, None, 16, self.shape.rows) for a in every]  # type: ignore[misc]


def activations(tokens: int, columns: int) -> torch.Tensor:
    """Random, [tokens, columns]: bfloat16; float32 for the interpreter, which multiplies bfloat16 wrongly."""
    x = torch.randn(tokens, columns, device=device())
    return x.bfloat16() if x.is_cuda else x


def _bytes(spec: TensorSpec) -> int:
    layout = FieldLayout()
    return layout.num_codes(spec) * layout.codes_dtype.itemsize + layout.num_scales(spec) * layout.scales_dtype.itemsize


def _random_arena(specs: Sequence[TensorSpec]) -> Arena:
    """Any words are codes, and the kernels' speed depends on no value as long as all are finite."""
    arena = Arena(specs, FieldLayout(), device())
    arena.scales.copy_(torch.rand(arena.scales.shape, device=arena.device).add_(0.5).mul_(0.01))
    for row, spec in zip(arena.table, specs, strict=True):
        start, count = int(row[Field.CODES]), arena.layout.num_codes(spec)
        if spec.num_bits == 16:
            arena.codes[start : start + count].view(torch.bfloat16).normal_(std=0.01)
        else:
            arena.codes[start : start + count].random_(-(1 << 31), (1 << 31) - 1)
    return arena


def _arguments(arena: Arena, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    table = arena.table.view(*shape, arena.table.shape[1]).to(arena.device)
    return arena.codes, arena.scales, arena.zero_points, table


def seconds(calls: Sequence[Callable[[], object]], rounds: int = 7) -> float:
    """Median over `rounds` of the seconds of one call, all made in a row.

    On a GPU from a CUDA graph, so that no launch waits for Python; without one, of a single round.
    """
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls)
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # while it runs, the next one is launched: that takes no time of it
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found) / len(calls)
