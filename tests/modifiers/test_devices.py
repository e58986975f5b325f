"""A whole recipe on an accelerator gives the bytes that the CPU gives."""

import pytest

from tests.standin import run_on_standin

SCRIPT = """
import pathlib, tempfile, torch, moe_collab
from integration.compress import recipe
from integration.tiny_models import build_tiny
from llmcompressor import oneshot
from llmcompressor.utils import load_context
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from tests.standin import absent

def compress(out):
    with load_context():
        model = AutoModelForCausalLM.from_pretrained(folder / "m", dtype="auto", attn_implementation="eager")
    g = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 250, (32,), generator=g) for _ in range(8)]
    data = DataLoader([{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in rows], batch_size=4)
    oneshot(model=model, dataset=data, output_dir=str(folder / out), recipe=recipe(*MODIFIERS(folder / out)))
    plan = folder / f"{out}.json"
    return (folder / out / "model.safetensors").read_bytes(), plan.read_text() if plan.exists() else ""

with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    build_tiny(FAMILY, folder / "m", num_hidden_layers=LAYERS, **EXPERTS)
    with absent():
        theirs = compress("cpu")
    assert compress("standin") == theirs
"""
PRUNE = {"ExpertPruningModifier": {"retention": 0.5}}
SMOOTH = {"ActivationSmoothModifier": {"num_experts_per_tok": "auto", "max_kl": 10, "strength": 0.5}}
FISHER = {"FisherGPTQModifier": {"ignore": ["lm_head"]}}
BLOCKS = {"FisherGPTQModifier": {"targets": ["re:.*experts.*_proj$", "re:.*o_proj$"], "scheme": "W4A16"}}
BLOCKS["FisherGPTQModifier"]["tuning_steps"] = 2


def allocation(**fields):
    return {"MixedBitAllocModifier": {"bpw": 3, "bits": [2, 4], "group_size": 64, "fixed": {"o_proj$": 4}} | fields}


@pytest.mark.parametrize(
    ("family", "modifiers"),
    [
        ("qwen3_moe", [PRUNE, SMOOTH]),
        ("qwen3_moe", [allocation(pruning="physical"), FISHER]),
        ("deepseek_v3", [allocation(), FISHER]),
        ("qwen3_moe", [allocation(), {"FisherGPTQModifier": {"ignore": ["lm_head"], "tuning_steps": 2}}]),
        ("qwen3_moe", [PRUNE, {"RouterCalibrationModifier": {"steps": 2}}]),
        ("qwen3_moe", [PRUNE, {"RouterCalibrationModifier": {"steps": 2, "objective": "blocks"}}]),
        ("qwen3_moe", [BLOCKS]),
    ],
    ids=["prune-smooth", "allocate-drop", "deepseek", "tune", "calibrate", "calibrate-blocks", "tune-blocks"],
)
def test_a_recipe_gives_the_cpus_bytes(family, modifiers):
    layers, experts = (2, {}) if family == "deepseek_v3" else (1, {"num_experts": 4})
    memory = "from moe_collab.calibration import fit\nfit.free_memory = lambda: 1\n" if modifiers == [BLOCKS] else ""
    head = f"FAMILY, LAYERS, EXPERTS = {family!r}, {layers}, {experts!r}\nMODIFIERS = lambda out: {modifiers!r}\n"
    run_on_standin(memory + head + SCRIPT)
