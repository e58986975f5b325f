"""A plan that somebody else has made is applied without a budget: in one forward pass, or without any data."""

import json

import pytest
import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache.disk import DiskCache
from llmcompressor import oneshot
from torch.utils.data import DataLoader

import moe_collab
from integration.compress import FIXTURE, calibration, checkpoint_size, recipe, tokens
from moe_collab import MoeCollabError
from moe_collab.evaluation import evaluate, log_probabilities
from moe_collab.moe_model import describe
from tests.standin import run_on_standin

from .conftest import QUANTIZE, load, on_disk, run, samples
from .test_devices import SCRIPT
from .test_stream import digests

NEAREST = {"QuantizationModifier": {"ignore": ["lm_head"]}}


def fisher(objective):
    return {"FisherGPTQModifier": {"ignore": ["lm_head"], "objective": objective}}


def apply(plan, **fields):
    return {"MixedBitAllocModifier": {"plan": str(plan)} | fields}


@pytest.fixture(scope="module")
def planned(tiny, tmp_path_factory):
    """family -> a plan of ternary, 2 and 4 bits, without some experts, and 4 bits for o_proj."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("plans")
            form = {"pruning": "masked" if family == "deepseek_v3" else "physical"}
            fields = {"bpw": 1.7, "bits": ["ternary", 2, 4], "group_size": [32, 128], "fixed": {"o_proj$": 4}}
            fields["plan"] = str(folder / "plan.json")
            run(tiny(family), {"MixedBitAllocModifier": fields | form}, fisher("predictions"), output=folder / "made")
            made[family] = folder / "plan.json"
        return made[family]

    return get


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_it_decides_all_that_the_recipe_would(family, planned, tiny, tmp_path):
    plan = json.loads(planned(family).read_text())
    run(tiny(family), apply(planned(family)), fisher("predictions"), output=tmp_path / "applied")
    assert any(plan["dropped"].values())
    assert digests(tmp_path / "applied") == digests(planned(family).parent / "made")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_rounding_in_one_pass_is_the_same_on_disk(family, planned, tiny, tmp_path):
    for place in ("memory", "disk"):
        model = load(tiny(family)) if place == "memory" else on_disk(tiny(family), tmp_path / "offload")
        run(model, apply(planned(family)), fisher("outputs"), output=tmp_path / place)
    assert digests(tmp_path / "memory") == digests(tmp_path / "disk") != {}
    size = json.loads(planned(family).read_text())["predicted_bytes"]
    assert checkpoint_size(tmp_path / "memory") == size


def test_rounding_in_one_pass_is_the_same_on_an_accelerator():
    modifiers = [{"FisherGPTQModifier": {"targets": ["Linear"], "scheme": "W4A16", "objective": "outputs"}}]
    modifiers[0]["FisherGPTQModifier"]["ignore"] = ["re:.*\\.gate$"]
    head = f"FAMILY, LAYERS, EXPERTS = 'qwen3_moe', 1, {{}}\nMODIFIERS = lambda out: {modifiers!r}\n"
    run_on_standin(head + SCRIPT)


@pytest.mark.parametrize("objective", ["outputs", "weights"])
def test_every_expert_is_read_once(objective, tiny, tmp_path, monkeypatch):
    """Until it is rounded; what is rounded is packed, and no longer read."""
    read, stock = {}, DiskCache.onload

    def onload(self, offloaded):
        read[id(offloaded)] = read.get(id(offloaded), 0) + 1
        return stock(self, offloaded)

    model = on_disk(tiny("qwen3_moe"), tmp_path / "offload")
    layers = describe(model).layers
    with disable_onloading():
        experts = [id(module.weight) for layer in layers for *_, module in layer.projections()]
    monkeypatch.setattr(DiskCache, "onload", onload)
    quantize = fisher(objective)
    quantize["FisherGPTQModifier"] |= {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16"}
    run(model, quantize, output=tmp_path / "out")
    assert {read[weight] for weight in experts} == {1}


def test_plans_need_no_data_where_rounding_needs_none(tmp_path, tiny):
    path = tiny("qwen3_moe")
    made = {"bpw": 3, "bits": [2, 3, 4], "plan": str(tmp_path / "plan.json")}
    run(path, {"MixedBitAllocModifier": made}, NEAREST)
    sizes = set()
    for name, quantize in (("weights", fisher("weights")), ("nearest", NEAREST)):
        steps = recipe(apply(tmp_path / "plan.json"), quantize)
        oneshot(model=on_disk(path, tmp_path / f"{name}-offload"), recipe=steps, output_dir=str(tmp_path / name))
        sizes.add(checkpoint_size(tmp_path / name))
        assert torch.isfinite(moe_collab.load(tmp_path / name)(input_ids=torch.arange(8)[None]).logits).all()
    assert sizes == {json.loads((tmp_path / "plan.json").read_text())["predicted_bytes"]}


def test_a_run_that_was_killed_goes_on(planned, tiny, tmp_path, monkeypatch):
    from moe_collab.calibration.scratch import Scratch

    class Killed(BaseException):
        pass

    path, steps = tiny("qwen3_moe"), recipe(apply(planned("qwen3_moe")), fisher("outputs"))
    given = {"recipe": steps, "dataset": samples()}
    moe_collab.oneshot(model=on_disk(path, tmp_path / "a"), output_dir=tmp_path / "one", **given)
    given |= {"work": tmp_path / "work", "output_dir": tmp_path / "two"}
    stock, left = Scratch.finish, [3]

    def finish(self, name):
        left[0] -= 1
        if not left[0]:
            raise Killed
        return stock(self, name)

    monkeypatch.setattr(Scratch, "finish", finish)
    with pytest.raises(Killed):
        moe_collab.oneshot(model=on_disk(path, tmp_path / "b"), **given)
    monkeypatch.undo()
    moe_collab.oneshot(model=on_disk(path, tmp_path / "c"), **given)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != {}


def test_one_pass_keeps_the_predictions_of_a_trained_model(tmp_path):
    experts = {"targets": ["re:.*experts.*_proj$"], "weights": {"num_bits": 3, "strategy": "group", "group_size": 128}}
    test = tokens("test")[:32]
    base = log_probabilities(moe_collab.load(FIXTURE, dtype=torch.float32), test)
    kl = {}
    for objective in ("weights", "outputs"):
        quantize = {"FisherGPTQModifier": {"config_groups": {"experts": experts}, "objective": objective}}
        data = calibration(64) if objective == "outputs" else None
        oneshot(model=load(FIXTURE), recipe=recipe(quantize), dataset=data, output_dir=str(tmp_path / objective))
        kl[objective] = evaluate(moe_collab.load(tmp_path / objective, dtype=torch.float32), test, base).kl
    assert kl["outputs"] < 0.7 * kl["weights"]


@pytest.mark.parametrize(
    ("fields", "quantize", "message"),
    [
        ({"plan": "nowhere.json"}, QUANTIZE, "there is no nowhere.json to apply"),
        ({"costs": "c.json"}, QUANTIZE, r"\['costs'\] decide nothing"),
        ({"bits": [2, 4]}, QUANTIZE, r"\['bits'\] decide nothing where a `plan` is only applied"),
        ({}, QUANTIZE, "only FisherGPTQModifier rounds to ternary"),
    ],
)
def test_what_cannot_be_applied(fields, quantize, message, planned, tiny):
    steps = {"MixedBitAllocModifier": {"plan": str(planned("qwen3_moe"))} | fields}
    with pytest.raises((MoeCollabError, ValueError), match=message):
        run(tiny("qwen3_moe"), steps, quantize)


def test_a_plan_for_another_model(planned, tiny, tmp_path):
    plan = json.loads(planned("qwen3_moe").read_text())
    schemes, layers = plan["schemes"], list(plan["dropped"])
    gate = next(name for name, scheme in schemes.items() if name.endswith("gate_proj") and scheme != "dense")
    for change, message in (
        ({"model_fingerprint": "0" * 12}, "was made for another model"),
        ({"schemes": {name.replace("layers.1", "layers.7"): scheme for name, scheme in schemes.items()}}, "no model"),
        ({"schemes": dict.fromkeys(schemes, "dense")}, "leaves all weights as they are"),
        ({"schemes": schemes | {gate: "int4-g48-sym"}}, r"int4-g48-sym, but has \d+ columns"),
        ({"schemes": schemes | {gate: "int5-g32-sym"}}, "they need one scheme"),
        ({"schemes": schemes | {"model.layers.0.mlp.gate": "int4-g32-sym"}}, "no Linear of this model, or a router"),
        ({"dropped": {layers[0]: [99], layers[1]: [0]}}, r"drops experts \[99\]"),
        ({"dropped": {layers[0]: [0]}}, "where all should keep"),
        ({"dropped": {"model.norm": [0]}}, "which is no MoE layer"),
        ({"pruning": "none"}, "its `pruning` is none"),
        ({"version": 9}, "not a valid compression plan of version 2"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(plan | change))
        with pytest.raises(MoeCollabError, match=message):
            run(tiny("qwen3_moe"), apply(tmp_path / "plan.json"), fisher("outputs"))


def test_stock_quantizers_that_would_lose_experts_or_lack_data(tiny, tmp_path):
    path, plan = tiny("qwen3_moe"), tmp_path / "plan.json"
    run(path, {"MixedBitAllocModifier": {"bpw": 3, "bits": [2, 3, 4], "plan": str(plan)}}, QUANTIZE)
    with pytest.raises(MoeCollabError, match="GPTQModifier: it needs calibration data"):
        oneshot(model=load(path), recipe=recipe(apply(plan), QUANTIZE))
    with pytest.raises(MoeCollabError, match="moe_calibrate_all_experts"):
        run(path, apply(plan), QUANTIZE, moe_calibrate_all_experts=False)


def test_a_plan_that_is_made_is_tried_as_it_will_be_rounded(tiny):
    with pytest.raises(MoeCollabError, match="for a plan that is there already"):
        run(tiny("qwen3_moe"), {"MixedBitAllocModifier": {"bpw": 3}}, fisher("outputs"))


def test_padding_alone_is_no_data(tiny):
    rows = [{"input_ids": torch.zeros(8, dtype=torch.long), "attention_mask": torch.zeros(8, dtype=torch.long)}] * 2
    quantize = fisher("outputs")
    quantize["FisherGPTQModifier"] |= {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16"}
    with pytest.raises(MoeCollabError, match="reached no token"):
        run(tiny("qwen3_moe"), quantize, data=DataLoader(rows, batch_size=1))


def test_work_of_another_plan_is_refused(planned, tiny, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(planned("qwen3_moe").read_text())
    given = {"recipe": recipe(apply(plan), fisher("weights")), "work": tmp_path / "work"}
    moe_collab.oneshot(model=load(tiny("qwen3_moe")), **given)
    plan.write_text(plan.read_text().replace("int4", "int2", 3))
    with pytest.raises(MoeCollabError, match="belongs to another run: recipe is not the same"):
        moe_collab.oneshot(model=load(tiny("qwen3_moe")), **given)


def test_rounding_that_needs_data_says_so(tiny):
    with pytest.raises(MoeCollabError, match="FisherGPTQModifier: it needs calibration data"):
        oneshot(model=load(tiny("qwen3_moe")), recipe=recipe(fisher("outputs")))
