"""Budgets as people write them."""

import pytest

from moe_collab import MoeCollabError
from moe_collab.allocation import parse_bytes


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
