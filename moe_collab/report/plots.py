"""Size against quality, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["size_against_kl"]

_OURS, _UNIFORM = "#0b6e4f", "#8a8d91"


def size_against_kl(models: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw `bytes` against `kl` of each model but the base; names beginning with `moe-collab-` stand out."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    for model in models:
        if not model["kl"] > 0:
            continue
        ours = model["name"].startswith("moe-collab-")
        color, marker = (_OURS, "D") if ours else (_UNIFORM, "o")
        size = model["bytes"] / 1e6
        axes.plot(size, model["kl"], marker, color=color, markersize=9 if ours else 7)
        # Labels of equal sizes would collide on one side, so ours go below and theirs above.
        axes.annotate(
            model["name"],
            (size, model["kl"]),
            xytext=(8, -12 if ours else 8),
            textcoords="offset points",
            color=color,
            fontsize=9,
        )
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.set_xlabel("checkpoint size, MB (all *.safetensors)")
    axes.set_ylabel("KL divergence to bf16, nats per token")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
