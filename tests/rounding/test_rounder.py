"""Rounding: codes on the grid, losses that only fall, the best of what each stage can do."""

from itertools import pairwise

import pytest
import torch

from moe_collab.formats import TERNARY, Scheme
from moe_collab.rounding import Rounder
from moe_collab.rounding.feedback import coordinate_descent, damped, feed_back, loss, refit
from moe_collab.rounding.scales import best_grid

SCHEMES = [
    Scheme(TERNARY, 64),
    Scheme(2, 32, False),
    Scheme(2, 64, True),
    Scheme(3, -1, False),
    Scheme(4, 128, True),
    Scheme(6, 64, False),
    Scheme(8, 128, False),
]


def problem(batch: int = 3, rows: int = 16, columns: int = 256):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, 600, columns, generator=generator) * torch.rand(columns, generator=generator)
    inputs += inputs.roll(1, -1)
    return torch.randn(batch, rows, columns, generator=generator), inputs.mT @ inputs / 600


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_and_zeros_are_integers_of_the_scheme(scheme):
    weights, moments = problem()
    grid = Rounder()(weights, moments[:, None], scheme)
    low, high = scheme.levels
    assert torch.equal(grid.codes, grid.codes.round()) and torch.equal(grid.zeros, grid.zeros.round())
    assert grid.codes.min() >= low and grid.codes.max() <= high
    assert grid.zeros.abs().max() == 0 if scheme.symmetric else grid.zeros.min() >= low
    assert torch.equal(grid.scales, grid.scales.bfloat16().float())
    assert grid.values().shape == weights.shape and grid.scales.shape[2] == 256 // scheme.group_of(256)


@pytest.mark.parametrize("scheme", SCHEMES[:5], ids=str)
def test_each_stage_lowers_the_loss(scheme):
    weights, moments = problem()
    moments = damped(moments, 0.003)
    grid = best_grid(weights, moments.diagonal(dim1=-2, dim2=-1), scheme)
    losses = [loss(weights, moments, grid).sum()]
    feed_back(weights, moments, grid)
    losses.append(loss(weights, moments, grid).sum())
    for _ in range(2):
        refit(weights, moments, grid)
        coordinate_descent(weights, moments, grid, passes=1)
        losses.append(loss(weights, moments, grid).sum())
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_blocks_of_columns_change_nothing(monkeypatch):
    weights, moments = problem(1, 4, 96)
    results = []
    for block in (96, 32):
        monkeypatch.setattr("moe_collab.rounding.feedback._BLOCK", block)
        results.append(Rounder()(weights, moments[:, None], Scheme(3, 32, False)))
    assert torch.equal(results[0].codes, results[1].codes)
    torch.testing.assert_close(results[0].values(), results[1].values())


def test_row_blocks_are_rounded_by_their_own_moments():
    weights, moments = problem(1, 8)
    both = Rounder()(weights, torch.stack([moments[0], torch.eye(256)])[None], Scheme(2, 64))
    first = Rounder()(weights[:, :4], moments[:, None], Scheme(2, 64))
    assert torch.equal(both.codes[:, :4], first.codes)


def test_nothing_known_of_the_inputs_rounds_to_finite_values():
    weights, _ = problem()
    grid = Rounder()(weights, torch.eye(256).expand(3, 1, -1, -1), Scheme(2, 64, False))
    assert torch.isfinite(grid.values()).all() and grid.values().any()
