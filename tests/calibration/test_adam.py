"""Adam goes on from any of its states with the bits of one that was never interrupted."""

import pytest
import torch
from torch import nn

from moe_collab.calibration.adam import Adam, pauses

STEPS = 25


def adam():
    """Two groups of parameters, of which one is reached by some batches only and another by none."""
    generator = torch.Generator().manual_seed(3)
    always, sometimes, never = (nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(3))
    data = [(torch.randn(rows, 3, generator=generator), rows == 9) for rows in (4, 9, 5, 30)]

    def loss(batch):
        inputs, reached = batch
        output = inputs @ always.T
        return (output + inputs.square() @ sometimes.T if reached else output).square().sum(), len(inputs)

    return Adam([([always, never], 1e-2), ([sometimes], 3e-2)], data, loss, STEPS)


def copied(state):
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_goes_on_from_any_step(step):
    expected, first, second = adam(), adam(), adam()
    expected.go_to(STEPS)
    first.go_to(step)
    second.go_on_from(copied(first.state()))
    assert second.taken == step
    second.go_to(STEPS)
    found = second.state()
    assert found.keys() == expected.state().keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.state().items())


def test_does_not_write_to_the_state_that_it_goes_on_from():
    first, second = adam(), adam()
    first.go_to(12)
    state = copied(first.state())
    second.go_on_from(state)
    second.go_to(STEPS)
    assert all(torch.equal(value, state[name]) for name, value in first.state().items())


@pytest.mark.parametrize("steps", [1, 5, 10, 19, 20, 200, 203])
def test_pauses_are_even_and_end_with_the_last_step(steps):
    found = pauses(steps)
    assert found[-1] == steps and len(found) <= 20
    assert {later - former for former, later in zip([0, *found], found[:-1], strict=False)} <= {max(1, steps // 10)}
