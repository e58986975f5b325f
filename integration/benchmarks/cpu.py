"""`make bench-cpu`: our CPU kernels against everyone else's, side by side, on experts that are not in the cache.

Writes build/bench/cpu.json and prints a table. Every row's competitors ran in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moe_collab.formats import TERNARY
from moe_collab.kernels import cpu
from moe_collab.kernels.cpu.tuning import tune

from .contenders import MIX, Ours, Run, Shape, int4pack, naive, those_that_run, vllm_bfloat16
from .ggml_moe import GgmlMoE
from .linear import bench_linear
from .repack import bench_repack
from .timing import Stream, interleave

SHAPES = {
    "qwen3-30b": Shape("qwen3-30b", 2048, 768, 64),
    "deepseek-v3": Shape("deepseek-v3", 7168, 2048, 24),
}
STORAGE = {
    "16": ((16,) * 3,),
    "8": ((8,) * 3,),
    "6": ((6,) * 3,),
    "5": ((5,) * 3,),
    "4": ((4,) * 3,),
    "3": ((3,) * 3,),
    "2": ((2,) * 3,),
    "ternary": ((TERNARY,) * 3,),
    "ternary 1.6": ((TERNARY,) * 3,),
    "mix 4/3/2": MIX,
}
GGML = {"8": "Q8_0", "6": "Q6_K", "5": "Q5_K", "4": "Q4_K", "3": "Q3_K", "2": "Q2_K", "ternary": "TQ1_0"}


RATIOS = ("vs_vllm_bf16", "vs_ggml", "vs_int4pack", "roof")
COLUMNS = ("shape", "tokens", "bits", "activation_bits", "ours_us", *RATIOS, "rel_error")
LINEAR = ("shape", "tokens", "bits", "ours_us", "vs_vllm_bf16", "vs_vllm_4bit", "vs_int4pack", "roof", "rel_error")
TABLES = (
    ("experts; ratios: competitor's time / ours, in the same run", ("decode", "prefill"), COLUMNS),
    ("linear layers; ratios likewise, bf16 = torch's linear, which vLLM uses", ("linear",), LINEAR),
    ("repacking at load, in checkpoint bytes a second", ("repack",), ("shape", "bits", "ours_us", "gb_s")),
)
# The larger layer is timed where it matters: all formats and 512 tokens of it would take 20 GB and half an hour.
CASES = {
    "qwen3-30b": (tuple(STORAGE), (1, 4, 8, 192, 512)),
    "deepseek-v3": (("4", "3", "2", "mix 4/3/2"), (1, 4, 8, 192)),
}


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parts = (*SHAPES, "linear", "repack")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--tokens", nargs="+", type=int, help="instead of the shape's own")
    parser.add_argument("--storage", nargs="+", choices=STORAGE, help="instead of the shape's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stream = Stream(arguments.threads, arguments.output)
    rows: list[dict[str, object]] = []
    absent: dict[str, str] = {}
    for name in arguments.parts:
        if name == "repack":
            new, missing = bench_repack(arguments.threads), {}
        elif name == "linear":
            new, missing = bench_linear(arguments.threads, stream)
        else:
            storage, tokens = CASES[name]
            storage, tokens = arguments.storage or storage, arguments.tokens or tokens
            new, missing = bench_shape(SHAPES[name], storage, tokens, arguments.threads, stream)
        rows, absent = rows + new, absent | missing
        (arguments.output / "cpu.json").write_text(json.dumps(rows, indent=1))
    print_tables(rows, absent)


def bench_shape(
    shape: Shape, storage: Sequence[str], tokens: Sequence[int], threads: int, stream: Stream
) -> tuple[list[dict], dict[str, str]]:
    """(rows of one layer shape, why competitors are absent)."""
    ours = {s: Ours(shape, STORAGE[s], TERNARY if s == "ternary 1.6" else 2) for s in storage}
    for layer in ours.values():
        tune(layer.arena)
    others, absent = competitors(shape, threads, [GGML[s] for s in storage if s in GGML])
    rows = []
    for count in tokens:
        bits = [16] if count < 192 else [16, 8]
        runs: dict[str, Run] = dict(others)
        runs |= {f"ours {s} int{b}": layer.run(b) for s, layer in ours.items() for b in bits}
        rounds = 12 if count == 1 else 5 if count < 192 else 1
        batches = [batch(shape, count, index) for index in range(6 * rounds)]
        timed = {name: _on(batches, run) for name, run in runs.items()}
        if count == 1 and "4" in ours:
            timed["ours 4 int16 avx2"] = on_avx2(timed["ours 4 int16"])
        seconds, rate = interleave(timed, rounds, stream)
        used = sum(len(ids.unique()) for _, _, ids in batches) / len(batches)
        new = [row(shape, s, b, count, threads, used, rate, ours[s], seconds) for s in ours for b in bits]
        for r in new:
            print(*(r[key] for key in COLUMNS), flush=True)
        rows += new + avx2_row(shape, threads, seconds)
    return rows, absent


def batch(shape: Shape, tokens: int, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of one call; a single token goes through all experts in turn."""
    generator = torch.Generator().manual_seed(index + 2)
    x = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
    weights = torch.softmax(torch.randn(tokens, shape.top_k, generator=generator), -1)
    if tokens == 1:
        ids = (torch.arange(shape.top_k)[None] + index * shape.top_k) % shape.experts
    else:
        ids = torch.stack([torch.randperm(shape.experts, generator=generator)[: shape.top_k] for _ in range(tokens)])
    return x, weights, ids.int()


def competitors(shape: Shape, threads: int, kinds: Sequence[str]) -> tuple[dict[str, Run], dict[str, str]]:
    """(by name, why the others are absent); ggml's `kinds` as its files store them and as it repacks them."""
    builders: dict[str, Callable[[], Run]] = {
        f"vllm bf16 {isa}": partial(vllm_bfloat16, shape, isa) for isa in ("vec", "amx")
    }
    builders |= {"int4pack": partial(int4pack, shape), "naive": partial(naive, shape)}
    for kind, repack in product(kinds, (False, True)):
        builders[f"ggml {kind} {'repacked' if repack else 'plain'}"] = partial(_ggml, shape, kind, threads, repack)
    return those_that_run(builders, batch(shape, 1, 0))


def _ggml(shape: Shape, kind: str, threads: int, repack: bool) -> Run:
    layer = GgmlMoE(kind, shape.experts, shape.hidden, shape.width, shape.top_k, threads, repack)
    if repack and layer.layout == "CPU":
        raise RuntimeError("llama.cpp has no other layout for this type here")

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(layer.run(x.float().numpy(), ids.numpy(), weights.numpy()))

    call.rest = layer.pause  # type: ignore[attr-defined]
    return call


def _on(batches: list, run: Run):  # type: ignore[no-untyped-def,type-arg]
    def call(index: int) -> None:
        run(*batches[index])

    call.rest = getattr(run, "rest", lambda: None)  # type: ignore[attr-defined]
    return call


def on_avx2(run):  # type: ignore[no-untyped-def]
    """The same with the kernels of a processor that has no AVX-512."""

    def call(index: int) -> None:
        cpu.configure("avx2")
        run(index)
        cpu.configure("best")

    return call


def row(shape, storage, bits, tokens, threads, used, rate, layer, seconds) -> dict:  # type: ignore[no-untyped-def]
    """One line of cpu.json; ratios are the competitor's time over ours."""
    mine = seconds[f"ours {storage} int{bits}"]

    def best(prefix: str) -> float | None:
        return min((s for name, s in seconds.items() if name.startswith(prefix)), default=None)

    def ratio(prefix: str) -> float | None:
        other = best(prefix)
        return other and round(other / mine, 3)

    return {
        "case": "decode" if tokens < 192 else "prefill",
        "shape": shape.name,
        "bits": storage,
        "activation_bits": bits,
        "tokens": tokens,
        "threads": threads,
        "ours_us": round(mine * 1e6, 1),
        "vs_vllm_bf16": ratio("vllm bf16"),
        "roof": round(used * layer.bytes_per_expert / mine / rate, 3),
        "stream_gb_s": round(rate / 1e9, 2),
        "vs_ggml": ratio(f"ggml {GGML[storage]} ") if storage in GGML else None,
        "vs_int4pack": ratio("int4pack"),
        "vs_naive": ratio("naive"),
        "rel_error": round(layer.error(bits), 5),
        "instructions": cpu.configure(),
        "machine": platform.processor() or platform.machine(),
    }


def avx2_row(shape: Shape, threads: int, seconds: dict[str, float]) -> list[dict]:
    """How fast the AVX2 kernel is beside the best one, on one token at 4 bits."""
    if "ours 4 int16 avx2" not in seconds:
        return []
    slow, fast = seconds["ours 4 int16 avx2"], seconds["ours 4 int16"]
    common = {"case": "avx2", "shape": shape.name, "bits": "4", "tokens": 1, "threads": threads}
    return [{**common, "ours_us": round(slow * 1e6, 1), "vs_best": round(fast / slow, 3)}]


def print_tables(rows: list[dict], absent: dict[str, str]) -> None:
    """What a reader wants to see first, and why a column is empty."""
    console = Console(width=130)
    for title, cases, columns in TABLES:
        table = Table(title=title)
        for key in columns:
            table.add_column(key)
        chosen = [r for r in rows if r["case"] in cases]
        for r in chosen:
            table.add_row(*(str(r[key]) for key in columns))
        if chosen:
            console.print(table)
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, why in absent.items():
        reasons[why].append(name)
    for why, names in reasons.items():
        console.print(f"absent: {', '.join(names)}: {why}", highlight=False)


if __name__ == "__main__":
    main()
