"""Targets cover exactly what they should, and stay few."""

import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_collab.checkpoint.groups import compact_targets, config_groups

ALL = [
    f"model.layers.{i}.mlp.experts.{e}.{p}" for i in (1, 11) for e in (0, 1, 10, 11) for p in ("up_proj", "down_proj")
]
ALL += ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "lm_head"]
# Characters that mean something in a regex, and an index that is no number to us.
ALL += ["odd+name", "oddname", "oddddname", "a(b)|c", "a.experts.01.w1", "a.experts.1.w1", "aXexperts.1.w1"]


def matches(targets, name):
    return [t for t in targets if re.match(t.removeprefix("re:"), name)]


@given(st.sets(st.sampled_from(ALL)))
@settings(max_examples=100, deadline=None)
def test_exact_and_disjoint(names):
    targets = compact_targets(names)
    for name in ALL:
        assert len(matches(targets, name)) == (name in names)


def test_one_group_per_layer_and_scheme():
    schemes = {name: {"weights": {"num_bits": 2 + i % 2}} for i, name in enumerate(ALL)}
    groups = config_groups(schemes)
    for name in ALL:
        found = [g for g in groups.values() if matches(g["targets"], name)]
        assert len(found) == 1 and found[0]["weights"] == schemes[name]["weights"]


def test_deepseek_scale_is_quick():
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{p}"
        for i in range(58)
        for e in range(256)
        for p in ("gate_proj", "up_proj", "down_proj")
    ]
    start = time.perf_counter()
    groups = config_groups({n: {"weights": {"num_bits": hash(n) % 3 + 2}} for n in names})
    assert len(groups) == 58 * 3
    # Seconds, where exact names would take hours in the matchers.
    assert time.perf_counter() - start < 30
