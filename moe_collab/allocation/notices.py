"""What the log tells the user about a decision."""

from __future__ import annotations

from collections import Counter

from loguru import logger

from ..plan import CompressionPlan
from .budget import format_bytes

__all__ = ["report_decision"]


def report_decision(plan: CompressionPlan) -> None:
    """Log what was decided, its size and KL, and the KL of the best uniform scheme beside it."""
    spread = ", ".join(f"{count} {scheme}" for scheme, count in sorted(Counter(plan.schemes.values()).items()))
    lost = sum(map(len, plan.dropped.values()))
    logger.info(
        "MixedBitAllocModifier: {}{}; {:.3f} bpw, checkpoint {}",
        spread,
        f"; {lost} experts go ({plan.pruning})" if lost else "",
        plan.expert_bpw,
        format_bytes(plan.predicted_bytes),
    )
    logger.info(
        "MixedBitAllocModifier: costs add up to a KL of {:.5f} (at best {:.5f} is possible){}{}",
        plan.predicted_kl,
        plan.bound_kl,
        "" if plan.heldout_kl is None else f"; measured on held-out tokens {plan.heldout_kl:.5f}",
        "" if plan.uniform_kl is None else f", with {plan.uniform} for all experts {plan.uniform_kl:.5f}",
    )
