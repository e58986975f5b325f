"""Would a vector codebook of 1.5 bits a weight beat ternary at equal bytes? Measured before a format is built for it.

One codebook of 4096 vectors of 8 weights for the whole model, trained by k-means on weights divided by their group's
scale, vectors weighted by their columns' importance; codes by weighted distance, without or with error feedback to
later columns as in GPTQ (arXiv 2210.17323, and for vectors GPTVQ, arXiv 2402.15319).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moe_collab.allocation import Decision
from moe_collab.calibration import Calibration
from moe_collab.calibration.study import HALVES, LayerStudy
from moe_collab.evaluation import evaluate
from moe_collab.formats import TERNARY, Scheme
from moe_collab.rounding import Rounder

from .bench import Bench
from .trained import BELOW

__all__ = ["codebook_bytes", "codebook_rows", "codebook_weights"]

ENTRIES, WIDTH, GROUP = 4096, 8, 128
BITS_PER_WEIGHT = 12 / WIDTH + 16 / GROUP
"""Codes and scales; the codebook itself comes on top once per model."""
_ITERATIONS = 12
_SAMPLE = 120_000


def codebook_rows(bench: Bench) -> None:
    """A vector codebook of 1.5 bits against ternary, alike for all experts."""
    model = bench.model
    layout = model.planner(budget="1TB").layout
    names = sorted(model.planner(budget="1TB").experts)
    ternary = dict.fromkeys(names, Scheme(TERNARY, 128))
    weights = sum(model.live.get_submodule(name).weight.numel() for name in names)
    rest = layout.file_bytes(ternary) - sum(layout.size(name, s, header=False) for name, s in ternary.items())
    size = rest + int(weights * BITS_PER_WEIGHT / 8) + codebook_bytes()
    for method, feedback in (("codebook, nearest", False), ("codebook, error feedback", True)):

        def make(feedback: bool = feedback) -> dict[str, Any]:
            with model.changed(codebook_weights(model.calibration, feedback)):
                return bench.row(None, size, evaluate(model.live, model.test, model.base), "memory")

        bench.add("codebook", BELOW, method, make)
    for method, rounder in {
        "ternary-g128, nearest": Rounder(feedback=False),
        "ternary-g128, error feedback": Rounder(descent=False),
        "ternary-g128, our rounding": Rounder(),
    }.items():
        bench.decided("codebook", BELOW, method, partial(Decision, ternary), rounder)


def codebook_bytes() -> int:
    """Of the codebook, in bfloat16."""
    return ENTRIES * WIDTH * 2


def codebook_weights(calibration: Calibration, feedback: bool) -> dict[str, torch.Tensor]:
    """Module name -> weight rounded to the codebook, for every routed expert."""
    halves = []
    samples, _ = calibration.samples()
    for layer in calibration.moe.layers:
        for group in LayerStudy(layer, samples[layer.name]).groups(layer.live_experts):
            for half in HALVES:
                halves.append((layer, group.members, half, group.weights(half), group.moments[half]))
    vectors, importance = [], []
    for _, _, _, weights, moment in halves:
        scaled = _grouped(weights) / _scales(weights)
        vectors.append(scaled.reshape(-1, WIDTH))
        columns = moment.diagonal(dim1=-2, dim2=-1)[:, None].expand_as(weights)
        importance.append(columns.reshape(-1, WIDTH))
    book = _trained(torch.cat(vectors), torch.cat(importance))
    found = {}
    for layer, members, half, weights, moment in halves:
        rounded = _rounded(weights, moment, book, feedback)
        for position, index in enumerate(members):
            if half == "down":
                found[f"{layer.experts_name}.{index}.down_proj"] = rounded[position]
            else:
                gate, up = rounded[position].chunk(2)
                found |= {f"{layer.experts_name}.{index}.gate_proj": gate, f"{layer.experts_name}.{index}.up_proj": up}
    return found


def _grouped(weights: torch.Tensor) -> torch.Tensor:
    return weights.reshape(*weights.shape[:2], -1, GROUP)


def _scales(weights: torch.Tensor) -> torch.Tensor:
    """Root mean square of each group, as stored, [experts, rows, groups, 1]."""
    return _grouped(weights).square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9).bfloat16().float()


def _trained(vectors: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Weighted k-means, [ENTRIES, WIDTH]."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(vectors), generator=generator)[:_SAMPLE]
    vectors, importance = vectors[chosen], importance[chosen]
    book = vectors[:ENTRIES].clone()
    for _ in range(_ITERATIONS):
        codes = _nearest(vectors, importance, book)
        total = torch.zeros_like(book).index_add_(0, codes, vectors * importance)
        weight = torch.zeros_like(book).index_add_(0, codes, importance)
        book = torch.where(weight > 0, total / weight.clamp_min(1e-12), book)
    return book.bfloat16().float()


def _nearest(vectors: torch.Tensor, importance: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Index of the entry with the least weighted squared distance, [vectors]."""
    found = []
    for part, weight in zip(vectors.split(8192), importance.split(8192), strict=True):
        found.append((weight @ book.square().T - 2 * (part * weight) @ book.T).argmin(1))
    return torch.cat(found)


def _rounded(weights: torch.Tensor, moment: torch.Tensor, book: torch.Tensor, feedback: bool) -> torch.Tensor:
    """`weights` [experts, rows, columns] on the codebook; with feedback later columns make up for earlier ones."""
    scales = _scales(weights).expand_as(_grouped(weights)).reshape(weights.shape)
    damping = 0.007 * moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    moments = moment + damping[:, None, None] * torch.eye(moment.shape[-1])
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    importance = moments.diagonal(dim1=-2, dim2=-1)[:, None].expand_as(weights)
    left, found = weights.clone(), torch.empty_like(weights)
    for start in range(0, weights.shape[2], WIDTH):
        part = slice(start, start + WIDTH)
        scale = scales[:, :, part]
        wanted = (left[:, :, part] / scale).reshape(-1, WIDTH)
        codes = _nearest(wanted, importance[:, :, part].reshape(-1, WIDTH), book)
        found[:, :, part] = book[codes].reshape(scale.shape) * scale
        if feedback:
            # The block's error, whitened by its own triangle, moves the columns behind it.
            error = left[:, :, part] - found[:, :, part]
            whitened = torch.linalg.solve_triangular(inverse[:, part, part], error, upper=True, left=False)
            left[:, :, start + WIDTH :] -= whitened @ inverse[:, part, start + WIDTH :]
    return found
