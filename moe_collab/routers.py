"""What a router needs of its experts, so that it never selects one that is gone: the rules of both forms of pruning.

A router with groups first chooses `topk_group` of `n_group` groups, each scored by the sum of its `group_scores` best
experts, and then `top_k` experts of the chosen groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["RouterLimits"]


@dataclass(frozen=True)
class RouterLimits:
    """How many experts the routers of a model choose among, and how; all layers are alike."""

    num_experts: int
    top_k: int
    """Experts activated per token."""
    n_group: int = 1
    """Routing groups, of equally many experts each; 1 = no groups."""
    topk_group: int = 1
    """Groups that are chosen for a token."""
    group_scores: int = 2
    """How many of its experts' best scores make a group's score."""

    @property
    def live_groups(self) -> int:
        """Groups of a layer that must keep experts."""
        return self.topk_group if self.n_group > 1 else 1

    @property
    def least_live(self) -> int:
        """Experts that a group keeps at least if it keeps any: with fewer, its score would count a dead expert."""
        return self.group_scores if self.n_group > 1 else 1

    @property
    def least_kept(self) -> int:
        """Experts that every group must keep when all groups keep equally many."""
        return max(self.least_live, math.ceil(self.top_k / self.live_groups))

    def reachable(self, num_experts: int) -> int:
        """How many of `num_experts` experts per layer one token can reach through its routing groups."""
        return num_experts // self.n_group * self.topk_group

    def for_masking(self) -> RouterLimits:
        """The same as masked pruning sees it: where every group is always chosen, groups bind nothing."""
        return replace(self, n_group=1, topk_group=1) if self.topk_group == self.n_group else self

    def mask_violation(self, kept: Sequence[int]) -> str | None:
        """Why masking may not leave `kept` experts in each routing group, [n_group]; None if it may.

        A masked expert is never selected if each group keeps none or `least_live` experts, `topk_group` groups keep
        some, and the smallest `topk_group` of these hold `top_k` experts together.
        """
        limits = self.for_masking()
        counts = list(kept) if limits.n_group > 1 else [sum(kept)]
        live = sorted(count for count in counts if count)
        if live and live[0] < limits.least_live:
            return (
                f"routing group {counts.index(live[0])} would keep {live[0]} expert; groups keep none, or "
                f"{limits.least_live} or more."
            )
        if len(live) < limits.live_groups:
            return f"{len(live)} routing groups would keep experts; {limits.live_groups} are chosen for a token."
        if (reach := sum(live[: limits.live_groups])) < limits.top_k:
            return f"a token could reach {reach} experts, but {limits.top_k} are activated. Mask fewer."
        return None
