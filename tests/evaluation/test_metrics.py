"""Metrics against values worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from moe_collab.evaluation import evaluate, log_probabilities


class Fixed(torch.nn.Module):
    """A model that always predicts the same distribution over two tokens."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, input_ids):
        return SimpleNamespace(logits=torch.tensor([self.p, 1 - self.p]).log().expand(*input_ids.shape, 2))


def test_by_hand():
    tokens = torch.tensor([[0, 0, 1], [1, 0, 0]], dtype=torch.int16)
    found = evaluate(Fixed(0.25), tokens, log_probabilities(Fixed(0.5), tokens), batch_size=1)
    assert found.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found.perplexity == pytest.approx(math.exp(-(3 * math.log(0.25) + math.log(0.75)) / 4))
    assert found.top1 == 0.0


def test_a_model_agrees_with_itself():
    tokens = torch.tensor([[0, 1, 1]])
    found = evaluate(Fixed(0.3), tokens, log_probabilities(Fixed(0.3), tokens))
    assert found.kl == pytest.approx(0, abs=1e-7) and found.top1 == 1.0
