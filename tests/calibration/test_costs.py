"""Costs in closed form against really rounded matrices, on the trained fixture."""

import math

import pytest
import torch

pytest.importorskip("llmcompressor")

from moe_collab.calibration import Calibration
from moe_collab.calibration import costs as costs_module
from moe_collab.calibration.costs import RoundingProblem, expert_problems, rounding_costs
from moe_collab.calibration.experts import ExpertWeights
from moe_collab.calibration.study import LayerStudy
from moe_collab.formats import Scheme
from moe_collab.moe_model import describe
from moe_collab.rounding import Rounder

SCHEMES = [Scheme(2, 128), Scheme(2, 32, False), Scheme(4, 128), Scheme(6, 64)]


@pytest.fixture(scope="module")
def calibration(model, batches):
    return Calibration(model, describe(model), batches)


def test_costs_are_those_of_real_rounding(calibration, model):
    """Of experts that were not drawn for the factors, too; and all schemes take as many roundings as were drawn."""
    rounder, rounded, stock = Rounder(), [], RoundingProblem.measured

    def counted(self, *arguments):
        rounded.append(self)
        return stock(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundingProblem, "measured", counted)
        table = rounding_costs(calibration, ["lm_head"], lambda _: SCHEMES, rounder)
    assert len(rounded) == len(SCHEMES) * (2 * costs_module._ROUNDED + 1)
    layer = describe(model).layers[1]
    study = LayerStudy(layer, calibration.samples(["lm_head"])[0][layer.name])
    logs = []
    for index in layer.live_experts[1::5]:
        for half, projection in (("gate_up", "gate_proj"), ("down", "down_proj")):
            problem = expert_problems(study, index)[half]
            parts = 2 if half == "gate_up" else 1
            for scheme in SCHEMES:
                cost = parts * table.cost(f"{layer.experts_name}.{index}.{projection}", scheme)
                logs.append(math.log(cost / problem.measured(rounder, scheme)))
    assert max(map(abs, logs)) < 1.0 and torch.tensor(logs).std() < 0.35
    assert [table.cost("lm_head", scheme) for scheme in SCHEMES] == sorted(
        (table.cost("lm_head", scheme) for scheme in SCHEMES), reverse=True
    )


def test_a_sample_of_rows_stands_for_all(calibration, model, monkeypatch):
    layer = describe(model).layers[0]
    study = LayerStudy(layer, calibration.samples()[0][layer.name])
    index = int(study.samples.counts.argmax())
    rows = len(ExpertWeights.of(layer, index, study.device).down)
    whole = expert_problems(study, index)["down"]
    monkeypatch.setattr(costs_module, "_ROWS", rows // 2)
    part = expert_problems(study, index)["down"]
    assert (len(whole.weights), len(part.weights)) == (rows, rows // 2)
    costs = [problem.predicted(Rounder(), Scheme(3, 128)) for problem in (whole, part)]
    assert costs[1] == pytest.approx(costs[0], rel=0.2)


def test_an_expert_that_no_token_reaches_has_a_tiny_cost(calibration, model):
    layer = describe(model).layers[0]
    samples = calibration.samples()[0][layer.name]
    unseen = torch.where(samples.indices == 3, -1, samples.indices)
    counts = samples.counts.clone()
    counts[3] = 0
    study = LayerStudy(layer, type(samples)(**vars(samples) | {"indices": unseen, "counts": counts}))
    for problem in expert_problems(study, 3).values():
        costs = [problem.predicted(Rounder(), scheme) for scheme in SCHEMES]
        assert 0 < costs[2] < costs[0] < 1e-9
