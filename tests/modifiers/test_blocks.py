"""What learns block by block because end to end does not fit in memory: the same on disk as in memory, and bounded."""

import re
import weakref

import pytest
import torch
from loguru import logger

import moe_collab
from moe_collab.calibration import block_tuning, fit, log_probabilities, mean_kl
from moe_collab.calibration.loose_grids import LooseGrid
from moe_collab.moe_model import describe
from moe_collab.plan import CompressionPlan

from .conftest import load, on_disk, run, samples
from .test_stream import digests

PRUNE = {"ExpertPruningModifier": {"retention": 0.75}}


@pytest.fixture
def little_memory(monkeypatch):
    """One byte is free."""
    monkeypatch.setattr(fit, "available_memory", lambda: 1)


@pytest.fixture
def said():
    lines = []
    sink = logger.add(lambda message: lines.append(str(message)), level="INFO", filter="moe_collab")
    yield lines
    logger.remove(sink)


def fisher(steps, bits=3):
    weights = {"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": 32}
    targets = ["re:.*experts.*_proj$", "re:.*o_proj$"]
    return {
        "FisherGPTQModifier": {
            "config_groups": {"all": {"targets": targets, "weights": weights}},
            "tuning_steps": steps,
        }
    }


def test_tuning_on_disk_gives_the_bytes_that_memory_gives_and_lowers_kl(tiny, tmp_path, little_memory, said):
    path, data = tiny("deepseek_v3"), samples(64)
    for where in ("memory", "disk"):
        model = on_disk(path, tmp_path / "offload") if where == "disk" else load(path)
        run(model, fisher(8), output=tmp_path / where, data=data)
    assert digests(tmp_path / "memory") == digests(tmp_path / "disk")
    original, batches = moe_collab.load(path, dtype=torch.float32), list(data)[7::8]
    base = [log_probabilities(original, batch) for batch in batches]
    found = mean_kl(moe_collab.load(tmp_path / "disk", dtype=torch.float32), batches, base)
    logged = re.findall(r"brought KL on held-out tokens from ([\d.]+) to ([\d.]+)", "".join(said))
    (before, after), again = [[*map(float, kl)] for kl in logged]
    assert after < before and again == [before, after]
    assert after == pytest.approx(found, rel=0.03)  # hidden states between blocks are in bfloat16


def test_tuning_aims_at_the_model_before_experts_are_dropped(tiny, tmp_path, little_memory, said):
    plan = {"bpw": 1.7, "bits": [2], "group_size": 64, "pruning": "physical", "plan": str(tmp_path / "plan.json")}
    digests_of = {}
    for where in ("memory", "disk"):  # the second run reuses the plan
        model = load(tiny("qwen3_moe")) if where == "memory" else on_disk(tiny("qwen3_moe"), tmp_path / "offload")
        quantize = {"FisherGPTQModifier": {"ignore": ["lm_head"], "tuning_steps": 2}}
        run(model, {"MixedBitAllocModifier": plan}, quantize, output=tmp_path / where)
        digests_of[where] = digests(tmp_path / where)
    assert any(CompressionPlan.load(plan["plan"]).dropped.values())
    assert digests_of["memory"] == digests_of["disk"] != {}


def test_calibration_on_disk_gives_the_bytes_that_memory_gives(tiny, tmp_path, little_memory, said):
    for where in ("memory", "disk"):
        model = load(tiny("qwen3_moe")) if where == "memory" else on_disk(tiny("qwen3_moe"), tmp_path / "offload")
        calibrate = {"RouterCalibrationModifier": {"steps": 4}}
        run(model, PRUNE, fisher(0, 4), calibrate, output=tmp_path / where)
    assert digests(tmp_path / "memory") == digests(tmp_path / "disk") != {}
    assert sum("error of its output" in line for line in said) == 2 * model.config.num_hidden_layers
    gains = [line for line in said if "KL on held-out tokens" in line]
    assert len(gains) == 2 and not any("nothing is changed" in line for line in gains)
    assert sum("WARNING" in line and "one block takes about" in line for line in said) == 2


def test_a_block_in_which_nothing_learns_is_passed_through(tiny):
    calibrate = {"RouterCalibrationModifier": {"steps": 4, "objective": "blocks", "targets": ["router"]}}
    expected = run(tiny("deepseek_v3"), PRUNE).state_dict()  # its first block has no router
    found = run(tiny("deepseek_v3"), PRUNE, calibrate).state_dict()
    changed = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert changed and all(name.endswith("mlp.gate.weight") for name in changed)


def test_memory_decides_unless_it_is_asked_for(tiny, tmp_path, monkeypatch, said):
    calibrate = {"RouterCalibrationModifier": {"objective": "predictions", "steps": 1}}
    cases = {
        "little": (1, fisher(1), "FisherGPTQModifier: learns block by block; end to end takes"),
        "much": (1 << 50, fisher(1), "FisherGPTQModifier: learns end to end; end to end takes"),
        "asked": (1, calibrate, "RouterCalibrationModifier: learns end to end, as asked for; end to end takes"),
    }
    for case, (free, modifier, expected) in cases.items():
        monkeypatch.setattr(fit, "available_memory", lambda free=free: free)
        said.clear()
        model = on_disk(tiny("qwen3_moe"), tmp_path / case)
        run(model, *([PRUNE] if case == "asked" else []), modifier, data=samples(8, 16))
        (line,) = [line for line in said if "learns" in line]
        assert re.search(rf"{expected} about [\d.]+ GB, and [\d.]+ GB are free", line)


def test_what_does_harm_is_left_out(tiny, tmp_path, monkeypatch, little_memory, said):
    run(tiny("qwen3_moe"), fisher(0), output=tmp_path / "rounded", data=samples(8))
    monkeypatch.setattr("moe_collab.calibration.loose_grids._FACTOR_RATE", 30.0)
    run(on_disk(tiny("qwen3_moe"), tmp_path / "offload"), fisher(2), output=tmp_path / "tuned", data=samples(8))
    assert any("nothing is changed" in line for line in said)
    assert digests(tmp_path / "tuned") == digests(tmp_path / "rounded")


def test_one_expert_at_a_time_takes_memory_to_learn(tiny, tmp_path, monkeypatch, little_memory):
    alive, most = set(), []

    class Counted(LooseGrid):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(id(self))
            weakref.finalize(self, alive.discard, id(self))
            most.append(len(alive))

    monkeypatch.setattr(block_tuning, "LooseGrid", Counted)
    model = on_disk(tiny("qwen3_moe"), tmp_path)
    run(
        model,
        {"FisherGPTQModifier": {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16", "tuning_steps": 1}},
        data=samples(8),
    )
    assert len(most) == sum(1 for layer in describe(model).layers for _ in layer.projections())
    assert max(most) <= 6  # of one expert, and of the one before it until it is collected
