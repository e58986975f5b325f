"""Draws build/bench/cpu.json as build/bench/cpu.svg: how many times faster than vLLM's bfloat16 experts, by bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """One panel a shape, one line a number of tokens."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
