"""Performance-aware expert pruning: how experts are scored, which of them stay, and how the others are taken out."""

from .criteria import CRITERIA, importance, super_experts
from .selection import (
    check_mask,
    check_masks,
    kept_experts,
    scaled_top_k,
    unmasked_experts,
    wanted_num_experts,
    whole_groups,
)

__all__ = [
    "CRITERIA",
    "check_mask",
    "check_masks",
    "importance",
    "kept_experts",
    "scaled_top_k",
    "super_experts",
    "unmasked_experts",
    "wanted_num_experts",
    "whole_groups",
]
