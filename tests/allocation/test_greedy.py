"""The search respects its budget and finds what it should on problems solved by hand and by brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_collab import MoeCollabError
from moe_collab.allocation import Item, Option, allocate, back_off, parse_bytes, smallest_bytes

SMALL = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 100)), min_size=1, max_size=4), min_size=1, max_size=5
)


def build(raw):
    return [Item.of(str(i), [Option(b, s, c) for b, (s, c) in enumerate(o)]) for i, o in enumerate(raw)]


def size(items, choice):
    return sum(i.options[c].size for i, c in zip(items, choice, strict=True))


def cost(items, choice):
    return sum(i.options[c].cost for i, c in zip(items, choice, strict=True))


@given(SMALL, st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_within_budget_and_no_upgrade_left_out(raw, share):
    items = build(raw)
    largest = sum(i.options[-1].size for i in items)
    budget = int(smallest_bytes(items) + share * (largest - smallest_bytes(items)))
    choice = allocate(items, budget)
    assert size(items, choice) <= budget
    for index, item in enumerate(items):
        for better in range(choice[index] + 1, len(item.options)):
            assert size(items, choice) + item.options[better].size - item.options[choice[index]].size > budget
    every = itertools.product(*[range(len(i.options)) for i in items])
    best = min(cost(items, c) for c in every if size(items, c) <= budget)
    if share == 1:
        assert cost(items, choice) == best


@given(SMALL, st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_back_off_frees_what_is_asked(raw, excess):
    items = build(raw)
    full = [len(i.options) - 1 for i in items]
    room = size(items, full) - smallest_bytes(items)
    if excess > room:
        with pytest.raises(MoeCollabError, match="over the budget"):
            back_off(items, full, excess)
    else:
        assert size(items, full) - size(items, back_off(items, full, excess)) >= excess


def test_best_gain_per_byte_goes_first():
    a = Item.of("a", [Option(2, 10, 9.0), Option(4, 20, 1.0)])
    b = Item.of("b", [Option(2, 10, 9.0), Option(4, 14, 5.0)])
    assert allocate([a, b], 24) == [0, 1]
    assert allocate([a, b], 34) == [1, 1]


def test_too_small_a_budget_says_by_how_much():
    with pytest.raises(MoeCollabError, match="7 bytes more"):
        allocate([Item.of("a", [Option(2, 10, 1.0)])], 3)


@pytest.mark.parametrize(
    ("text", "size"),
    [("3.1MB", 3_100_000), (77, 77), ("103 GB", 103 * 10**9), ("128GiB", 128 * 2**30), ("1.5kb", 1500)],
)
def test_budgets_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3MB", "3XB", "0", "3 MB GB"])
def test_bad_budgets_name_the_key(text):
    with pytest.raises(MoeCollabError, match="here: "):
        parse_bytes(text, "here")
