"""Which experts may be dropped together: the two forms of pruning and the routers' constraints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import MoeCollabError

__all__ = ["ExpertChoice", "masked_violations"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ExpertChoice:
    """Couples items that are whole experts; an expert's options of size 0 mean that it is dropped.

    `physical` keeps equally many experts in every routing group of every layer. `masked` is free per layer, but a
    dropped expert must never be selected: a group keeps 0 or at least 2 experts (its score is the sum of its top 2),
    at least `topk_group` groups live, and the smallest `topk_group` of them hold at least `top_k` experts.
    Without groups both keep at least `top_k`. An expert without an option of size 0 is always kept; one that was
    pruned before is no item.
    """

    form: Literal["physical", "masked"]
    layers: Ints
    """Layer of each item, any numbering, [items]; -1 = the item is no expert."""
    groups: Ints
    """Routing group within the layer, 0 to n_group - 1, [items]; ignored where the layer is -1."""
    top_k: int
    n_group: int = 1
    topk_group: int = 1

    @property
    def live_groups(self) -> int:
        """Groups of a layer that must keep experts."""
        return self.topk_group if self.n_group > 1 else 1

    @property
    def least_live(self) -> int:
        """Experts that a group keeps at least, if any."""
        return 2 if self.n_group > 1 else 1

    @property
    def least_kept(self) -> int:
        """Experts that every group must keep when all keep equally many."""
        return max(self.least_live, math.ceil(self.top_k / self.live_groups))

    def table(self) -> Ints:
        """Item per place, [layers, n_group, experts of the largest group]; -1 where a group is smaller.

        Raises `MoeCollabError` when layers and groups do not describe the items.
        """
        experts = np.flatnonzero(np.asarray(self.layers) >= 0)
        groups = np.asarray(self.groups, dtype=np.int64)[experts]
        if not len(experts) or groups.min() < 0 or groups.max() >= self.n_group:
            raise MoeCollabError(f"pruning: no item is an expert, or one has a group outside 0 to {self.n_group - 1}.")
        names, layers = np.unique(np.asarray(self.layers)[experts], return_inverse=True)
        cell = layers * self.n_group + groups
        order = np.argsort(cell, kind="stable")
        count = np.bincount(cell, minlength=len(names) * self.n_group)
        place = np.arange(len(experts)) - np.repeat(np.cumsum(count) - count, count)
        table = np.full((len(count), int(count.max())), -1, dtype=np.int64)
        table[cell[order], place] = experts[order]
        return table.reshape(len(names), self.n_group, -1)

    def kept_counts(self, kept: NDArray[np.bool_]) -> Ints:
        """Experts kept, [layers, n_group], when `kept` [items] are."""
        table = self.table()
        return np.where(table >= 0, np.asarray(kept, dtype=bool)[table], False).sum(axis=2)


def masked_violations(kept: NDArray[np.bool_], pruning: ExpertChoice) -> list[str]:
    """What is wrong with keeping only the experts `kept` [items] by masking; empty when nothing is."""
    layers = np.unique(np.asarray(pruning.layers)[np.asarray(pruning.layers) >= 0])
    wrong = []
    for layer, counts in zip(layers, pruning.kept_counts(kept), strict=True):
        live = np.sort(counts[counts > 0])
        if (live < pruning.least_live).any():
            wrong.append(f"layer {layer}: a routing group keeps {live[0]} expert, it must be 0 or at least 2")
        if len(live) < pruning.live_groups:
            wrong.append(f"layer {layer}: {len(live)} routing groups live, the router chooses {pruning.live_groups}")
        if (reach := int(live[: pruning.live_groups].sum())) < pruning.top_k:
            wrong.append(f"layer {layer}: a token may reach only {reach} experts, it activates {pruning.top_k}")
    return wrong
