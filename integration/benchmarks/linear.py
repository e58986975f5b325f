"""Part of `make bench-cpu`: linear layers in packed integers, against bfloat16 and everyone else's 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from moe_collab.kernels import cpu
from moe_collab.kernels.arena import Arena, allocate
from moe_collab.kernels.cpu.tuning import tune
from moe_collab.kernels.descriptors import TensorSpec
from moe_collab.kernels.plain import PLAIN
from moe_collab.kernels.reference import linear

from .contenders import those_that_run
from .random_weights import random_weights
from .timing import Stream, interleave

__all__ = ["bench_linear"]

Multiply = Callable[[torch.Tensor, int], torch.Tensor]
"""(x [tokens, columns] bfloat16, which copy of the weight) -> [tokens, rows]."""


@dataclass(frozen=True)
class Linear:
    """A layer of Qwen3-30B-A3B, in as many copies as keep it out of the cache."""

    name: str
    rows: int
    columns: int
    copies: int
    tokens: tuple[int, ...]
    group: int = 128


LAYERS = (Linear("q_proj", 4096, 2048, 32, (1, 8, 512)), Linear("lm_head, 32k rows", 32768, 2048, 8, (1, 8)))
BITS = (8, 6, 5, 4, 3, 2)


class Ours:
    """The kernel, and the first copy as the reference reads it."""

    def __init__(self, layer: Linear, bits: int) -> None:
        spec = TensorSpec(bits, layer.rows, layer.columns, layer.group)
        self.arena, self._plain = Arena([spec] * layer.copies, cpu.TileLayout()), Arena([spec], PLAIN)
        random_weights([self.arena, self._plain])
        self.bytes = (self.arena.codes.nbytes + self.arena.scales.nbytes) / layer.copies
        self.rows = layer.rows
        tune(self.arena)

    def run(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        """The kernel on one copy."""
        return self._call(torch.ops.moe_collab.linear_cpu, self.arena, x, copy)

    def error(self) -> float:
        """Relative error, bfloat16 in and out, against a float32 dequantized reference."""
        x = torch.randn(4, self.arena.specs[0].columns).bfloat16()
        exact = self._call(linear, self._plain, x.float(), 0)
        return float((self.run(x, 0).float() - exact).norm() / exact.norm())

    def _call(self, op: Callable[..., torch.Tensor], arena: Arena, x: torch.Tensor, copy: int) -> torch.Tensor:
        table = arena.table[copy : copy + 1]
        return op(x, arena.codes, arena.scales, arena.zero_points, table, None, 16, self.rows)


def bfloat16(layer: Linear) -> Multiply:
    """torch's, which vLLM uses."""
    size = (layer.copies, layer.rows, layer.columns)
    weights = allocate(layer.copies * layer.rows * layer.columns, torch.bfloat16).view(size)
    weights.copy_(torch.randn(size[1:]) / layer.columns**0.5)
    return lambda x, copy: torch.nn.functional.linear(x, weights[copy])


def int4pack(layer: Linear) -> Multiply:
    """torch's `_weight_int4pack_mm_for_cpu`."""
    codes = torch.randint(0, 15, (layer.rows, layer.columns), dtype=torch.int32)
    one = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    packed = [one.clone() for _ in range(layer.copies)]
    scales = torch.rand(layer.columns // layer.group, layer.rows, 2).bfloat16()
    return lambda x, copy: torch._weight_int4pack_mm_for_cpu(x, packed[copy], layer.group, scales)


def stock(layer: Linear) -> Multiply:
    """vLLM's own 4-bit kernel for CPUs, as its compressed-tensors method sets it up."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.model_executor.utils import set_weight_attrs
    from vllm.scalar_type import scalar_types

    shape = (layer.columns, layer.rows)
    config = MPLinearLayerConfig(shape, shape, scalar_types.uint4b8, torch.bfloat16, layer.group, False, False)
    kernel = CPUWNA16LinearKernel(config, "packed", "scale", "zero_point")
    modules = []
    for _ in range(layer.copies):
        module = torch.nn.Module()
        codes = torch.randint(-(1 << 31), (1 << 31) - 1, (layer.rows, layer.columns // 8), dtype=torch.int32)
        scales = torch.rand(layer.rows, layer.columns // layer.group).bfloat16()
        for name, value, packed in (("packed", codes, {"packed_dim": 1}), ("scale", scales, {})):
            parameter = torch.nn.Parameter(value, requires_grad=False)
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, **packed})
            module.register_parameter(name, parameter)
        module.register_parameter("zero_point", None)
        module.register_parameter("bias", None)
        kernel.process_weights_after_loading(module)
        modules.append(module)
    return lambda x, copy: kernel.apply_weights(modules[copy], x)


def bench_linear(threads: int, stream: Stream, bits: Sequence[int] = BITS) -> tuple[list[dict], dict[str, str]]:
    """(rows of cpu.json, why competitors are absent)."""
    rows: list[dict] = []
    absent: dict[str, str] = {}
    for layer in LAYERS:
        ours = {b: Ours(layer, b) for b in bits}
        x = torch.randn(1, layer.columns).bfloat16()
        builders = {"bf16": bfloat16, "int4pack": int4pack, "vllm 4 bits": stock}
        others, missing = those_that_run({k: partial(build, layer) for k, build in builders.items()}, (x, 0))
        absent |= {f"linear, {name}": why for name, why in missing.items()}
        runs = others | {f"ours {b}": layer_of_ours.run for b, layer_of_ours in ours.items()}
        for tokens in layer.tokens:
            x = torch.randn(tokens, layer.columns).bfloat16()
            timed = {name: _cycle(run, x, layer.copies) for name, run in runs.items()}
            seconds, rate = interleave(timed, 8 if tokens < 64 else 2, stream)
            new = [_row(layer, b, tokens, threads, rate, ours[b], seconds) for b in ours]
            for row in new:
                print(*row.values(), flush=True)
            rows += new
    return rows, absent


def _cycle(run: Multiply, x: torch.Tensor, copies: int) -> Callable[[int], object]:
    return lambda index: run(x, index % copies)


def _row(layer: Linear, bits: int, tokens: int, threads: int, rate: float, ours: Ours, seconds: dict) -> dict:
    mine = seconds[f"ours {bits}"]

    def ratio(name: str) -> float | None:
        return round(seconds[name] / mine, 3) if name in seconds else None

    return {
        "case": "linear",
        "shape": layer.name,
        "bits": str(bits),
        "tokens": tokens,
        "threads": threads,
        "ours_us": round(mine * 1e6, 1),
        "vs_vllm_bf16": ratio("bf16"),
        "roof": round(ours.bytes / mine / rate, 3),
        "vs_ggml": None,
        "vs_vllm_4bit": ratio("vllm 4 bits") if bits == 4 else None,
        "vs_int4pack": ratio("int4pack") if bits == 4 else None,
        "rel_error": round(ours.error(), 5),
    }
