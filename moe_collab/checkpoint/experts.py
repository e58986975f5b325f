"""Are all experts there? Those that a router's selection bias masks may be absent; no other may."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import count

from ..architectures import is_masked
from ..errors import MoeCollabError
from .reader import Checkpoint

__all__ = ["absent_experts", "check_experts"]

_EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)\.(weight|weight_packed|qweight)$")
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
        mask = masks.get(layer)
        number = max(anywhere, default=-1) + 1 if mask is None else len(mask)
        masked = set() if mask is None else {index for index, gone in enumerate(mask) if gone} - anywhere
        for projection, indices in by_projection.items():
            lacking = number - len(masked) - len(indices)  # not as a set: the largest index may be anything
            if lacking > 0 or max(indices, default=-1) >= number:
                first = next(index for index in count() if index not in indices and index not in masked)
                raise MoeCollabError(
                    f"{checkpoint.path}: {layer}.{first}.{projection} is missing (of {number} experts, "
                    f"{lacking} lack it), and the router can select it. Copy or make the checkpoint again."
                )


def absent_experts(checkpoint: Checkpoint) -> dict[str, str]:
    """Weights of masked experts that are not stored -> the same weight of an expert of that layer which is."""
    absent = {}
    stored = _stored(checkpoint.names())
    for layer, mask in _masks(checkpoint).items():
        for projection, indices in stored.get(layer, {}).items():
            like = f"{layer}.{min(indices)}.{projection}.weight"
            gone = (index for index, masked in enumerate(mask) if masked and index not in indices)
            absent.update({f"{layer}.{index}.{projection}.weight": like for index in gone})
    return absent


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
