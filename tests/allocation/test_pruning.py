"""Experts dropped inside the optimum: the routers' constraints always hold, bounds are true, minima exact."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_collab import MoeCollabError
from moe_collab.allocation import ExpertChoice, masked_violations, solve, solve_physical
from moe_collab.routers import RouterLimits


def limits(top_k, n_group=1, topk_group=1):
    return RouterLimits(0, top_k, n_group, topk_group)


def problem(seed, layers, groups, width, options, shared=0, keep=False):
    """Experts in random order with a dropped option each (the first only if not `keep`), and `shared` other items."""
    rng = np.random.default_rng(seed)
    experts = layers * groups * width
    layer = np.concatenate((np.repeat(np.arange(layers), groups * width), np.full(shared, -1)))
    group = np.concatenate((np.tile(np.repeat(np.arange(groups), width), layers), np.zeros(shared, dtype=int)))
    sizes = np.sort(rng.integers(1, 40, (experts + shared, options)), axis=1)
    costs = rng.random(sizes.shape) * np.exp(rng.normal(0, 1, (len(sizes), 1)))
    sizes[int(keep) : experts, 0] = 0
    costs[:experts, 0] *= 3
    order = rng.permutation(len(sizes))
    return sizes[order], costs[order], layer[order], group[order]


def kept_by(solution, sizes, layers):
    return (layers < 0) | (sizes[np.arange(len(sizes)), solution.choice] > 0)


def allowed(kept, pruning):
    if pruning.form == "masked":
        return not masked_violations(kept, pruning)
    counts = pruning.kept_counts(kept)
    return (counts == counts[0, 0]).all() and counts[0, 0] >= pruning.limits.least_kept


def brute_force(sizes, costs, budget, pruning):
    """(least bytes, least cost within the budget) over all allowed allocations; inf where there is none."""
    rows, verdicts = np.arange(len(sizes)), {}
    least, best = np.inf, np.inf
    for combination in itertools.product(range(sizes.shape[1]), repeat=len(sizes)):
        size, cost = sizes[rows, combination].sum(), costs[rows, combination].sum()
        if size >= least and (size > budget or cost >= best):
            continue
        kept = (pruning.layers < 0) | (sizes[rows, combination] > 0)
        if verdicts.setdefault(kept.tobytes(), None) is None:
            verdicts[kept.tobytes()] = allowed(kept, pruning)
        if verdicts[kept.tobytes()]:
            least = min(least, size)
            best = min(best, cost) if size <= budget else best
    return least, best


SHAPE = st.sampled_from([(1, 1, 5), (2, 1, 3), (1, 2, 3), (1, 3, 2), (2, 1, 2)])


@pytest.mark.parametrize("form", ["physical", "masked"])
@given(
    seed=st.integers(0, 10**6),
    shape=SHAPE,
    top_k=st.integers(1, 4),
    live=st.integers(1, 2),
    share=st.floats(0, 0.7),
    shared=st.integers(0, 1),
    keep=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_against_brute_force(form, seed, shape, top_k, live, share, shared, keep):
    sizes, costs, layers, groups = problem(seed, *shape, 3, shared, keep)
    pruning = ExpertChoice(form, layers, groups, limits(top_k, shape[1], min(live, shape[1])))
    budget = int(share * sizes.max(axis=1).sum())
    least, best = brute_force(sizes, costs, budget, pruning)
    if np.isinf(best):
        with pytest.raises(MoeCollabError, match="pruning" if np.isinf(least) else f"needs {int(least)} bytes"):
            solve(sizes, costs, budget, pruning=pruning)
        return
    solution = solve(sizes, costs, budget, pruning=pruning)
    assert solution.size <= budget
    assert allowed(kept_by(solution, sizes, layers), pruning)
    assert solution.bound <= best + 1e-9 and best <= solution.cost + 1e-9


@pytest.mark.parametrize("form", ["physical", "masked"])
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1), shape=st.sampled_from([(4, 4, 8), (6, 1, 24)]))
@settings(max_examples=25, deadline=None)
def test_constraints_hold_and_the_bound_is_near(form, seed, share, shape):
    sizes, costs, layers, groups = problem(seed, *shape, 6, shared=5)
    pruning = ExpertChoice(form, layers, groups, limits(5, shape[1], 2))
    budget = int(share * sizes.max(axis=1).sum())
    try:
        solution = solve(sizes, costs, budget, pruning=pruning)
    except MoeCollabError as error:
        assert "needs" in str(error)
        return
    assert solution.size <= budget and solution.bound <= solution.cost
    assert allowed(kept_by(solution, sizes, layers), pruning)
    # Of 767 random problems the largest gap was 1 %; one just above the smallest possible size had 2.9 %.
    assert solution.gap < (0.02 if share >= 0.06 else 0.05)


def test_the_scan_is_as_good_as_every_count_alone():
    sizes, costs, layers, groups = problem(3, 4, 2, 6, 5)
    pruning = ExpertChoice("physical", layers, groups, limits(3, 2, 2))
    budget = int(0.3 * sizes.max(axis=1).sum())
    scan = solve_physical(sizes, costs, budget, pruning)
    assert set(scan.costs) <= set(scan.bounds) <= set(range(2, 7))
    for kept in scan.bounds:
        alone = solve_physical(sizes, costs, budget, pruning, kept=kept)
        assert alone.kept == kept and alone.solution.bound == pytest.approx(scan.bounds[kept])
        assert alone.solution.cost >= scan.solution.cost
    assert scan.costs[scan.kept] == scan.solution.cost
    assert (pruning.kept_counts(kept_by(scan.solution, sizes, layers)) == scan.kept).all()


def test_nothing_is_dropped_when_everything_fits_and_dropping_costs():
    sizes, costs, layers, groups = problem(5, 2, 1, 8, 4)
    costs[:, 0] = 100.0
    for form in ("physical", "masked"):
        pruning = ExpertChoice(form, layers, groups, limits(2))
        solution = solve(sizes, costs, int(sizes.max(axis=1).sum()), pruning=pruning)
        assert kept_by(solution, sizes, layers).all() and solution.gap == 0


def test_a_harmful_expert_is_dropped_though_it_would_fit():
    sizes, costs = np.array([[0, 5]] * 4), np.array([[0.0, 1.0], [9.0, 1.0], [9.0, 1.0], [9.0, 1.0]])
    pruning = ExpertChoice("masked", np.zeros(4, int), np.zeros(4, int), limits(2))
    assert solve(sizes, costs, 1000, pruning=pruning).choice.tolist() == [0, 1, 1, 1]


def test_masked_violations_name_each_rule():
    pruning = ExpertChoice("masked", np.zeros(12, int), np.repeat(np.arange(4), 3), limits(5, 4, 2))

    def wrong(*counts):
        return masked_violations(np.concatenate([np.arange(3) < count for count in counts]), pruning)

    assert wrong(3, 3, 3, 3) == wrong(3, 2, 0, 0) == wrong(3, 3, 2, 0) == []
    assert "would keep 1 expert" in wrong(3, 3, 1, 3)[0]
    assert "1 routing groups would keep" in wrong(3, 0, 0, 0)[0]
    assert "could reach 4 experts" in wrong(3, 2, 2, 0)[0]


def test_same_input_same_output():
    sizes, costs, layers, groups = problem(9, 4, 2, 8, 5)
    for form in ("physical", "masked"):
        pruning = ExpertChoice(form, layers, groups, limits(4, 2, 1))
        first, second = (solve(sizes, costs, 700, pruning=pruning).choice for _ in range(2))
        assert (first == second).all()


def test_bad_couplings():
    sizes, costs, layers, groups = problem(1, 1, 1, 4, 3)
    with pytest.raises(MoeCollabError, match="name each of the 4 items"):
        solve(sizes, costs, 100, pruning=ExpertChoice("masked", layers[1:], groups[1:], limits(1)))
    with pytest.raises(MoeCollabError, match="group outside 0 to 0"):
        solve(sizes, costs, 100, pruning=ExpertChoice("masked", layers, groups + 1, limits(1)))
    with pytest.raises(MoeCollabError, match="no item is an expert"):
        solve(sizes, costs, 100, pruning=ExpertChoice("masked", layers - 1, groups, limits(1)))
    with pytest.raises(MoeCollabError, match="5 experts per group cannot be kept: the smallest group has 4"):
        solve_physical(sizes, costs, 100, ExpertChoice("physical", layers, groups, limits(1)), kept=5)
