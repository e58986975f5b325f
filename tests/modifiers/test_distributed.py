"""Two processes that share out the calibration set decide what one decides, and write what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integration.compress import recipe

from .conftest import run

SCRIPT = Path(__file__).with_name("one_of_several.py")


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes: sums over other shares of the work differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_two_processes_give_the_plan_of_one(family, tiny, tmp_path):
    def modifiers(folder, **work):
        return (
            {"ExpertPruningModifier": {"retention": 0.75, "statistics": str(folder / "statistics")} | work},
            {"ActivationSmoothModifier": {"num_experts_per_tok": "auto", "max_kl": 1.0, "strength": 0.5}},
            {"MixedBitAllocModifier": {"bpw": 3, "group_size": 32, "plan": str(folder / "plan.json")}},
            {"FisherGPTQModifier": {"ignore": ["lm_head"]}},
            {"RouterCalibrationModifier": {"steps": 4}},
        )

    one, two = tmp_path / "one", tmp_path / "two"
    run(tiny(family), *modifiers(one), output=one / "out")
    run_in_two(tiny(family), two, *modifiers(two, work=str(two / "work")))
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (one, two)]
    for key in ("schemes", "dropped", "routed_tokens", "predicted_bytes", "num_experts_per_tok"):
        assert plans[0][key] == plans[1][key]
    expected, found = (load_file(folder / "statistics" / "statistics.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert_same(one, two)


def run_in_two(model, folder, *modifiers, offload_folder=None):
    """The recipe by two processes, each with half of the calibration set; the checkpoint is `folder / "out"`.

    With `offload_folder` the model stays on disk.
    """
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe(*modifiers))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += [str(model), str(folder / "recipe.yaml"), str(folder / "out")]
    command += [str(offload_folder)] if offload_folder else []
    root = str(SCRIPT.parents[2])
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def assert_same(one, two):
    expected, found = (load_file(folder / "out" / "model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert not list(two.glob(".out*"))


def test_two_processes_round_in_one_pass_as_one_does(tiny, tmp_path):
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}
    quantize = {"config_groups": {"all": group}, "ignore": ["re:.*\\.gate$", "lm_head"], "objective": "outputs"}
    run(tiny("deepseek_v3"), {"FisherGPTQModifier": quantize}, output=tmp_path / "one" / "out")
    run_in_two(tiny("deepseek_v3"), tmp_path / "two", {"FisherGPTQModifier": quantize})
    assert_same(tmp_path / "one", tmp_path / "two")
