"""Rounds one expert's matrices, and finds the costs of all schemes, with whatever `moe_collab` is on the path.

A program for `expert_speed`, which runs it with this engine and with an old one; it reports seconds as `peak.report`
does. Weights are heavy-tailed, inputs correlated.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_collab.calibration import costs, moments
from moe_collab.formats import TERNARY, Scheme
from moe_collab.rounding import Rounder

SCHEMES = [
    *(Scheme(TERNARY, group) for group in (32, 64, 128)),
    *(Scheme(bits, group, symmetric) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128) for symmetric in (1, 0)),
]
"""Those that `bench-allocation` offers."""
FEW = [Scheme(TERNARY, 128), Scheme(2, 32, False), Scheme(4, 128)]
"""Of which an engine that rounds for every cost is measured; the others take as long."""
COST_TOKENS = 2048


def matrices(shapes: list[list[int]], tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(weights [rows, columns], inputs [tokens, columns], gradients [draws, tokens, rows]) of each shape."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    for rows, columns in shapes:
        tails = draw(rows, 5).square().mean(-1, keepdim=True).rsqrt()  # Student's t with 5 degrees of freedom
        inputs = draw(tokens, columns) * draw(columns).abs() + 0.1 * draw(tokens, 64) @ draw(64, columns)
        yield 0.02 * draw(rows, columns) * tails, inputs, draw(2, tokens, rows) * draw(tokens, 1)


@contextmanager
def stage(name: str, taken: dict[str, float]) -> Iterator[None]:
    """Add the processor time of the block to `taken`."""
    print(f"STAGE {name}", flush=True)
    began = time.process_time()
    yield
    taken[name] = taken.get(name, 0.0) + time.process_time() - began


def measure(shapes: list[list[int]], tokens: int, with_costs: bool) -> dict[str, float]:
    """Processor seconds of second moments, of rounding to 4 bits, and of the costs of all schemes."""
    taken: dict[str, float] = {}
    old = hasattr(moments, "second_moments")
    for weights, inputs, gradients in matrices(shapes, tokens):
        with stage("moments", taken):
            moment = moments.second_moments(inputs, gradients[0]) if old else moments.second_moment(inputs, gradients)
        with stage("rounding", taken):
            Rounder()(weights[None], moment[None], Scheme(4, 128))
        with stage("costs", taken):
            few = inputs[:COST_TOKENS], gradients[:, :COST_TOKENS]
            if with_costs:
                (_rounded_costs if old else _costs)(weights, moment, *few)
    if old:
        taken["costs"] *= len(SCHEMES) / len(FEW)
    return taken


def _costs(weights: torch.Tensor, _: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor) -> list[float]:
    """As `costs.expert_problems` finds them."""
    sums = moments.Sums()
    sums.see(inputs, gradients)
    moment = moments.moment_of([inputs], sums.token_weights(inputs.shape[1]), inputs.shape[1])
    problem = costs.RoundingProblem.of(weights, moment, sums.row_weights)
    return [problem.predicted(Rounder(), scheme) for scheme in SCHEMES]


def _rounded_costs(
    weights: torch.Tensor, moment: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor
) -> list[float]:
    """As `LayerStudy.rounding_cost` of the old engine found them."""
    found = []
    for scheme in FEW:
        error = Rounder()(weights[None], moment[None], scheme).values()[0] - weights
        found.append(float(((inputs @ error.T) * gradients[0]).sum(-1).double().square().mean()))
    return found


def peak_rate() -> float:
    """Operations a second of a large matrix product."""
    large, rates = torch.randn(2048, 2048), []
    for _ in range(3):
        taken: dict[str, float] = {}
        with stage("peak", taken):
            large @ large
        rates.append(2 * 2048**3 / taken["peak"])
    return max(rates)


def main() -> None:
    """Do the job that the only argument describes."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    rate = peak_rate()
    taken = measure(job["shapes"], job["tokens"], job["costs"])
    print("RESULT " + json.dumps(taken | {"operations_per_second": rate}), flush=True)


if __name__ == "__main__":
    main()
