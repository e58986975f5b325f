"""A real model's way from its folder to evidence, on a tiny one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from integration import real_model
from integration.benchmarks import shapes
from integration.tiny_models import build_tiny
from moe_collab import MoeCollabError

_FEW = ["--tokens", "1024", "--test-tokens", "1024"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model."""
    return build_tiny("olmoe", tmp_path_factory.mktemp("real") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def finished(model):
    """The arguments of a run that was killed once, started again and has ended; its evidence."""
    arguments = [str(model), "--output", str(model.with_name("output")), "--retention", "0.75", *_FEW]
    log = model.with_name("output") / "compress.log"
    with subprocess.Popen([sys.executable, "-m", "integration.real_model", *arguments]) as process:
        while not (log.exists() and "STAGE prepare" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    return arguments, real_model.main(arguments)


def test_all_steps_leave_evidence(model, finished):
    found, output = finished[1], model.with_name("output")
    assert found == json.loads((output / real_model.EVIDENCE).read_text())
    assert found["arguments"]["model_bytes"] == (model / "model.safetensors").stat().st_size
    assert {"torch", "transformers", "llmcompressor", "compressed-tensors", "moe-collab"} <= set(found["versions"])
    assert found["machine"]["memory_bytes"] > 1 << 30 and found["starts"] == {"compress": 2, "evaluate": 1}
    made, judged = found["steps"]["compress"], found["steps"]["evaluate"]
    assert made["checkpoint_bytes"] == made["predicted_bytes"] < found["arguments"]["model_bytes"]
    assert (made["experts"], made["experts_dropped"]) == (8, 2) and 2.5 < made["expert_bpw"] <= 3
    assert made["predicted_kl"] > 0 and made["heldout_kl"] > 0
    modifiers = ["ExpertPruningModifier", "MixedBitAllocModifier", "FisherGPTQModifier"]
    assert [stage for stage in made["stages"] if stage in ["load", *modifiers, "save"]] == ["load", *modifiers, "save"]
    assert judged["predictions"] == 32 * 31 and judged["perplexity"] > 1 < judged["original_perplexity"]
    assert judged["kl"] > judged["kl_standard_error"] > 0 and 0 < judged["top1_agreement"] < 1
    for step in (made, judged):
        assert step["seconds"] > 0 and step["peak_memory"] == max(s["memory"] for s in step["stages"].values())
    assert not (output / "work").exists() and not (output / "offload").exists()


def test_a_finished_step_is_not_repeated(model, finished, monkeypatch, capsys):
    arguments, found = finished
    monkeypatch.setattr(real_model, "run_measured", None)
    file = model.with_name("output") / "checkpoint" / "model.safetensors"
    before = file.stat().st_mtime_ns
    assert real_model.main(arguments) == found and file.stat().st_mtime_ns == before
    assert "top-1 agreement" in capsys.readouterr().out


def test_another_run_is_refused(model, finished):
    with pytest.raises(MoeCollabError, match=r"with other bpw \(3.0, now 2.5\)"):
        real_model.main([*finished[0], "--bpw", "2.5"])
    other = build_tiny("olmoe", model.with_name("other"), seed=1, num_hidden_layers=1)
    with pytest.raises(MoeCollabError, match="other model"):
        real_model.main([str(other), *finished[0][1:]])


def test_files_calibrate_with_their_first_part_and_test_with_the_rest(model, tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("a" * 9000 + "b" * 3000)
    files[1].write_text("c" * 9000 + "d" * 3000)
    options = real_model.parse([str(model), "--output", str(tmp_path), "--tokens", "12288", "--test-tokens", "4096",
                                "--text", *map(str, files)])  # fmt: skip
    _, tokenizer = real_model.find_model(str(model))
    tokens = real_model.draw_tokens(tokenizer, options)
    assert tokens["calibration"].shape == (96, 128) and tokens["test"].shape == (32, 128)
    assert [tokenizer.decode(row[:2]) for row in tokens["calibration"][:4]] == ["aa", "cc", "aa", "cc"]
    assert set(tokenizer.decode(tokens["test"].flatten())) == {"b", "d"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--test-tokens", "1000000"], "too little text: .* for test, where 1000000 are"),
        (["--test-tokens", "0"], "too little text: 0 tokens for test"),
        (["--text", "no.txt"], "no.txt cannot be read as text"),
        (["--serve-python", "no/python"], "no/python cannot be run"),
        (["--serve-python", sys.executable], "without vLLM"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_done(model, tmp_path, options, message):
    with pytest.raises(MoeCollabError, match=message):
        real_model.main([str(model), "--output", str(tmp_path / "output"), *_FEW, *options])
    assert not (tmp_path / "output").exists()


def test_a_folder_without_a_model_is_refused(model, tmp_path):
    with pytest.raises(MoeCollabError, match="config or tokenizer cannot be read"):
        real_model.main([str(tmp_path), "--output", str(tmp_path / "output")])
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((Path(model) / file).read_text())
    with pytest.raises(MoeCollabError, match=r"no \*.safetensors"):
        real_model.main([str(tmp_path), "--output", str(tmp_path / "output")])


def test_a_disk_without_room_is_found_out_beforehand(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_SPARE", 1 << 60)
    with pytest.raises(MoeCollabError, match="must stay free"):
        real_model.main([str(model), "--output", str(tmp_path), *_FEW])
    assert not (tmp_path / "compress.log").exists() and load_file(tmp_path / "tokens.safetensors")


def test_two_runs_do_not_share_a_folder(model, tmp_path):
    with real_model.alone(tmp_path), pytest.raises(MoeCollabError, match="another run is working there"):
        real_model.main([str(model), "--output", str(tmp_path), *_FEW])
