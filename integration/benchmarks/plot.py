"""Draws what benchmarks have left in a folder, `build/bench`.

cpu.json as cpu.svg: how many times faster than vLLM's bfloat16 experts, by bits; scale.json as scale.svg: how time and
memory of rounding grow with the columns of a matrix.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def draw_speed(folder: Path, pyplot: Any) -> None:
    """One panel a shape, one line a number of tokens."""
    rows = [r for r in json.loads((folder / "cpu.json").read_text()) if r["case"] in ("decode", "prefill")]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    figure, panels = pyplot.subplots(
        1, len(shapes), figsize=(6.5 * len(shapes), 4.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, shape in zip(panels[0], shapes, strict=True):
        for tokens in dict.fromkeys(r["tokens"] for r in rows):
            points = [
                (r["bits"], r["vs_vllm_bf16"])
                for r in rows
                if (r["shape"], r["tokens"], r["activation_bits"]) == (shape, tokens, 16)
            ]
            axes.plot(*zip(*points, strict=True), "o-", label=f"{tokens} token{'s' * (tokens > 1)}")
        axes.axhline(1, color="#8a8d91", linewidth=1)
        axes.set_title(shape, loc="left", fontsize=11)
        axes.set_xlabel("bits of the experts")
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0][0].set_ylabel("times faster than vLLM bf16 (its best of vec, amx)")
    panels[0][0].legend(frameon=False)
    figure.savefig(folder / "cpu.svg")


def draw_growth(folder: Path, pyplot: Any) -> None:
    """Seconds and megabytes by columns, on logarithmic axes."""
    grown = [row["grown"] for row in json.loads((folder / "scale.json").read_text()) if "grown" in row]
    if not grown:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    megabytes = [size / 1e6 for size in grown[0]["bytes"]]
    drawn = (("seconds", grown[0]["rounding_seconds"], "time"), ("MB", megabytes, "memory"))
    for axes, (unit, values, what) in zip(panels, drawn, strict=True):
        axes.loglog(grown[0]["columns"], values, "o-")
        title = f"{what}, exponent {grown[0][f'{what}_exponent']:.2f}"
        axes.set(title=title, xlabel="columns, of 1,024 rows", ylabel=unit, xticks=grown[0]["columns"])
        axes.set_xticklabels(f"{columns:,}" for columns in grown[0]["columns"])
        axes.grid(alpha=0.25)
    figure.savefig(folder / "scale.svg")


def main(folder: Path) -> None:
    """Whatever is there."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    for name, draw in (("cpu.json", draw_speed), ("scale.json", draw_growth)):
        if (folder / name).exists():
            draw(folder, pyplot)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
