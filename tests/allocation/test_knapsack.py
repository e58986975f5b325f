"""The solver against brute force, scipy's MILP, its own bound, and bad input."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from integration.benchmarks.solver import milp_cost, milp_problem
from moe_collab import MoeCollabError
from moe_collab.allocation import solve
from moe_collab.allocation.exact import ExactSolver
from moe_collab.allocation.relaxation import lower_hulls

OPTION = st.tuples(st.integers(0, 40), st.integers(-20, 60))
PROBLEM = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def padded(raw):
    width = max(map(len, raw))
    sizes = [[s for s, _ in options] + [7] * (width - len(options)) for options in raw]
    costs = [[float(c) for _, c in options] + [np.inf] * (width - len(options)) for options in raw]
    return np.array(sizes), np.array(costs)


def realistic(items, seed=0):
    """Errors falling by about 4 a bit, sizes of unequal tensors, and a first option of 0 bits."""
    rng = np.random.default_rng(seed)
    bits = np.array([0, 1.75, 2.25, 3.25, 4.25, 8.25])
    sizes = (rng.integers(1, 40, (items, 1)) * 1024 * bits / 8).astype(np.int64) + rng.integers(0, 9, (items, 6))
    sizes[:, 0] = 0
    return sizes, np.exp(rng.normal(0, 2, (items, 1))) * 4.0**-bits * np.exp(rng.normal(0, 0.4, (items, 6)))


@given(PROBLEM, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_equals_brute_force(raw, share):
    sizes, costs = padded(raw)
    rows = np.arange(len(raw))
    every = [np.array(c) for c in itertools.product(*[range(len(options)) for options in raw])]
    least, most = (int(f(sizes[rows, c].sum() for c in every)) for f in (min, max))
    budget = int(least + share * (most - least))
    solution = solve(sizes, costs, budget)
    best = min(costs[rows, c].sum() for c in every if sizes[rows, c].sum() <= budget)
    assert solution.size == sizes[rows, solution.choice].sum() <= budget
    assert solution.cost == costs[rows, solution.choice].sum() == pytest.approx(best, abs=1e-9)
    assert solution.gap == 0


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_equals_milp(first):
    for seed in range(first, first + 25):
        problem = milp_problem(seed)
        solution = solve(*problem)
        assert solution.cost == pytest.approx(milp_cost(*problem), rel=1e-9), seed
        assert solution.gap == 0 and solution.size <= problem[2], seed


@given(st.integers(101, 400), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_hundreds_of_items_are_solved_to_the_optimum(items, share, seed):
    sizes, costs = realistic(items, seed)
    budget = int(share * sizes.max(axis=1).sum())
    solution = solve(sizes, costs, budget)
    assert solution.size <= budget and solution.gap == 0


def test_thousands_of_items_come_within_a_ten_thousandth_of_the_bound():
    sizes, costs = realistic(5000)
    for share in (0.1, 0.3, 0.7):
        assert solve(sizes, costs, int(share * sizes.max(axis=1).sum())).gap < 1e-4


def test_bound_holds_when_states_run_out(monkeypatch):
    monkeypatch.setattr("moe_collab.allocation.exact._MAX_EXPANDED", 24)
    proven = []
    for seed in range(200):
        sizes, costs, budget = milp_problem(seed)
        steps = lower_hulls(sizes, costs)
        solver = ExactSolver(sizes, costs, budget, steps, steps.relax(budget).choice)
        monkeypatch.undo()
        optimum = solve(sizes, costs, budget).cost
        monkeypatch.setattr("moe_collab.allocation.exact._MAX_EXPANDED", 24)
        assert solver.bound <= optimum * (1 + 1e-12) and solver.cost >= optimum * (1 - 1e-12), seed
        proven.append(solver.bound == solver.cost)
    assert not all(proven)


def test_same_input_same_output():
    sizes, costs = realistic(300)
    first, second = (solve(sizes, costs, 400_000).choice for _ in range(2))
    assert (first == second).all()


def test_input_is_left_alone():
    sizes, costs = realistic(50)
    before = sizes.copy(), costs.copy()
    solve(sizes, costs, 100_000)
    assert (before[0] == sizes).all() and (before[1] == costs).all()


def test_identical_and_dominated_options():
    sizes = np.array([[5, 5, 5, 9], [3, 3, 3, 3]])
    costs = np.array([[2.0, 2.0, 4.0, 3.0], [1.0, 0.5, 0.5, 7.0]])
    solution = solve(sizes, costs, 100)
    assert (solution.size, solution.cost, solution.gap) == (8, 2.5, 0)


def test_everything_free():
    solution = solve(np.zeros((3, 2), int), np.array([[1.0, 0.0]] * 3), 0)
    assert (solution.choice.tolist(), solution.gap) == ([1, 1, 1], 0)


def test_too_small_a_budget_says_what_is_needed():
    with pytest.raises(MoeCollabError, match=r"10 bytes is too small.* needs 12 bytes"):
        solve(np.array([[5, 9], [7, 8]]), np.ones((2, 2)), 10)


@pytest.mark.parametrize(
    ("sizes", "costs", "match"),
    [
        ([[1, 2], [3, 4]], [[1.0, 1.0], [np.nan, 1.0]], "item 1 has a cost that is NaN"),
        ([[1, 2], [3, 4]], [[-np.inf, 1.0], [1.0, 1.0]], "item 0 has a cost"),
        ([[1, 2], [3, -4]], [[1.0, 1.0], [1.0, 1.0]], "item 1 has a size that is negative"),
        ([[1.0, 2.0], [np.nan, 4.0]], [[1.0, 1.0], [1.0, 1.0]], "item 1 has a size that is negative or not finite"),
        ([[1, 2], [3, 4]], [[1.0, 1.0], [np.inf, np.inf]], "item 1 has no option"),
        ([[1, 2]], [[1.0]], r"must both be \[items, options\]"),
    ],
)
def test_bad_input_names_the_item(sizes, costs, match):
    with pytest.raises(MoeCollabError, match=match):
        solve(np.array(sizes), np.array(costs), 100)


def test_padding_may_hold_any_size():
    sizes, costs = np.array([[4, -1], [2, 1]]), np.array([[1.0, np.inf], [1.0, 3.0]])
    assert solve(sizes, costs, 5).choice.tolist() == [0, 1]
