"""Experts that no calibration token reaches, which stock GPTQ zeroes: no run is lost by them, whoever comes after."""

import pytest
import torch
from loguru import logger

from integration.tiny_models import build_tiny
from moe_collab import MoeCollabError
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.modifiers import expert_pruning, router_calibration
from moe_collab.modifiers.glue import starved
from moe_collab.moe_model import describe
from tests.checkpoint.directories import read_dense

from .conftest import load, run, samples

GPTQ = {"GPTQModifier": {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16"}}


def never_choosing(path, expert=5):
    """The model, its routers biased against one expert by their own weights, and that expert's original weights."""
    model = load(path)
    weights = {}
    for layer in describe(model).layers:
        layer.router.e_score_correction_bias[expert] = -100.0
        weights |= {name: m.weight.detach().clone() for name, index, _, m in layer.projections() if index == expert}
    return model, weights


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_tiny("glm4_moe", tmp_path_factory.mktemp("starved") / "glm4_moe", num_hidden_layers=3)


@pytest.mark.parametrize(
    "modifiers",
    [
        [GPTQ, {"RouterCalibrationModifier": {"steps": 2}}],
        [GPTQ, {"RouterCalibrationModifier": {"steps": 2, "objective": "blocks"}}],
        [{"ExpertPruningModifier": {"retention": 1.0}}, GPTQ, {"RouterCalibrationModifier": {"steps": 2}}],
    ],
    ids=["router calibration", "by blocks", "after pruning"],
)
def test_they_are_rounded_from_their_originals(modifiers, path, tmp_path):
    model, originals = never_choosing(path)
    run(model, *modifiers, output=tmp_path / "out", moe_calibrate_all_experts=False)
    dense = read_dense(tmp_path / "out")
    for name, weight in originals.items():
        error = (dense[f"{name}.weight"] - weight).float().norm() / weight.float().norm()
        assert error < 0.2, name


def test_pruning_alone_keeps_originals_too(path, tmp_path):
    model, originals = never_choosing(path)
    scores = {layer.name: [9, 8, 7, 6, 1, 5, 2, 3] for layer in describe(model).layers}
    (tmp_path / "scores.json").write_text(str(scores).replace("'", '"'))
    prune = {"ExpertPruningModifier": {"retention": 0.75, "criterion": str(tmp_path / "scores.json")}}
    run(model, prune, GPTQ, output=tmp_path / "out", moe_calibrate_all_experts=False)
    dense = read_dense(tmp_path / "out")
    for name, weight in originals.items():
        found = dense[f"{name.replace('experts.5', 'experts.4')}.weight"]
        assert (found - weight).float().norm() / weight.float().norm() < 0.2, name


def test_what_cannot_be_repaired_is_said_and_kept(path, tmp_path):
    model, _ = never_choosing(path)
    said = []
    sink = logger.add(said.append, level="ERROR")
    smooth = {"ActivationSmoothModifier": {"num_experts_per_tok": "keep"}}
    with pytest.raises(MoeCollabError, match=r"experts\.5\.") as refused:
        run(model, smooth, GPTQ, output=tmp_path / "out", moe_calibrate_all_experts=False)
    logger.remove(sink)
    assert str(tmp_path / "out") in str(refused.value)
    assert not (tmp_path / "out" / "config.json").exists()
    assert list((tmp_path / "out").glob(".moe-collab-*/*.safetensors"))


def test_nothing_is_copied_where_every_expert_sees_every_token(path, monkeypatch):
    model, _ = never_choosing(path)
    copied, stock = [], starved.repair_starved

    def spy(model, snap):
        copied.append(len(starved._ORIGINALS))
        stock(model, snap)

    monkeypatch.setattr(expert_pruning, "repair_starved", spy)
    run(model, {"ExpertPruningModifier": {"retention": 0.75}}, GPTQ)
    assert copied == [0]
    few = {"moe_calibrate_all_experts": False, "data": samples(1, 2)}
    run(load(path), {"ExpertPruningModifier": {"retention": 0.75}}, GPTQ, **few)
    assert copied[1] > 0


@pytest.mark.parametrize("modifier", [{"ExpertPruningModifier": {"retention": 0.75}}, {"ActivationSmoothModifier": {}}])
def test_rounding_to_nearest_after_any_of_ours_is_saved(modifier, path, tmp_path):
    nearest = {"QuantizationModifier": {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16"}}
    run(path, modifier, nearest, output=tmp_path / "out")
    assert Checkpoint(tmp_path / "out").quantized_modules()


def test_what_no_quantizer_has_rounded_yet_is_left_alone(path):
    model = load(path)
    names = {id(m): n for layer in describe(model).layers for n, *_, m in layer.projections()}
    before = {n: m.weight.detach().clone() for n, m in model.named_modules() if id(m) in names}
    seen, stock = {}, router_calibration.repair_starved

    def spy(model, snap):
        stock(model, snap)
        seen.update({n: torch.equal(model.get_submodule(n).weight, weight) for n, weight in before.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_calibration, "repair_starved", spy)
        run(model, {"RouterCalibrationModifier": {"steps": 1}}, GPTQ)
    assert seen and all(seen.values())
