"""Sorting (token, expert) pairs into blocks of one expert each, on the device and in static shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Blocks", "sort_pairs"]


class Blocks(NamedTuple):
    """Block b holds the pairs `order[start[b]:end[b]]`, all of `expert[b]`; -1 for blocks there is no need of."""

    order: torch.Tensor
    expert: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor


def sort_pairs(local_ids: torch.Tensor, num_experts: int, tokens: int) -> Blocks:
    """Blocks of at most `tokens` of the pairs whose `local_ids` [pairs] are not negative.

    There are min(pairs, experts + pairs // tokens) blocks however they fall, so nothing waits for the device.
    """
    pairs, device = local_ids.numel(), local_ids.device
    experts, order = torch.where(local_ids < 0, num_experts, local_ids).sort(stable=True)
    starts = torch.searchsorted(experts, torch.arange(num_experts + 1, device=device, dtype=experts.dtype))
    needed = (starts.diff() + tokens - 1) // tokens
    ends = needed.cumsum(0)
    blocks = torch.arange(min(pairs, num_experts + pairs // tokens), device=device)
    expert = torch.searchsorted(ends, blocks, right=True)
    there = expert.clamp(max=num_experts - 1)
    start = starts[there] + (blocks - (ends - needed)[there]) * tokens
    is_needed = expert < num_experts
    end = torch.where(is_needed, torch.minimum(starts[there + 1], start + tokens), start)
    return Blocks(order.int(), torch.where(is_needed, expert, -1).int(), start.int(), end.int())
