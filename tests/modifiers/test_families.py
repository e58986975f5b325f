"""Every family, through real oneshot(): pruned, allocated, quantized, saved, reloaded; and those we do not know."""

import json
from dataclasses import replace

import pytest
import torch
from loguru import logger
from safetensors.torch import load_file, save_file

from integration.families import check, readme_rows
from integration.tiny_models import TINY_FAMILIES
from moe_collab import MoeCollabError, architectures
from moe_collab.architectures import family_of, register_family
from moe_collab.moe_model import describe

from .conftest import load, run

README = {row.family: row for row in readme_rows()}


def test_readme_lists_every_family():
    assert tuple(README) == TINY_FAMILIES


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_whole_path(family, tmp_path):
    row, _ = check(family, tmp_path)
    assert (row.prune, row.save, row.reload) == (True, True, True), row
    stated = README[family]
    assert (stated.prune, stated.save, stated.reload) == (row.prune, row.save, row.reload)


def test_layers_for_multi_token_prediction_are_dropped_with_notice(tiny, tmp_path):
    source = tiny("deepseek_v3", num_nextn_predict_layers=1)
    tensors = load_file(source / "model.safetensors")
    predictor = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    predictor["model.layers.2.eh_proj.weight"] = torch.zeros(128, 256)
    save_file(tensors | predictor, source / "model.safetensors", metadata={"format": "pt"})
    notices = []
    sink = logger.add(notices.append, level="WARNING")
    run(source, {"ExpertPruningModifier": {"retention": 0.75}}, output=tmp_path / "out")
    logger.remove(sink)
    assert any("layers for multi-token prediction are left out" in notice for notice in notices)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not [n for n in load_file(tmp_path / "out/model.safetensors") if n.startswith("model.layers.2.")]


@pytest.fixture
def unknown(tiny, monkeypatch):
    """A model whose `model_type` nobody knows; what the test registers is forgotten."""
    monkeypatch.setattr(architectures, "FAMILIES", list(architectures.FAMILIES))
    model = load(tiny("qwen3_moe"))
    model.config.model_type = "mystery_moe"
    return model


def test_an_unknown_family_is_refused_with_what_to_do(unknown):
    with pytest.raises(MoeCollabError) as refused:
        run(unknown, {"ExpertPruningModifier": {"retention": 0.75}})
    message = str(refused.value)
    assert "'mystery_moe' is no MoE family moe-collab knows (qwen2_moe, " in message
    assert "register_family(Family(('mystery_moe',)" in message
    assert "num_experts_per_tok = 2" in message and "num_experts = 8" in message


def test_a_family_described_from_outside_is_compressed(unknown, tmp_path):
    register_family(replace(architectures.find_family("qwen3_moe"), model_types=("mystery_moe",)))
    run(unknown, {"ExpertPruningModifier": {"retention": 0.75}}, output=tmp_path / "out")
    assert describe(unknown).num_experts == 6
    assert (
        len([n for n in load_file(tmp_path / "out/model.safetensors") if n.endswith("experts.5.up_proj.weight")]) == 2
    )


def test_a_described_family_without_its_config_keys_is_refused(unknown):
    register_family(architectures.Family(("mystery_moe",), num_experts_keys=("moe_width", "n_paths")))
    with pytest.raises(MoeCollabError, match="experts per layer is under none of the keys moe_width, n_paths"):
        family_of(unknown.config)
