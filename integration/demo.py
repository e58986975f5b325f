"""The main job, end to end, on the trained fixture.

    make demo

Compresses it with stock uniform GPTQ and with moe-collab at the same sizes, evaluates every checkpoint from
disk, serves ours through `vllm serve`, and writes `build/demo/results.json` and `build/demo/size_vs_kl.svg`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import moe_collab
from moe_collab.evaluation import evaluate, log_probabilities
from moe_collab.plan import CompressionPlan
from moe_collab.report.plots import size_against_kl

from .compress import (
    FIXTURE,
    checkpoint_size,
    expert_bpw,
    log_warnings_only,
    mixed_recipe,
    run_oneshot,
    tokens,
    uniform_recipe,
)
from .server import serve

UNIFORM = {"4bit-g128": (4, 128), "3bit-g128": (3, 128), "2bit-g128": (2, 128), "2bit-g32": (2, 32)}
EQUAL_SIZES = ("3bit-g128", "2bit-g32")
PROMPT = "And God said unto"
TUNING_STEPS = 200
TIE = 0.01
"""Nats within which two tokens count as equally likely: the kernels compute with an error of 0.2 %."""
SERVED = "moe-collab-at-3bit-g128"


def main() -> int:
    """Run the demo; 0 if every claim it makes held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve-python", type=Path, required=True, help="python of the environment with vLLM")
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    options = parser.parse_args()
    log_warnings_only()
    started = time.monotonic()
    models = compress_all(options.output)
    results = {"models": models, **serve_and_compare(options.output / SERVED, options.serve_python, options.output)}
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    size_against_kl(models, options.output / "size_vs_kl.svg", "Qwen3-MoE fixture, routed experts quantized")
    print_table(results)
    print(f"{options.output}/results.json and size_vs_kl.svg written after {time.monotonic() - started:.0f} s")
    problems = broken_claims(results)
    for problem in problems:
        print(f"NOT AS CLAIMED: {problem}", file=sys.stderr)
    return len(problems)


def compress_all(output: Path) -> list[dict[str, Any]]:
    """Make and evaluate every checkpoint; the rows of `results.json`."""
    test = tokens("test")
    base = log_probabilities(moe_collab.load(FIXTURE, dtype=torch.float32), test)
    names = ["bf16", *(f"uniform-{n}" for n in UNIFORM), *(f"moe-collab-at-{n}" for n in EQUAL_SIZES)]
    rows = []
    for name in tqdm(names, desc="compress and evaluate", unit="model"):
        path, predicted = make(name, output)
        found = evaluate(moe_collab.load(path, dtype=torch.float32), test, base)
        rows.append(
            {
                "name": name,
                "bytes": checkpoint_size(path),
                "predicted_bytes": predicted,
                "expert_bpw": round(expert_bpw(path), 4),
                "perplexity": round(found.perplexity, 4),
                "kl": max(round(found.kl, 6), 0.0),
                "top1": round(found.top1, 5),
            }
        )
    return rows


def make(name: str, output: Path) -> tuple[Path, int | None]:
    """Write the checkpoint `name`; its path, and the size our plan predicted for it."""
    if name == "bf16":
        return FIXTURE, None
    path = output / name
    size = name.removeprefix("uniform-").removeprefix("moe-collab-at-")
    if name.startswith("uniform-"):
        run_oneshot(uniform_recipe(*UNIFORM[size]), path)
        return path, None
    plan = output / f"{name}.plan.json"
    # The budget is the uniform checkpoint's size, which a change of this code may move: plan anew.
    plan.unlink(missing_ok=True)
    budget = checkpoint_size(output / f"uniform-{size}")
    costs = output / "costs.json"
    run_oneshot(mixed_recipe(TUNING_STEPS, budget=budget, plan=str(plan), costs=str(costs)), path)
    return path, CompressionPlan.load(plan).predicted_bytes


def serve_and_compare(path: Path, python: Path, output: Path) -> dict[str, Any]:
    """Ask a real server for completions, and transformers on the dequantized weights how likely each token was."""
    model = moe_collab.load(path, dtype=torch.float32)
    prompts = tokens("selection")[:8, :24]
    worst = 0.0
    print(f"serving {path} with vllm serve ...")
    with serve(python, path, output / "server.log") as server:
        text = server.complete(PROMPT, 32)["text"]
        for ids in tqdm(prompts, desc="vLLM against transformers", unit="prompt"):
            served = torch.tensor(server.complete(ids.tolist(), 24)["token_ids"])
            with torch.no_grad():
                logits = model(torch.cat([ids, served])[None]).logits[0, len(ids) - 1 : -1]
            logp = logits.log_softmax(-1)
            shortfall = logp.max(-1).values - logp.gather(-1, served[:, None])[:, 0]
            worst = max(worst, float(shortfall.max()))
    return {"served_shortfall": worst, "http_completion": text}


def broken_claims(results: dict[str, Any]) -> list[str]:
    """What should hold and does not."""
    models = {row["name"]: row for row in results["models"]}
    tied = results["served_shortfall"] <= TIE
    problems = [] if tied else ["vLLM chose a token that is not transformers' best"]
    for size in EQUAL_SIZES:
        ours, uniform = models[f"moe-collab-at-{size}"], models[f"uniform-{size}"]
        if ours["bytes"] > uniform["bytes"]:
            problems.append(f"{ours['name']} is larger than {uniform['name']}")
        if ours["bytes"] != ours["predicted_bytes"]:
            problems.append(f"{ours['name']} has not the size its plan predicted")
        if ours["kl"] >= uniform["kl"]:
            problems.append(f"{ours['name']} has no lower KL than {uniform['name']}")
    return problems


def print_table(results: dict[str, Any]) -> None:
    """The table of the README."""
    table = Table(title="Qwen3-MoE fixture: routed experts quantized, all else bf16; test tokens")
    for column in ("model", "bytes", "expert bpw", "perplexity", "KL to bf16", "top-1 agreement"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in results["models"]:
        style = "bold green" if row["name"].startswith("moe-collab-") else None
        cells = [row["name"], f"{row['bytes']:,}", f"{row['expert_bpw']:.3f}", f"{row['perplexity']:.3f}"]
        table.add_row(*cells, f"{row['kl']:.4f}", f"{row['top1']:.2%}", style=style)
    console = Console(width=max(110, Console().width))
    console.print(table)
    console.print(f"vllm serve, asked for {PROMPT!r}: {results['http_completion']!r}", markup=False)
    console.print(
        "each of its tokens is transformers' best on the dequantized weights, "
        f"or at most {results['served_shortfall']:.4f} nats less likely"
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
