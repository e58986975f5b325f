"""RouterCalibrationModifier: closer to the original after pruning and rounding, never further from it."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import moe_collab
from integration.compress import FIXTURE, recipe, run_oneshot, tokens, uniform_recipe
from moe_collab.errors import MoeCollabError
from moe_collab.evaluation import evaluate, log_probabilities
from moe_collab.modifiers import router_calibration as module

from .conftest import load, run, samples

PRUNE = {"ExpertPruningModifier": {"retention": 0.75, "criterion": "importance"}}


def calibrate(**fields):
    return {"RouterCalibrationModifier": {"steps": 20, **fields}}


@pytest.fixture(scope="module")
def kl():
    """Checkpoint of the trained model -> KL to the original on tokens it was not calibrated by."""
    test = tokens("selection")[:64]
    base = log_probabilities(moe_collab.load(FIXTURE, dtype=torch.float32), test)
    return lambda path: evaluate(moe_collab.load(path, dtype=torch.float32), test, base).kl


def text():
    """Some calibration sequences, cut short."""
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens("calibration")[:64, :48]]
    return DataLoader(rows, batch_size=8)


def compress(path, *modifiers):
    run_oneshot(recipe(*modifiers), path, data=text())
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return compress(tmp_path_factory.mktemp("pruned") / "out", PRUNE)


@pytest.mark.parametrize("objective", ["predictions", "blocks"])
def test_makes_up_for_lost_experts(objective, pruned, kl, tmp_path):
    calibrated = compress(tmp_path / "out", PRUNE, calibrate(objective=objective))
    assert kl(calibrated) < 0.97 * kl(pruned)
    before, after = (load_file(path / "model.safetensors") for path in (pruned, calibrated))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any("mlp.gate.weight" in name for name in changed) and any("norm" in name for name in changed)
    assert all("experts" in name or "gate" in name or "norm" in name for name in changed)


@pytest.mark.parametrize("target", ["router", "norms", "gains"])
def test_only_what_is_named_learns(target, pruned, tmp_path):
    calibrated = compress(tmp_path / "out", PRUNE, calibrate(targets=[target], steps=8))
    before, after = (load_file(path / "model.safetensors") for path in (pruned, calibrated))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    part = {"router": "mlp.gate.", "norms": "norm", "gains": "experts."}[target]
    assert changed and all(part in name for name in changed)


def test_after_gptq_codes_stay_and_scales_learn(kl, tmp_path):
    quantize = uniform_recipe(2, 128)
    run_oneshot(quantize, tmp_path / "before", data=text())
    more = "  calibration_modifiers:\n    RouterCalibrationModifier: {steps: 20}\n"
    run_oneshot(quantize + more, tmp_path / "after", data=text())
    assert kl(tmp_path / "after") < 0.95 * kl(tmp_path / "before")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {name for name in before if name.endswith(("weight_packed", "weight_zero_point"))} <= same
    assert not any("experts" in name and name.endswith("weight_scale") for name in same)


def test_what_finds_no_gain_changes_nothing(tiny, monkeypatch):
    monkeypatch.setattr(module, "_PACES", dict.fromkeys(module._PACES, 1e4))
    expected = run(tiny("qwen3_moe"), PRUNE).state_dict()
    found = run(tiny("qwen3_moe"), PRUNE, calibrate(steps=4)).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_an_unchanged_model_stays_so(tiny):
    expected = load(tiny("qwen3_moe")).state_dict()
    found = run(tiny("qwen3_moe"), calibrate()).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_bad_input(tiny):
    with pytest.raises(ValueError, match="'router', 'norms', 'gains' or 'scales'"):
        run(tiny("qwen3_moe"), PRUNE, calibrate(targets=["routers"]))
    with pytest.raises(ValueError, match="at least 1 item"):
        run(tiny("qwen3_moe"), PRUNE, calibrate(targets=[]))
    with pytest.raises(MoeCollabError, match="two batches"):
        run(tiny("qwen3_moe"), PRUNE, calibrate(), data=samples(4))
