"""Importance and selection, against numbers worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from moe_collab import MoeCollabError
from moe_collab.pruning import importance, kept_experts, scaled_top_k, target_num_experts
from moe_collab.statistics import RouterStatistics, routed_weights


def moe(num_experts=8, top_k=2, n_group=1, topk_group=1):
    reach = lambda kept: kept // n_group * topk_group  # noqa: E731
    return SimpleNamespace(num_experts=num_experts, top_k=top_k, n_group=n_group, reachable=reach)


def test_importance_is_the_papers():
    statistics = RouterStatistics(3)
    statistics.update(torch.tensor([[1.5, 1.0], [2.0, 0.5]]), torch.tensor([[0, 1], [0, 1]]), scaling_factor=2.5)
    assert statistics.frequency.tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close(statistics.mean_weight, torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64))
    torch.testing.assert_close(importance(statistics, 0.5), torch.tensor([0.85, 0.65, 0.0], dtype=torch.float64))


def test_not_finite_statistics_name_layer_and_expert():
    statistics = RouterStatistics(2)
    statistics.update(torch.tensor([[float("nan")]]), torch.tensor([[1]]))
    with pytest.raises(MoeCollabError, match=r"layer 7: .* experts \[1\]"):
        statistics.check_finite("layer 7")


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
    assert target_num_experts(moe(*shape), retention, num_experts) == kept


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
        target_num_experts(moe(*shape), None, num_experts)


@pytest.mark.parametrize(("arguments", "top_k"), [((8, 256, 192), 6), ((2, 8, 6), 2), ((2, 8, 5), 1), ((1, 8, 2), 1)])
def test_top_k_in_proportion_rounded_half_up(arguments, top_k):
    assert scaled_top_k(*arguments) == top_k
