"""Second moments of a matrix's inputs, tokens weighted by what errors at its outputs do to the loss."""

from __future__ import annotations

import torch

__all__ = ["second_moments"]

ROW_BLOCKS = 4
"""Blocks of output rows that get a second moment each, their tokens weighted by the block's own gradients."""


def second_moments(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Second moments [row blocks, columns, columns] of `inputs` [tokens, columns].

    Tokens are weighted by the square of their `gradients` [draws, tokens, rows], mean over draws. The moments are
    scaled to a mean diagonal of 1 and mixed with the unweighted moment, the more so the fewer tokens they rest on
    (tokens of unequal weights w count as Kish's effective number, (sum w)^2 / sum w^2). A millionth of the identity is
    added, so that experts that hardly any token reaches are rounded to nearest rather than to zero.
    """
    columns, rows = inputs.shape[1], gradients.shape[-1]
    blocks = ROW_BLOCKS if rows % ROW_BLOCKS == 0 else 1
    plain = _normalized(inputs.T @ inputs)
    found = []
    for part in gradients.chunk(blocks, -1):
        weights = part.square().sum(-1).mean(0)[:, None]
        effective = weights.sum().square() / weights.square().sum().clamp_min(1e-30)
        trust = float(effective / (effective + columns))
        found.append(trust * _normalized((inputs * weights).T @ inputs) + (1 - trust) * plain)
    return torch.stack(found) + 1e-6 * torch.eye(columns, device=inputs.device)


def _normalized(moment: torch.Tensor) -> torch.Tensor:
    scale = moment.diagonal().mean()
    return moment / scale if scale > 0 else torch.eye(len(moment), device=moment.device)
