"""The Triton kernels on the GPU at hand: checked, then timed against copying, bfloat16 and vLLM's Triton kernels.

    make bench-gpu

writes `build/bench/gpu.json`. Needs torch, Triton, pydantic and safetensors alone; of a vLLM that is installed, or lies
where --vllm says, one file is read. Every call finds the weights it reads cold; launches are those of CUDA graphs.
What fails is named at the end and in the file, which holds everything else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from moe_collab.errors import MoeCollabError
from moe_collab.kernels import reference
from moe_collab.kernels import triton as ours
from moe_collab.kernels.arena import Arena, Layout
from moe_collab.kernels.descriptors import TensorSpec
from moe_collab.kernels.plain import PLAIN
from moe_collab.kernels.triton.trial import (
    EXPERTS,
    LINEARS,
    Experts,
    ExpertsShape,
    Linear,
    LinearShape,
    activations,
    device,
    seconds,
)
from moe_collab.kernels.tune import climb, steps

from .random_weights import random_weights
from .vllm_triton import Tile, VllmExperts, find_vllm, kernels_of

MIXES = ((2,), (3,), (4,), (5,), (6,), (8,), (16,), (2, 3, 4))
TOKENS = (1, 4, 8, 16, 512, 4096)
DECODE = 16
"""Up to as many tokens, bytes of weights bound the time; above, arithmetic."""
GROUP = 128
MOST_ERROR = 1e-2
"""Relative, of bfloat16 kernels against float32."""
CHECKED = (1, 16, 300, 1024)
"""Tokens of the batches that are compared: one for each tile in use."""
COMPETITORS = {"vs_vllm_bf16": 16, "vs_vllm_triton_4bit": 4}
"""Not vLLM's Marlin kernels, which it prefers for 4 bits on NVIDIA's."""
STARTS = (
    Tile(16, 64, 64, 1, 4, 5),
    Tile(16, 64, 256, 1, 4, 2),
    Tile(64, 128, 64, 1, 4, 3),
    Tile(128, 256, 64, 16, 8, 4),
)
"""Where the search for theirs begins: the kinds of tile in vLLM's own files, for few tokens to many."""
LADDERS = Tile((16, 32, 64, 128), (32, 64, 128, 256), (32, 64, 128, 256), (1, 8, 16, 32), (2, 4, 8), (2, 3, 4, 5))

Row = dict[str, Any]


class Bench:
    """Makes rows, prints each, and keeps the file up to date."""

    def __init__(self, path: Path, mixes: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> None:
        self._path, self._mixes, self._tokens = path, mixes, tokens
        self.rows: list[Row] = []
        self.errors: list[str] = []
        self.document = {"machine": machine(), "ceilings": ceilings(), "errors": self.errors, "rows": self.rows}
        print(json.dumps(self.document), flush=True)

    def _add(self, key: Row, time: float, read: float, flops: float, error: float, more: Row) -> None:
        ceilings = self.document["ceilings"]
        row = {**key, "us": 1e6 * time, "error": error}
        if key["tokens"] <= DECODE:
            row["share_of_copy"] = read / time / ceilings["copy_bytes_per_s"]
        else:
            row["share_of_peak"] = flops / time / ceilings["bf16_flops"]
        self.rows.append(row | more)
        self._save()
        _print(self.rows[-1])

    def _save(self) -> None:
        self._path.write_text(json.dumps(self.document, indent=1) + "\n")

    def attempt(self, what: str, make: Callable[[], None]) -> None:
        """Whatever goes wrong, the next rows are made all the same."""
        try:
            make()
        except Exception as error:
            self.errors.append(f"{what}: {type(error).__name__}: {error}")
            print(f"error: {self.errors[-1]}", flush=True)
            self._save()

    def experts(self, name: str, shape: ExpertsShape) -> None:
        """Rows of one shape."""
        per_byte: dict[tuple[int, int], float] = {}
        for bits in self._mixes:
            self.attempt(f"{name} experts, {bits} bits", partial(self._experts, name, shape, bits, per_byte))

    def _experts(
        self, name: str, shape: ExpertsShape, bits: tuple[int, ...], per_byte: dict[tuple[int, int], float]
    ) -> None:
        """`per_byte`: seconds by (bits, tokens), of layers alike in bits."""
        error = check_experts(shape, bits)
        layer = Experts(shape, bits, GROUP)
        for count in self._tokens:
            time = seconds(layer.calls(count))
            read = bytes_by_bits(layer, count)
            more: Row = {}
            if len(bits) == 1:
                per_byte[bits[0], count] = time / read[bits[0]]
            elif all((b, count) in per_byte for b in bits):
                more["vs_uniform"] = sum(per_byte[b, count] * read[b] for b in bits) / time
            flops = 6.0 * count * shape.top_k * shape.hidden * shape.width
            key = {"layer": f"{name} experts", "tokens": count, "bits": ",".join(map(str, bits))}
            self._add(key, time, sum(read.values()), flops, error, more)

    def linear(self, name: str, shape: LinearShape) -> None:
        """Rows of one shape, with torch's bfloat16 beside it."""
        weights = [activations(*shape) for _ in range(16)]
        inputs = {count: activations(count, shape.columns) for count in self._tokens}
        dense = {
            count: seconds([partial(torch.nn.functional.linear, x, w) for w in weights]) for count, x in inputs.items()
        }
        for bits in self._mixes:
            self.attempt(f"{name} linear, {bits} bits", partial(self._linear, name, shape, bits, dense))

    def _linear(self, name: str, shape: LinearShape, bits: tuple[int, ...], dense: dict[int, float]) -> None:
        error = check_linear(shape, bits)
        layer = Linear(shape, bits, GROUP)
        for count in self._tokens:
            time = seconds(layer.calls(count))
            key = {"layer": f"{name} linear", "tokens": count, "bits": ",".join(map(str, bits))}
            flops = 2.0 * count * shape.rows * shape.columns
            self._add(key, time, layer.bytes, flops, error, {"vs_bf16": dense[count] / time})

    def competitors(self, name: str, shape: ExpertsShape, kernels: Any) -> None:
        """Put beside the rows of one shape what vLLM's `kernels` take."""
        for key, bits in COMPETITORS.items():
            self.attempt(f"vLLM's {bits} bits, {name}", partial(self._competitor, key, name, shape, kernels, bits))

    def _competitor(self, key: str, name: str, shape: ExpertsShape, kernels: Any, bits: int) -> None:
        """At its best tile for each number of tokens."""
        layer, best = VllmExperts(kernels, shape, bits, GROUP), []
        for count in self._tokens:
            routings = shape.routings(count)
            starts = list(dict.fromkeys([*best, *STARTS]))
            tile, _, time = climb(starts, neighbours, lambda t, ids=routings: [layer.calls(ids, t)])  # type: ignore[misc]
            best = [tile]
            print(f"vLLM {bits} bits, {count} tokens: {1e6 * time:.1f} us with {tile}", flush=True)
            for row in self.rows:
                if (row["layer"], row["tokens"]) == (f"{name} experts", count):
                    row[key] = 1e6 * time / row["us"]
                    _print({k: row[k] for k in ("layer", "tokens", "bits", key)})
            self._save()


def _print(row: Row) -> None:
    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)


def neighbours(tile: Tile) -> list[Tile]:
    """One step of one setting away."""
    found = []
    for name, ladder in LADDERS._asdict().items():
        found += [tile._replace(**{name: value}) for value in steps(ladder, getattr(tile, name))]
    return found


def bytes_by_bits(layer: Experts, tokens: int) -> dict[int, float]:
    """Mean bytes of weights that a call reads, by their bits."""
    routings = layer.shape.routings(tokens)
    read: dict[int, float] = {}
    for ids in routings:
        for expert in ids.unique().tolist():
            for projection in range(3):
                bits = layer.specs[3 * expert + projection].num_bits
                read[bits] = read.get(bits, 0.0) + int(layer.bytes[expert, projection]) / len(routings)
    return read


def check_experts(shape: ExpertsShape, bits: Sequence[int]) -> float:
    """Largest relative error against the float32 reference, of few tokens and of many; of the first experts."""
    few = shape._replace(experts=min(shape.experts, 2 * shape.top_k))
    specs = few.specs(bits, GROUP)
    plain, fields = _arguments(specs, PLAIN, (-1, 3)), _arguments(specs, ours.FieldLayout(), (-1, 3))
    errors = []
    for tokens in CHECKED:
        x, weights = activations(tokens, shape.hidden), torch.rand(tokens, shape.top_k, device=device())
        ids = few.routings(tokens)[0].to(device())
        rest = (None, None, "silu", False, 16)
        exact = reference.fused_experts(x.float(), weights, ids, *plain, *rest)
        found = ours.fused_experts(specs)(x, weights, ids, *fields, *rest)
        errors.append(_error(found, exact, f"{shape}, {bits} bits, {tokens} tokens"))
    return max(errors)


def check_linear(shape: LinearShape, bits: Sequence[int]) -> float:
    """As `check_experts`."""
    specs = shape.specs(bits, GROUP)
    plain, fields = _arguments(specs, PLAIN, (-1,)), _arguments(specs, ours.FieldLayout(), (-1,))
    errors = []
    for tokens in CHECKED:
        x = activations(tokens, shape.columns)
        exact = reference.linear(x.float(), *plain, None, 16, shape.rows)
        found = ours.linear(specs)(x, *fields, None, 16, shape.rows)
        errors.append(_error(found, exact, f"{shape}, {bits} bits, {tokens} tokens"))
    return max(errors)


def _arguments(specs: Sequence[TensorSpec], layout: Layout, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    arena = Arena(specs, layout, device())
    random_weights([arena])
    table = arena.table.view(*shape, arena.table.shape[1]).to(arena.device)
    return arena.codes, arena.scales, arena.zero_points, table


def _error(found: torch.Tensor, exact: torch.Tensor, what: str) -> float:
    error = float((found.float() - exact).norm() / exact.norm())
    if not error < MOST_ERROR:
        raise MoeCollabError(
            f"{what}: relative error {error:.2e} where {MOST_ERROR:.0e} is allowed. The kernels are wrong here; please "
            "report it, and serve with MOE_COLLAB_BACKEND=reference."
        )
    return error


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {"device": ours.check(), "driver": driver, "torch": torch.__version__, "triton": triton.__version__}


def ceilings() -> dict[str, float]:
    """What this device reaches at best: bytes a copy reads and writes, operations of a bfloat16 product, a second."""
    size, side = (1 << 32, 8192) if torch.cuda.is_available() else (1 << 20, 128)
    source = torch.randint(256, (2, size), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copy = seconds([partial(t.copy_, s) for t, s in zip(target, source, strict=True)])
    a, b = activations(side, side), activations(side, side)
    return {"copy_bytes_per_s": 2 * size / copy, "bf16_flops": 2 * side**3 / seconds([partial(torch.mm, a, b)] * 4)}


def main(arguments: Sequence[str] | None = None) -> None:
    """All rows, vLLM's last. Raises `MoeCollabError` in the end if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument(
        "--vllm", type=Path, default=find_vllm(), help="folder of the package, default: where it is installed"
    )
    parser.add_argument("--shapes", nargs="+", choices=list(EXPERTS), default=list(EXPERTS))
    parser.add_argument("--bits", nargs="+", default=[",".join(map(str, bits)) for bits in MIXES])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    kernels = kernels_of(options.vllm, options.output) if options.vllm else None
    mixes = [tuple(map(int, bits.split(","))) for bits in options.bits]
    bench = Bench(options.output / "gpu.json", mixes, options.tokens)
    for name in options.shapes:
        bench.experts(name, EXPERTS[name])
        bench.attempt(f"{name} linear", partial(bench.linear, name, LINEARS[name]))
    if kernels is None:
        print("vLLM is not installed here, so its times are missing; --vllm names a folder that has it.")
    for name in options.shapes if kernels else ():
        bench.competitors(name, EXPERTS[name], kernels)
    if bench.errors:
        raise MoeCollabError("\n".join([f"{len(bench.errors)} parts failed:", *bench.errors]))


if __name__ == "__main__":
    try:
        main()
    except MoeCollabError as error:
        sys.exit(f"error: {error}")
