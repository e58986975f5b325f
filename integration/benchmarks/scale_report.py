"""The tables of the benchmark of scale, and what it must show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

__all__ = ["RECIPES", "broken_claims", "table"]

RECIPES = ("prune", "all")
"""Whose peaks must not grow with the model."""
FLAT = {"layers": 0.05, "tokens": 0.20}
"""How much the peaks of such rows may differ."""
_OLMOE, _DEEPSEEK = ("olmoe-16", "olmoe-4-fp8", "gpt-oss-4-mxfp4"), ("deepseek-layer", "deepseek-layer-fp8")
CEILINGS = dict.fromkeys(_OLMOE, 5_000_000_000) | dict.fromkeys(_DEEPSEEK, 12_000_000_000)
"""Row -> most bytes of memory that it may take."""

SPEED = {"expert-qwen3-30b": 1 / 4, "expert-deepseek-v3": 1 / 3}
"""Row -> most time that rounding may take, as a share of the old engine's."""


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The README's tables, in markdown: what runs took, what sampled stages took, which checkpoints are equal."""
    rows = list(rows)
    lines = [
        "| | model | recipe | tokens | checkpoint | peak memory | mapped files | read / size | time |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in (row for row in rows if "peak" in row):
        sizes = " | ".join(f"{row[key] / 1e9:.2f} GB" if key in row else "-" for key in ("bytes", "peak", "mapped"))
        what = f"{row['row']} | {row['model']}, {row['model_bytes'] / 1e9:.1f} GB | {row['recipe']} | {row['tokens']:,}"
        lines.append(f"| {what} | {sizes} | {row['reads_per_byte']:.1f} | {row['wall'] / 60:.1f} min |")
    machines = dict.fromkeys(f"{row['machine']}, {row['threads']} threads" for row in rows if "peak" in row)
    lines += ["", f"Measured on {'; '.join(machines)}." if machines else ""]
    sampled = [row for row in rows if "sampled" in row]
    if sampled:
        lines += [
            "| | stage | experts | peak memory | time | processor time | for each expert | for all experts |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        lines += [line for row in sampled for line in _stages(row)]
        lines += ["", *(_prediction(row) for row in sampled)]
    lines += [_comparison(row) for row in rows if "equal" in row]
    lines += _speed([row for row in rows if "core_hours" in row])
    lines += [_planned(row) for row in rows if "reading_seconds" in row]
    lines += [_growth(row) for row in rows if "grown" in row]
    return "\n".join(lines)


def _speed(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What an expert of each model takes, beside the old engine, and all of them."""
    if rows:
        yield ""
        yield "| processor seconds of an expert | moments | rounding | costs of all schemes | all experts, core hours |"
        yield "|---|--:|--:|--:|--:|"
    for row in rows:
        for engine in ("old", "new"):
            seconds = " | ".join(f"{row[engine][stage]:.1f}" for stage in row["core_hours"])
            hours = f"{sum(row['core_hours'].values()):.1f}" if engine == "new" else ""
            yield f"| {row['row'].removeprefix('expert-')}, {engine} | {seconds} | {hours} |"
        yield (
            f"| | | {row['rounding_ratio']:.2f} of the old, {row['share_of_peak']:.0%} of a product's rate "
            f"| {row['costs_per_rounding']:.2f} of moments and rounding | |"
        )


def _planned(row: dict[str, Any]) -> str:
    at_load, disk = row["reads"]["at_load"] / row["model_bytes"], row["reading_seconds"]
    return (
        f"{row['row']}: {row['passes']:.2f} passes over the weights, and {at_load:.2f} when transformers loads the "
        f"model, in {row['wall']:.0f} s; the disk takes {disk:.0f} s to read them ({row['wall'] / disk:.0f} times)."
    )


def _growth(row: dict[str, Any]) -> str:
    grown = row["grown"]
    seconds = ", ".join(f"{c:,}: {s:.2f} s" for c, s in zip(grown["columns"], grown["rounding_seconds"], strict=True))
    return (
        f"Rounding 1,024 rows by columns: {seconds}. Time grows with power {grown['time_exponent']:.2f} of them, "
        f"memory with {grown['memory_exponent']:.2f} (scale.svg)."
    )


def _comparison(row: dict[str, Any]) -> str:
    """Whether all ways of one recipe gave the same plan and bytes; their digests, if they did only once."""
    if not row["equal"]:
        return f"{row['row']}: plan and bytes DIFFER: {row['digests']}"
    ways, first = ", ".join(row["digests"]), next(iter(row["digests"].values()))[0]
    return f"{row['row']}: plan and bytes equal ({ways}): {first}"


def _stages(row: dict[str, Any]) -> Iterator[str]:
    """A line for each stage of a row with sampled experts; for each and for all of these in processor time."""
    sampled = row["sampled"]
    for name, stage in row["stages"].items():
        own = sampled["stages"].get(name)
        experts, each, every = "-", "-", "-"
        if own:
            experts = f"{own['experts']} of {sampled['experts']}"
            each, every = f"{own['cpu_seconds_per_expert']:.2f} s", f"{own['predicted_cpu_seconds'] / 3600:.2f} h"
        times = " | ".join(f"{stage[key] / 60:.1f} min" for key in ("seconds", "cpu"))
        took = f"{stage['memory'] / 1e9:.2f} GB | {times}"
        yield f"| {row['row']} | {name} | {experts} | {took} | {each} | {every} |"


def _prediction(row: dict[str, Any]) -> str:
    sampled = row["sampled"]
    return (
        f"{row['row']}: statistics, samples, costs at one scheme and rounding of all {sampled['experts']} experts "
        f"would take {sampled['predicted_cpu_seconds'] / 3600:.1f} h of one core, read "
        f"{sampled['predicted_read_bytes'] / 1e9:.1f} GB and make of {row['model_bytes'] / 1e9:.1f} GB "
        f"{sampled['predicted_checkpoint_bytes'] / 1e9:.1f} GB ({sampled['scheme']}); samples of all layers take "
        f"{sampled['sample_bytes'] / 1e9:.2f} GB of files."
    )


def broken_claims(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What should hold and does not: equal checkpoints from memory and disk, peaks below their ceilings, and flat by
    layers and by tokens."""
    rows = list(rows)
    problems = [f"{row['row']}: checkpoints differ" for row in rows if not row.get("equal", True)]
    for row in rows:
        if row.get("rounding_ratio", 0) > SPEED.get(row["row"], 1):
            problems.append(f"{row['row']}: rounding takes {row['rounding_ratio']:.2f} of what it took")
        if row.get("costs_per_rounding", 0) > 1:
            problems.append(f"{row['row']}: the costs of all schemes take longer than one rounding")
        most = CEILINGS.get(row["row"])
        if most is not None and row["peak"] > most:
            problems.append(f"{row['row']}: peak of {row['peak']:,} bytes, more than {most:,}")
    for (kind, share), how in product(FLAT.items(), RECIPES):
        peaks = [r["peak"] for r in rows if r["row"].startswith(f"{kind}-") and r["row"].endswith(f"-{how}")]
        if peaks and max(peaks) > (1 + share) * min(peaks):
            problems.append(f"{kind}, {how}: peaks from {min(peaks):,} to {max(peaks):,} bytes, not within {share:.0%}")
    return problems
