"""Second moments of a matrix's inputs, tokens weighted by what errors at its outputs do to the loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["Sums", "moment_of", "second_moment", "token_weights"]

_DAMPING = 0.003
"""Added to the diagonal, whose mean is 1."""
_PANEL = 512
"""Columns of a product that are computed at a time; what lies above them is their mirror image."""


class Sums:
    """Sums over gradients of a matrix's outputs and over its inputs, of tokens that are seen part by part."""

    def __init__(self) -> None:
        self._squares: list[torch.Tensor] = []
        self._sizes: list[torch.Tensor] = []
        self._rows: torch.Tensor | float = 0.0

    def see(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Inputs [tokens, columns] and gradients [draws, tokens, rows] of the loss by the outputs."""
        squares, sizes = gradients.square().mean(0), inputs.square().mean(-1)
        self._squares.append(squares.sum(-1))
        self._sizes.append(sizes)
        self._rows = self._rows + sizes @ squares

    @property
    def squares(self) -> torch.Tensor:
        """Each token's squared gradient, mean over draws and summed over rows, [tokens]."""
        return torch.cat(self._squares)

    @property
    def row_weights(self) -> torch.Tensor:
        """What an error e of each row costs, as a factor of e M e^T with the moment M: [rows].

        It is the mean over tokens of the row's squared gradient times the input's mean square.
        """
        return self._rows / max(1, len(self.squares))  # type: ignore[return-value]

    def token_weights(self, columns: int) -> torch.Tensor:
        """As `token_weights`, of what was seen."""
        return token_weights(self.squares, torch.cat(self._sizes), columns)


def token_weights(squares: torch.Tensor, sizes: torch.Tensor, columns: int) -> torch.Tensor:
    """Weights [tokens] with which the second moment of inputs of mean squares `sizes` has a mean diagonal of 1.

    Tokens are weighted by the `squares` of their gradients, and the more equally the fewer tokens the moment rests on:
    unequal weights w count as Kish's effective number, (sum w)^2 / sum w^2. All are 0 if the inputs are.
    """
    effective = squares.sum().square() / squares.square().sum().clamp_min(1e-30)
    trust = effective / (effective + columns)
    own, plain = (sizes @ squares).clamp_min(1e-30), sizes.sum().clamp_min(1e-30)
    return trust * squares / own + (1 - trust) / plain


def moment_of(parts: Iterable[torch.Tensor], weights: torch.Tensor, columns: int) -> torch.Tensor:
    """The second moment [columns, columns] of inputs, which come in `parts` [tokens, columns], by token `weights`.

    A little of the identity is added, so that codes fit other tokens too, and experts that hardly any token reaches are
    rounded to nearest.
    """
    moment, seen = weights.new_zeros(columns, columns), 0
    for part in parts:
        weighted = part * weights[seen : seen + len(part)].sqrt()[:, None]
        seen += len(part)
        for start in range(0, columns, _PANEL):
            own = slice(start, start + _PANEL)
            moment[start:, own].addmm_(weighted[:, start:].T, weighted[:, own])
    for start in range(0, columns, _PANEL):
        stop = start + _PANEL
        moment[start:stop, stop:] = moment[stop:, start:stop].T
    moment.diagonal().add_(_DAMPING)
    return moment


def second_moment(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """`moment_of` inputs [tokens, columns] that are all at hand; `gradients` [draws, tokens, rows]."""
    sums = Sums()
    sums.see(inputs, gradients)
    return moment_of([inputs], sums.token_weights(inputs.shape[1]), inputs.shape[1])
