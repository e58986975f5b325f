"""Second moments of a matrix's inputs, tokens weighted by what errors at its outputs do to the loss."""

from __future__ import annotations

import torch

__all__ = ["second_moment", "token_weights"]

_DAMPING = 0.003
"""Added to the diagonal, whose mean is 1."""
_PANEL = 512
"""Columns of the product that are computed at a time; what lies above them is their mirror image."""


def second_moment(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """The second moment [columns, columns] of `inputs` [tokens, columns], by `token_weights`.

    A little of the identity is added, so that codes fit other tokens too, and experts that hardly any token reaches are
    rounded to nearest. A moment for each quarter of the rows, by their own gradients, took four times as long and gave
    the same KL within 1 % on both fixtures.
    """
    weighted = inputs * token_weights(inputs, gradients).sqrt()[:, None]
    columns = inputs.shape[1]
    moment = inputs.new_empty(columns, columns)
    for start in range(0, columns, _PANEL):
        stop = start + _PANEL
        moment[start:, start:stop] = weighted[:, start:].T @ weighted[:, start:stop]
        moment[start:stop, stop:] = moment[stop:, start:stop].T
    moment.diagonal().add_(_DAMPING)
    return moment


def token_weights(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Weights [tokens] with which the second moment of `inputs` [tokens, columns] has a mean diagonal of 1.

    Tokens are weighted by the square of their `gradients` [draws, tokens, rows], mean over draws, and the more equally
    the fewer tokens the moment rests on: unequal weights w count as Kish's effective number, (sum w)^2 / sum w^2. All
    are 0 if the inputs are.
    """
    weights = gradients.square().sum(-1).mean(0)
    effective = weights.sum().square() / weights.square().sum().clamp_min(1e-30)
    trust = effective / (effective + inputs.shape[1])
    sizes = inputs.square().mean(-1)
    own, plain = (sizes @ weights).clamp_min(1e-30), sizes.sum().clamp_min(1e-30)
    return trust * weights / own + (1 - trust) / plain
