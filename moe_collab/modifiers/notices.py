"""What the user is told: how experts were reached by calibration, and what allocation decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from loguru import logger

from ..allocation.budget import format_bytes
from ..calibration.study import FEW_TOKENS
from ..plan import CompressionPlan

__all__ = ["coverage", "outcome"]


def coverage(routed_tokens: Mapping[str, Sequence[int]]) -> None:
    """Warn of experts that calibration hardly reached, in one table: layer by layer, never and seldom."""
    rows = []
    for layer, tokens in routed_tokens.items():
        never = [index for index, count in enumerate(tokens) if count == 0]
        seldom = [index for index, count in enumerate(tokens) if 0 < count < FEW_TOKENS]
        if never or seldom:
            rows.append(f"{layer}: never {never or '-'}, fewer than {FEW_TOKENS} tokens {seldom or '-'}")
    if rows:
        logger.warning(
            "no calibration token, or hardly any, was routed to these experts; they are judged by their weights, "
            "or by little. Calibrate with more or other text:\n  {}",
            "\n  ".join(rows),
        )


def outcome(plan: CompressionPlan) -> None:
    """Say what was decided, and how it compares."""
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
