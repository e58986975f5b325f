"""Are all experts there? Those that a router's selection bias masks may be absent; no other may."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from ..architectures import PROJECTIONS, StackedExperts, is_masked
from ..errors import MoeCollabError
from .reader import Checkpoint

__all__ = ["check_experts", "stack_experts", "zeros_of_masked"]

_EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)\.(weight|weight_packed)$")
_EXPERT_TENSOR = re.compile(r"(?P<block>.*)\.experts\.(?P<index>\d+)\.(?P<projection>\w+)\.(?P<kind>weight|bias)$")
_SELECTION_BIAS = re.compile(r"(?P<block>.*?)(\.gate)?\.e_score_correction_bias$")


def check_experts(checkpoint: Checkpoint) -> None:
    """Raise `MoeCollabError` naming an expert that is absent, or lacks a projection of the others.

    Wholly absent may be experts that the selection bias masks. Where there is no such bias, how many there should be is
    not known, and the last may be absent unnoticed.
    """
    stored, masks = _stored(checkpoint.names()), _masks(checkpoint)
    for layer in stored.keys() | masks.keys():
        by_projection = stored.get(layer) or {"*": set()}
        anywhere = set().union(*by_projection.values())
        mask = masks.get(layer, [False] * (max(anywhere, default=-1) + 1))
        expected = {index for index, masked in enumerate(mask) if not masked or index in anywhere}
        for projection, indices in by_projection.items():
            if gone := sorted(expected - indices):
                raise MoeCollabError(
                    f"{checkpoint.path}: {layer}.{gone[0]}.{projection} is missing (of {len(mask)} experts, "
                    f"{len(gone)} lack it), and the router can select it. Copy or make the checkpoint again."
                )


def zeros_of_masked(checkpoint: Checkpoint, dense: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of zero for the absent experts, by name, each as another of its layer in `dense`.

    Loaders want them; routers never select them.
    """
    zeros = {}
    stored = _stored(dense)
    for layer, mask in _masks(checkpoint).items():
        for projection, indices in stored.get(layer, {}).items():
            like = dense[f"{layer}.{min(indices)}.{projection}.weight"]
            gone = [index for index, masked in enumerate(mask) if masked and index not in indices]
            zeros.update({f"{layer}.{index}.{projection}.weight": torch.zeros_like(like) for index in gone})
    return zeros


def stack_experts(dense: Mapping[str, torch.Tensor], layout: StackedExperts) -> dict[str, torch.Tensor]:
    """`dense` with each layer's experts stacked, as the family's own checkpoints have them."""
    found: dict[str, torch.Tensor] = {}
    single: dict[tuple[str, str], dict[str, dict[int, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in dense.items():
        if match := _EXPERT_TENSOR.match(name):
            single[match["block"], match["kind"]][match["projection"]][int(match["index"])] = tensor
        else:
            found[name] = tensor
    for (block, kind), experts in single.items():
        gate, up, down = (torch.stack([t for _, t in sorted(experts[p].items())]) for p in PROJECTIONS)
        gate_up = torch.stack([gate, up], dim=2 if layout.interleaved else 1).flatten(1, 2)
        for name, stacked in ((layout.gate_up, gate_up), (layout.down, down)):
            if kind == "bias":
                found[f"{block}.{name}_bias"] = stacked
            else:
                found[f"{block}.{name}"] = stacked.mT.contiguous() if layout.transposed else stacked
    return found


def _stored(names: Iterable[str]) -> dict[str, dict[str, set[int]]]:
    """MoE layer ("....experts") -> projection -> experts whose weight is there."""
    layers: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := _EXPERT.match(name):
            layers[match["layer"]][match["projection"]].add(int(match["index"]))
    return layers


def _masks(checkpoint: Checkpoint) -> dict[str, list[bool]]:
    """MoE layer whose router has a selection bias -> whether that masks each expert."""
    found = ((name, _SELECTION_BIAS.match(name)) for name in checkpoint.names())
    return {f"{m['block']}.experts": is_masked(checkpoint.tensor(name)).tolist() for name, m in found if m}
