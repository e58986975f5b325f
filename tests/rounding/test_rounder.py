"""Rounding: codes on the grid, losses that only fall, the best of what each stage can do."""

from itertools import pairwise

import pytest
import torch

from moe_collab.formats import TERNARY, Scheme
from moe_collab.kernels import cpu
from moe_collab.rounding import Rounder, left_over, loops, nearest_loss
from moe_collab.rounding.feedback import descend, factored, feed_back, loss
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
    moments = inputs.mT @ inputs / 600 + 0.003 * torch.eye(columns)
    return torch.randn(batch, rows, columns, generator=generator), moments


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_and_zeros_are_integers_of_the_scheme(scheme):
    weights, moments = problem()
    grid = Rounder()(weights, moments, scheme)
    low, high = scheme.levels
    assert torch.equal(grid.codes, grid.codes.round()) and torch.equal(grid.zeros, grid.zeros.round())
    assert grid.codes.min() >= low and grid.codes.max() <= high
    assert grid.zeros.abs().max() == 0 if scheme.symmetric else grid.zeros.min() >= low
    assert torch.equal(grid.scales, grid.scales.bfloat16().float())
    assert grid.values().shape == weights.shape and grid.scales.shape[2] == 256 // scheme.group_of(256)


@pytest.mark.parametrize("scheme", SCHEMES[:5], ids=str)
def test_each_stage_lowers_the_loss(scheme):
    weights, moments = problem()
    grid = best_grid(weights, moments.diagonal(dim1=-2, dim2=-1), scheme, torch.float32)
    losses = [loss(weights, moments, grid).sum()]
    feed_back(weights, factored(moments), grid)
    losses.append(loss(weights, moments, grid).sum())
    for _ in range(3):
        descend(weights, moments, grid, 1, torch.float32)
        losses.append(loss(weights, moments, grid).sum())
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_feedback_is_gptq():
    """As arXiv 2210.17323 writes it, column by column with the inverse's triangle, in the same order."""
    weights, moments = problem(1, 8, 96)
    grid = best_grid(weights, moments.diagonal(dim1=-2, dim2=-1), Scheme(4, 32), torch.float32)
    found = factored(moments)
    feed_back(weights, found, grid)
    order = found.order[0].flip(0)
    damped = moments[0] + 0.007 * moments[0].diagonal().mean() * torch.eye(96)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order].double()), upper=True)
    left, scales = weights[0][:, order].double(), grid.wide(grid.scales)[0][:, order].double()
    for j in range(96):
        code = (left[:, j] / scales[:, j]).round().clamp(-8, 7)
        assert torch.equal(code.float(), grid.codes[0, :, order[j]])
        error = (left[:, j] - code * scales[:, j]) / inverse[j, j]
        left[:, j + 1 :] -= error[:, None] * inverse[j, None, j + 1 :]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_loops_do_what_torch_does(scheme, dtype, monkeypatch):
    weights, moments = problem(2, 21)  # rows that fill no whole number of vectors
    assert loops._is_compiled("cpu")
    found = []
    for instructions in ("best", "scalar"):
        cpu.configure(instructions)
        found.append(Rounder(scale_dtype=dtype)(weights, moments, scheme))
    cpu.configure("best")
    monkeypatch.setattr(loops, "_is_compiled", lambda device: False)
    plain = Rounder(scale_dtype=dtype)(weights, moments, scheme)
    for compiled in found:
        torch.testing.assert_close(loss(weights, moments, compiled), loss(weights, moments, plain), rtol=1e-3, atol=0)
        assert (compiled.codes != plain.codes).float().mean() < 1e-3


def test_compiled_loops_refuse_what_does_not_fit():
    weights, moments = torch.randn(4, 64), torch.eye(64)
    scales, order = torch.ones(4, 2), torch.arange(64)
    arguments = {
        "weights": weights,
        "left": weights.clone(),
        "scales": scales,
        "zeros": torch.zeros(4, 2),
        "order": order,
        "factor": moments,
        "begin": 0,
        "low": -8,
        "high": 7,
        "codes": torch.empty(4, 64),
        "errors": torch.empty(4, 32),
    }
    torch.ops.moe_collab.round_feed_back(**arguments)
    for wrong, message in (
        ({"scales": torch.ones(4, 3)}, "64 columns cannot share 3 scales"),
        ({"factor": torch.eye(32)}, "factor: .64, 64. expected"),
        ({"order": order + 1}, "order: there is no column"),
        ({"begin": 48}, "errors: columns 48 to 80"),
        ({"codes": torch.empty(4, 64, dtype=torch.float64)}, "codes: contiguous float32"),
    ):
        with pytest.raises(Exception, match=message):
            torch.ops.moe_collab.round_feed_back(**arguments | ({"begin": 32} if "order" in wrong else {}) | wrong)


@pytest.mark.parametrize("scheme", SCHEMES[3:], ids=str)
def test_what_feedback_leaves_is_known_beforehand(scheme):
    weights, moments = problem(1, 256)
    predicted = nearest_loss(weights, left_over(moments), scheme).sum()
    grid = Rounder(descent=False)(weights, moments, scheme)
    assert loss(weights, moments, grid).sum() / predicted == pytest.approx(1.0, abs=0.15)


def test_blocks_of_columns_change_nothing(monkeypatch):
    weights, moments = problem(1, 4, 96)
    results = []
    for block in (96, 32):
        monkeypatch.setattr("moe_collab.rounding.feedback.BLOCK", block)
        results.append(Rounder()(weights, moments, Scheme(3, 32, False)))
    assert torch.equal(results[0].codes, results[1].codes)
    torch.testing.assert_close(results[0].values(), results[1].values())


def test_nothing_known_of_the_inputs_rounds_to_finite_values():
    weights, _ = problem()
    grid = Rounder()(weights, torch.eye(256).expand(3, -1, -1), Scheme(2, 64, False))
    assert torch.isfinite(grid.values()).all() and grid.values().any()
