"""Which experts may be dropped together: the two forms of pruning, as constraints between a knapsack's items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import MoeCollabError
from ..routers import RouterLimits

__all__ = ["ExpertChoice", "masked_violations"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ExpertChoice:
    """Constraints between those items that are whole experts; an option of size 0 means that the expert is dropped.

    `physical` keeps equally many experts in every routing group of every layer. `masked` may keep any numbers that
    `RouterLimits.mask_violation` allows, different ones in each layer and group. An expert without an option of size 0
    is always kept; an expert that was pruned earlier has no item.
    """

    form: Literal["physical", "masked"]
    layers: Ints
    """Layer of each item, any numbering, [items]; -1 = the item is no expert."""
    groups: Ints
    """Routing group within the layer, 0 to n_group - 1, [items]; ignored where the layer is -1."""
    limits: RouterLimits

    def __post_init__(self) -> None:
        if self.form == "masked" and self.limits.n_group > 1 and self.limits.for_masking().n_group == 1:
            object.__setattr__(self, "limits", self.limits.for_masking())
            object.__setattr__(self, "groups", np.zeros_like(self.groups))

    @property
    def n_group(self) -> int:
        """Routing groups of a layer; 1 where they do not restrict which experts may be dropped."""
        return self.limits.n_group

    @property
    def top_k(self) -> int:
        """Experts activated per token."""
        return self.limits.top_k

    @property
    def live_groups(self) -> int:
        """As `RouterLimits.live_groups`."""
        return self.limits.live_groups

    @property
    def least_live(self) -> int:
        """As `RouterLimits.least_live`."""
        return self.limits.least_live

    def table(self) -> Ints:
        """The item of each expert, [layers, n_group, experts of the largest group]; smaller groups end in -1.

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
        """How many experts each group keeps, [layers, n_group], if `kept` [items, bool] marks the items that stay."""
        table = self.table()
        return np.where(table >= 0, np.asarray(kept, dtype=bool)[table], False).sum(axis=2)


def masked_violations(kept: NDArray[np.bool_], pruning: ExpertChoice) -> list[str]:
    """What is wrong with keeping only the experts `kept` [items] by masking, layer by layer; empty if nothing is."""
    layers = np.unique(np.asarray(pruning.layers)[np.asarray(pruning.layers) >= 0])
    found = zip(layers, pruning.kept_counts(kept).tolist(), strict=True)
    reasons = ((layer, pruning.limits.mask_violation(counts)) for layer, counts in found)
    return [f"layer {layer}: {reason}" for layer, reason in reasons if reason]
