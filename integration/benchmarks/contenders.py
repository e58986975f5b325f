"""The MoE layers that the CPU benchmark times: ours in every storage, and everyone else's at their best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_collab.kernels import cpu
from moe_collab.kernels.arena import Arena, allocate
from moe_collab.kernels.descriptors import TensorSpec
from moe_collab.kernels.plain import PLAIN
from moe_collab.kernels.reference import fused_experts

from .random_weights import random_weights

__all__ = [
    "MIX",
    "Ours",
    "Shape",
    "int4pack",
    "naive",
    "those_that_run",
    "vllm_bfloat16",
]

MIX = ((4, 4, 4), (2, 2, 3), (3, 3, 4), (2, 2, 2))
"""(gate, up, down) bits of experts in turn: what an allocator gives at about 3 bits."""

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [tokens, hidden] bfloat16, router weights [tokens, top_k], ids int32) -> [tokens, hidden]."""


@dataclass(frozen=True)
class Shape:
    """Of one MoE layer."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int = 8
    group: int = 128

    def specs(self, bits: Sequence[Sequence[int]], experts: int) -> list[TensorSpec]:
        """Gate, up and down of each expert, `bits` used in turn."""
        shapes = ((self.width, self.hidden), (self.width, self.hidden), (self.hidden, self.width))
        return [
            TensorSpec(b, *shape, self.group if b < 16 else 0)
            for e in range(experts)
            for b, shape in zip(bits[e % len(bits)], shapes, strict=True)
        ]


class Ours:
    """All experts in tiles, and the first of them as the reference reads them."""

    def __init__(self, shape: Shape, bits: Sequence[Sequence[int]], ternary_bits: int = 2) -> None:
        self.shape = shape
        self.arena = Arena(shape.specs(bits, shape.experts), cpu.TileLayout(ternary_bits))
        self._plain = Arena(shape.specs(bits, shape.top_k), PLAIN)
        random_weights([self.arena, self._plain])
        self._table = self.arena.table.view(shape.experts, 3, -1)
        self.bytes_per_expert = (self.arena.codes.nbytes + self.arena.scales.nbytes) / shape.experts

    def run(self, activation_bits: int = 16) -> Run:
        """The kernel."""

        def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return self._call(torch.ops.moe_collab.fused_experts_cpu, self.arena, x, weights, ids, activation_bits)

        return call

    def error(self, activation_bits: int = 16, tokens: int = 4) -> float:
        """Relative error of the kernel, bfloat16 in and out, against a float32 dequantized reference."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(tokens, self.shape.hidden, generator=generator).bfloat16()
        weights = torch.rand(tokens, self.shape.top_k, generator=generator)
        ids = torch.arange(self.shape.top_k, dtype=torch.int32).repeat(tokens, 1)
        exact = self._call(fused_experts, self._plain, x.float(), weights, ids, 16)
        found = self.run(activation_bits)(x, weights, ids).float()
        return float((found - exact).norm() / exact.norm())

    def _call(
        self,
        op: Callable[..., torch.Tensor],
        arena: Arena,
        x: torch.Tensor,
        w: torch.Tensor,
        ids: torch.Tensor,
        bits: int,
    ) -> torch.Tensor:
        table = arena.table.view(-1, 3, arena.table.shape[1])
        return op(x, w, ids, arena.codes, arena.scales, arena.zero_points, table, None, None, "silu", False, bits)


def those_that_run(
    builders: Mapping[str, Callable[[], Callable]],  # type: ignore[type-arg]
    arguments: Sequence[object],
) -> tuple[dict[str, Callable], dict[str, str]]:  # type: ignore[type-arg]
    """(competitors by name, why the others are absent); each is tried once with `arguments`."""
    found, absent = {}, {}
    for name, build in builders.items():
        try:
            run = build()
            run(*arguments)
            found[name] = run
        except Exception as error:  # other people's code on a processor they may not have had in mind
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found, absent


def vllm_bfloat16(shape: Shape, isa: str) -> Run:
    """vLLM's own fused MoE for CPUs; `isa` "vec" or, where the processor has it, "amx"."""
    import vllm._custom_ops as ops

    if isa == "amx":
        if not torch.cpu._is_amx_tile_supported():
            raise RuntimeError("this processor has no AMX")
        # The system must allow its registers to a process first; in vLLM some earlier layer has done so.
        torch.cpu._init_amx()
    weights = []
    for size in ((shape.experts, 2 * shape.width, shape.hidden), (shape.experts, shape.hidden, shape.width)):
        plain = (torch.randn(size[1:]) / size[2] ** 0.5).bfloat16().expand(size).contiguous()
        packed = ops.cpu_prepack_moe_weight(plain, isa)
        # Huge pages for it as for ours.
        weights.append(allocate(packed.numel(), torch.bfloat16).view(packed.shape).copy_(packed))

    def call(x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, *weights, None, None, router, ids, "silu", isa)
        return out

    return call


def _expert_loop(shape: Shape, gate_up: Callable, down: Callable) -> Run:  # type: ignore[type-arg]
    def call(x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape)
        for expert in ids.unique().tolist():
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            both = gate_up(x[tokens], expert)
            inner = torch.nn.functional.silu(both[:, : shape.width]) * both[:, shape.width :]
            out.index_add_(0, tokens, down(inner, expert).float() * router[tokens, slots, None])
        return out.bfloat16()

    return call


def int4pack(shape: Shape) -> Run:
    """torch's `_weight_int4pack_mm_for_cpu`, expert by expert."""

    def build(rows: int, columns: int) -> Callable:  # type: ignore[type-arg]
        one = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 15, (rows, columns), dtype=torch.int32), 1)
        packed = [one.clone() for _ in range(shape.experts)]
        scales = [torch.rand(columns // shape.group, rows, 2).bfloat16() for _ in range(shape.experts)]
        return lambda x, e: torch._weight_int4pack_mm_for_cpu(x, packed[e], shape.group, scales[e])

    return _expert_loop(shape, build(2 * shape.width, shape.hidden), build(shape.hidden, shape.width))


def naive(shape: Shape) -> Run:
    """Dequantize 4-bit codes to bfloat16, then multiply."""

    def build(rows: int, columns: int) -> Callable:  # type: ignore[type-arg]
        codes = torch.randint(0, 255, (shape.experts, rows, columns // 2), dtype=torch.uint8)
        scales = torch.rand(shape.experts, rows, columns // shape.group, 1).bfloat16()

        def multiply(x: torch.Tensor, e: int) -> torch.Tensor:
            nibbles = torch.stack([codes[e] & 15, codes[e] >> 4], -1).view(rows, -1, shape.group)
            return x @ ((nibbles.bfloat16() - 8) * scales[e]).view(rows, columns).T

        return multiply

    return _expert_loop(shape, build(2 * shape.width, shape.hidden), build(shape.hidden, shape.width))
