"""The text form of schemes."""

import pytest

from moe_collab.errors import MoeCollabError
from moe_collab.formats import DENSE, PRUNED, TERNARY, Scheme


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (Scheme(3, 128, False), "int3-g128-asym"),
        (Scheme(8, -1, True), "int8-channel-sym"),
        (Scheme(TERNARY, 64), "ternary-g64"),
        (DENSE, "dense"),
        (PRUNED, "pruned"),
    ],
)
def test_round_trip(scheme, text):
    assert str(scheme) == text
    assert Scheme.parse(text) == scheme


@pytest.mark.parametrize("text", ["int1-g128-sym", "int3-g128", "ternary-g128-asym", "int3-g0-sym", "", "16"])
def test_other_texts_are_refused(text):
    with pytest.raises(MoeCollabError, match="no scheme"):
        Scheme.parse(text)
