"""Whether calibration reached every expert, and the warning where it did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loguru import logger

__all__ = ["FEW_TOKENS", "warn_of_seldom_reached"]

FEW_TOKENS = 32
"""With fewer routed tokens an expert's statistics are noise."""


def warn_of_seldom_reached(routed_tokens: Mapping[str, Sequence[int]]) -> None:
    """Name the experts that calibration hardly reached, in one table; `routed_tokens` by layer, for each expert."""
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
