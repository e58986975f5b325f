"""The benchmark of scale, on tiny models: what it makes loads, its meter is right, and finished rows are kept."""

import json
import sys

import pytest
import torch
from compressed_tensors.offload import disable_onloading
from transformers import AutoModelForCausalLM

from integration.benchmarks import scale, scale_report, shapes, ways
from integration.benchmarks.peak import Measured, run_measured
from integration.benchmarks.scale_jobs import digest, load
from integration.benchmarks.shapes import DEEPSEEK, GPT_OSS, OLMOE, SMALL, make_model
from moe_collab import MoeCollabError
from moe_collab.checkpoint.load import stock_conversions
from moe_collab.moe_model import describe

_TINY = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
_MLA = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
SHAPES = {
    "olmoe": OLMOE.resized(**_TINY, num_hidden_layers=2, num_experts=16),
    "deepseek": DEEPSEEK.resized(**_TINY, **_MLA, moe_intermediate_size=64, n_routed_experts=32),
    "small": SMALL.resized(**_TINY, num_hidden_layers=3, num_experts=8),
}
_ALLOCATES = """
import mmap, sys, time
print("STAGE allocate", flush=True)
time.sleep(0.3)  # a stage begins when the meter has read of it
held = bytearray(b"x") * (256 << 20)
time.sleep(0.3)
del held
print("STAGE map", flush=True)
time.sleep(0.3)
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print("RESULT", sum(mapped[::4096]), flush=True)
time.sleep(0.3)
"""
_WATCHES_ITSELF = """
from integration.benchmarks.peak import PeakMeter, report
with PeakMeter() as meter:
    meter.enter("allocate")
    held = bytearray(b"x") * (64 << 20)
    meter.enter("after")
report(meter.stages["allocate"].memory - meter.stages["start"].memory)
"""


@pytest.fixture(params=SHAPES)
def made(request, tmp_path):
    """A tiny shape and its model, in several shards."""
    shape = SHAPES[request.param]
    return shape, make_model(shape, tmp_path / "model", shard_bytes=1 << 20)


def test_models_are_complete_and_the_same_on_disk_and_in_memory(made, tmp_path):
    shape, path = made
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) == pytest.approx(shape.num_bytes, rel=0.05)
    assert len(list(path.glob("*.safetensors"))) > 1
    ids = torch.arange(64)[None] * 3
    with stock_conversions(), torch.no_grad():
        stock, found = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        streamed = load(path, tmp_path / "offload")
        with disable_onloading():
            assert {weight.device.type for weight in streamed.parameters()} == {"meta"}
        expected, logits = stock(ids).logits.float(), streamed(ids).logits.float()
    assert torch.isfinite(logits).all() and logits.std() > 0.1
    close = (logits - expected).abs().amax(-1) < 0.1
    assert close.float().mean() > 0.9  # in bfloat16 a router's choice may flip


@pytest.mark.parametrize(("name", "quantized", "error"), [("deepseek", "fp8", 0.04), ("gpt_oss", "mxfp4", 0.15)])
def test_models_may_be_stored_as_they_are_published(name, quantized, error, tmp_path):
    shape = SHAPES[name] if name in SHAPES else GPT_OSS.resized(**_TINY, num_hidden_layers=2, num_local_experts=16)
    expected = load(make_model(shape, tmp_path / "dense"), None).state_dict()
    path = make_model(shape, tmp_path / "quantized", quantized=quantized)
    found, differing = load(path, tmp_path / "offload").state_dict(), 0
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        distance = (found[key].float() - tensor.float()).norm() / tensor.float().norm()
        differing += bool(distance)
        assert distance < error, key
    assert differing > 20
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert size < 0.9 * shape.num_bytes


def test_every_expert_is_used_but_not_evenly(made):
    with stock_conversions(), torch.no_grad():
        model = load(made[1], None)
        moe, chosen = describe(model), []
        indices = moe.family.router_output.index("indices")
        for layer in moe.layers:
            layer.router.register_forward_hook(lambda _module, _args, output: chosen.append(output[indices]))
        model(torch.randint(4096, (16, 128), generator=torch.Generator().manual_seed(0)))
    assert len(chosen) == len(moe.layers)
    for found in chosen:
        counts = torch.bincount(found.flatten(), minlength=moe.num_experts)
        assert counts.min() > 0 and counts.max() > 1.5 * counts.min()


def test_weights_are_heavy_tailed_and_follow_from_the_seed(tmp_path):
    paths = [make_model(SHAPES["olmoe"], tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1))]
    same, again, other = [digest(path.glob("*.safetensors")) for path in paths]
    assert same == again != other
    with stock_conversions():
        model = AutoModelForCausalLM.from_pretrained(paths[0], dtype=torch.float32)
    weights = model.lm_head.weight
    channels = weights / weights.std(0)
    kurtosis = channels.pow(4).mean() / channels.pow(2).mean() ** 2
    assert kurtosis > 5  # 3 for normal weights, 9 for t with 5 degrees of freedom


def test_the_meter_knows_a_known_allocation(tmp_path):
    file = tmp_path / "mapped"
    file.write_bytes(b"\1" * (128 << 20))
    found = run_measured([sys.executable, "-c", _ALLOCATES, str(file)], tmp_path / "log", 60)
    before, held, mapped = (found.stages[name] for name in ("start", "allocate", "map"))
    assert held.memory - before.memory == pytest.approx(256 << 20, rel=0.1)
    assert mapped.mapped - held.mapped == pytest.approx(128 << 20, rel=0.1)
    assert mapped.memory - before.memory < 32 << 20 and found.result == 32768
    assert sum(stage.seconds for stage in found.stages.values()) == pytest.approx(found.seconds, rel=0.1)
    assert 0 < sum(stage.cpu for stage in found.stages.values()) < found.seconds / 2  # it sleeps 1.2 s


def test_the_meter_can_watch_its_own_process(tmp_path):
    # In a fresh process: one that has run for long may have room to spare, which an allocation then does not show.
    found = run_measured([sys.executable, "-c", _WATCHES_ITSELF], tmp_path / "log", 60)
    assert found.result == pytest.approx(64 << 20, rel=0.1)


def test_failures_are_told_with_the_log(tmp_path):
    fails = [sys.executable, "-c", "print('so it is'); raise SystemExit(3)"]
    with pytest.raises(MoeCollabError, match=r"exited with 3(.|\n)*so it is"):
        run_measured(fails, tmp_path / "log", 60)
    with pytest.raises(MoeCollabError, match="took more than 1 s"):
        run_measured([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 1)


def test_a_row_is_measured_once_and_its_model_deleted(tmp_path, monkeypatch):
    cases = {"tiny": scale.Case(SHAPES["small"], "prune", 1024)}
    scale.ScaleBench(tmp_path, cases=cases).add("tiny")
    (row,) = json.loads((tmp_path / "scale.json").read_text())
    assert row["row"] == "tiny" and row["model_bytes"] == pytest.approx(SHAPES["small"].num_bytes, rel=0.01)
    assert 0.7 < row["bytes"] / row["model_bytes"] < 1 and row["reads_per_byte"] > 1
    assert {"load", "ExpertPruningModifier", "save"} <= set(row["stages"])
    assert row["peak"] == max(stage["memory"] for stage in row["stages"].values())
    assert [path.name for path in (tmp_path / "scale").iterdir()] == ["tiny-disk.log"]
    monkeypatch.setattr(scale, "make_model", None)
    scale.ScaleBench(tmp_path, cases=cases).add("tiny")
    assert "| tiny | olmoe, 3 layers" in scale_report.table(json.loads((tmp_path / "scale.json").read_text()))


def test_a_sample_of_experts_stands_for_all(tmp_path):
    shape = SHAPES["deepseek"].resized(moe_intermediate_size=128)
    cases = {"tiny": scale.Case(shape, scale.SAMPLED, 512, sample=3)}
    scale.ScaleBench(tmp_path, cases=cases).add("tiny")
    (row,) = json.loads((tmp_path / "scale.json").read_text())
    sampled = row["sampled"]
    assert sampled["experts"] == 32 and "bytes" not in row
    for name, experts in {"statistics": 32, "samples": 32, "costs": 3, "rounding": 3}.items():
        stage, taken = sampled["stages"][name], row["stages"][name]
        assert stage["experts"] == experts and 0 < taken["memory"] <= row["peak"]
        assert stage["seconds_per_expert"] == pytest.approx(taken["seconds"] / experts)
        assert stage["predicted_seconds"] == pytest.approx(stage["seconds_per_expert"] * 32)
        assert stage["cpu_seconds_per_expert"] == pytest.approx(taken["cpu"] / experts)
    weights = 32 * 3 * 128 * 128
    assert sampled["stages"]["costs"]["predicted_read_bytes"] >= 2 * weights  # in bfloat16, each at least once
    assert row["model_bytes"] - sampled["predicted_checkpoint_bytes"] == pytest.approx(2 * weights * 7 / 8, rel=0.02)
    assert [path.name for path in (tmp_path / "scale").iterdir()] == ["tiny-disk.log"]
    printed = scale_report.table([row])
    assert "| tiny | rounding | 3 of 32 |" in printed and "would take 0.0 h" in printed


def test_experts_are_sampled_before_a_recipe_runs(tmp_path):
    cases = {"tiny": scale.Case(SHAPES["small"], "prune", 512, sample=2)}
    scale.ScaleBench(tmp_path, cases=cases).add("tiny")
    (row,) = json.loads((tmp_path / "scale.json").read_text())
    order = ["load", "statistics", "samples", "costs", "rounding", "prepare", "ExpertPruningModifier", "save"]
    assert [name for name in row["stages"] if name in order] == order
    assert row["bytes"] < row["model_bytes"] and row["sampled"]["experts"] == 24


def test_a_row_that_fails_is_not_kept_and_its_model_is_deleted(tmp_path):
    bench = scale.ScaleBench(tmp_path, cases={"tiny": scale.Case(SHAPES["small"], "no recipe", 1024)})
    with pytest.raises(MoeCollabError, match="no recipe"):
        bench.add("tiny")
    assert not bench.rows.rows and [path.name for path in (tmp_path / "scale").iterdir()] == ["tiny-disk.log"]


def test_checkpoints_of_all_ways_are_compared(tmp_path, monkeypatch):
    found = dict.fromkeys(ways.WAYS, "a") | {"torchrun": "b"}

    def run_way(way, *_args):
        return [Measured(1, {}, {"digests": {"plan": found[way]}, "steps": 9})]

    monkeypatch.setattr(scale, "run_way", run_way)
    bench = scale.ScaleBench(tmp_path)
    bench.add("equal-qwen3_moe")
    found["torchrun"] = "a"
    bench.add("equal-deepseek_v3")
    assert [row["equal"] for row in bench.rows.rows] == [False, True]
    assert "equal-qwen3_moe: plan and bytes DIFFER" in scale_report.table(bench.rows.rows)


def test_a_job_is_killed_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ways, "KILLS", 2)
    path = make_model(SHAPES["olmoe"], tmp_path / "model")
    job = {"source": str(path), "recipe": "prune", "tokens": 2048}
    whole, last = ways.run_way("killed", job, tmp_path / "killed", tmp_path / "log")
    (torchrun,) = ways.run_way("torchrun", job, tmp_path / "torchrun", tmp_path / "log")
    assert whole.result["digests"] == last.result["digests"] == torchrun.result["digests"]
    assert last.result["steps"] < whole.result["steps"]


def test_no_model_is_made_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_SPARE", 1 << 60)
    with pytest.raises(MoeCollabError, match="must stay free"):
        make_model(SHAPES["small"], tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_claims_are_checked():
    rows = [{"row": f"layers-{count}-prune", "peak": peak} for count, peak in ((4, 100), (8, 104), (16, 106))]
    rows += [{"row": f"tokens-{times}x-prune", "peak": peak} for times, peak in ((1, 100), (4, 110), (16, 119))]
    rows += [{"row": "olmoe-16", "peak": 5_000_000_001}, {"row": "deepseek-layer", "peak": 12_000_000_000}]
    rows += [{"row": "equal-a", "equal": False}, {"row": "equal-b", "equal": True}]
    problems = scale_report.broken_claims(rows)
    assert problems == [
        "equal-a: checkpoints differ",
        "olmoe-16: peak of 5,000,000,001 bytes, more than 5,000,000,000",
        "layers, prune: peaks from 100 to 106 bytes, not within 5%",
    ]
