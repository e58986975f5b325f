"""Importance and selection, against numbers worked out by hand."""

import pytest
import torch

from moe_collab import MoeCollabError
from moe_collab.pruning import (
    CRITERIA,
    importance,
    kept_experts,
    scaled_top_k,
    super_experts,
    unmasked_experts,
    wanted_num_experts,
    whole_groups,
)
from moe_collab.routers import RouterLimits
from moe_collab.statistics import ExpertStatistics, SavedStatistics, routed_weights


def seen(routed, num_experts=3, num_domains=1):
    """Statistics of (expert, router weight, output [H], domain) for each token."""
    statistics = ExpertStatistics(num_experts, num_domains)
    for expert, weight, output, domain in routed:
        statistics.see(torch.tensor([domain]))
        found = torch.tensor([output], dtype=torch.float64)
        columns = torch.tensor([weight], dtype=torch.float64), found.norm(dim=-1), found.abs().amax(-1)
        statistics.add(expert, *columns, torch.tensor([domain]))
    return statistics


def test_criteria_by_hand():
    statistics = seen([(0, 0.6, [3.0, -4.0], 0), (0, 0.8, [0.0, 1.0], 0), (1, 0.3, [0.0, 2.0], 0), (0, 0.4, [6, 8], 0)])
    assert statistics.frequency.tolist() == [0.75, 0.25, 0.0]
    expected = {
        "frequency": [0.75, 0.25, 0],
        "mean_weight": [0.6, 0.3, 0],
        "output_norm": [16 / 3, 2, 0],
        "reap": [7.8 / 3, 0.6, 0],
        "frequency_reap": [7.8 / 4, 0.6 / 4, 0],
    }
    assert set(expected) == set(CRITERIA)
    for name, values in expected.items():
        torch.testing.assert_close(
            CRITERIA[name](statistics), torch.tensor(values, dtype=torch.float64), atol=1e-6, rtol=0
        )
    torch.testing.assert_close(importance(statistics, 0.5), torch.tensor([0.675, 0.275, 0], dtype=torch.float64))
    assert statistics.largest.tolist() == [[8.0, 2.0, 0.0]]


def test_domains_are_apart_and_add_up():
    statistics = seen([(0, 0.5, [1.0], 0), (1, 0.5, [1.0], 1), (1, 0.7, [2.0], 1)], num_domains=2)
    assert statistics.domain(0).frequency.tolist() == [1.0, 0.0, 0.0]
    assert statistics.domain(1).frequency.tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(statistics.frequency, torch.tensor([1 / 3, 2 / 3, 0], dtype=torch.float64))


def test_super_experts_hold_the_outliers():
    usual = [(index, 0.5, [1.0], 0) for index in range(3)]
    found = super_experts({"a": seen([*usual, (1, 0.5, [900.0], 0)]), "b": seen(usual)})
    assert found == {"a": [1], "b": []}


def test_not_finite_statistics_name_layer_and_expert():
    with pytest.raises(MoeCollabError, match=r"layer 7: .* experts \[1\]"):
        seen([(1, float("nan"), [1.0], 0)]).check("layer 7")
    with pytest.raises(MoeCollabError, match="reached no token"):
        ExpertStatistics(2).check("layer 7")


def test_statistics_are_stored_whole(tmp_path):
    statistics = {"layer": seen([(0, 0.5, [1.0], 0), (1, 0.5, [1.0], 1)], num_domains=2)}
    meta = SavedStatistics(model_fingerprint="a", domains=["code", "prose"], num_experts=3, layers=["layer"])
    meta.save(tmp_path / "kept", statistics)
    domains, found = SavedStatistics.load(tmp_path / "kept", "a")
    assert domains == ["code", "prose"]
    assert torch.equal(found["layer"].weighted_norm_sum, statistics["layer"].weighted_norm_sum)
    with pytest.raises(MoeCollabError, match="of another model"):
        SavedStatistics.load(tmp_path / "kept", "b")
    (tmp_path / "kept" / "statistics.safetensors").write_bytes(b"cut off")
    with pytest.raises(MoeCollabError, match="delete the folder"):
        SavedStatistics.load(tmp_path / "kept", "a")


def test_masked_choice_takes_the_lowest_that_the_router_can_miss():
    limits = RouterLimits(num_experts=8, top_k=2, n_group=2, topk_group=1)
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert unmasked_experts(limits, "layer", scores, 6) == [0, 1, 2, 3, 6, 7]
    # A group of four whose two best must stay, so the other group has to give.
    assert unmasked_experts(limits, "layer", scores, 5) == [0, 1, 2, 6, 7]
    with pytest.raises(MoeCollabError, match="no fewer than 4"):
        unmasked_experts(limits, "layer", scores, 3)


def test_routed_weights_come_slot_by_slot():
    indices, weights = torch.tensor([[0, 1], [1, 0], [1, 2]]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    tokens, found = routed_weights(indices, weights, 1)
    assert tokens.tolist() == [1, 2, 0]
    torch.testing.assert_close(found, torch.tensor([0.3, 0.5, 0.2]))


def test_equal_drop_per_group_and_stable_ties():
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert kept_experts(scores, 4) == [0, 1, 2, 3]
    assert kept_experts(scores, 4, n_group=2) == [0, 1, 6, 7]
    assert kept_experts(torch.ones(6), 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("shape", "retention", "num_experts", "kept"),
    [
        ((256, 8, 8, 4), 0.75, None, 192),
        ((8, 2), 0.6, None, 5),
        ((8, 2, 4, 4), 0.6, None, 8),
        ((16, 2, 4, 4), None, 9, 12),
    ],
)
def test_counts_round_up_to_whole_groups(shape, retention, num_experts, kept):
    assert whole_groups(RouterLimits(*shape), wanted_num_experts(RouterLimits(*shape), retention, num_experts)) == kept


@pytest.mark.parametrize(
    ("shape", "num_experts", "message"),
    [
        ((8, 4), 3, "fewer than the 4 activated"),
        ((8, 2), 9, "cannot keep 9 of 8"),
        ((8, 1, 4, 4), 4, "1 per routing group"),
        ((9, 1, 2, 2), 4, "do not divide into n_group = 2"),
    ],
)
def test_impossible_counts(shape, num_experts, message):
    with pytest.raises(MoeCollabError, match=message):
        whole_groups(RouterLimits(*shape), wanted_num_experts(RouterLimits(*shape), None, num_experts))


@pytest.mark.parametrize(("arguments", "top_k"), [((8, 256, 192), 6), ((2, 8, 6), 2), ((2, 8, 5), 1), ((1, 8, 2), 1)])
def test_top_k_in_proportion_rounded_half_up(arguments, top_k):
    assert scaled_top_k(*arguments) == top_k
