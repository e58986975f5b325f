"""Comparing block by block gives the numbers of whole models, in memory that does not grow with the layers."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.tiny_models import TINY_FAMILIES, build_tiny
from moe_collab import MoeCollabError
from moe_collab.architectures import MASKED_BIAS
from moe_collab.checkpoint.load import load, write_dense_twin
from moe_collab.checkpoint.streamed import StreamedModel
from moe_collab.evaluation import compare, evaluate, log_probabilities, streaming
from tests.checkpoint.packed import build_packed, drop, edit_config, mask

FIXTURE = "integration/fixture/qwen3_moe"
TOKENS = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0))


def of_whole_models(model, base, tokens=TOKENS):
    """The same numbers from models that are in memory as a whole; each a path or a model."""
    live = [source if isinstance(source, torch.nn.Module) else load(source, torch.float32) for source in (model, base)]
    return evaluate(live[0], tokens, log_probabilities(live[1], tokens))


def assert_same(found, expected):
    for name in ("perplexity", "kl", "top1", "accuracy"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-6), name
    torch.testing.assert_close(found.kl_by_row, expected.kl_by_row, rtol=1e-6, atol=1e-6)


@pytest.fixture
def pair(tmp_path):
    """(packed, original) checkpoint of a tiny model."""
    return build_packed("qwen3_moe", tmp_path / "packed"), build_tiny("qwen3_moe", tmp_path / "original")


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_gives_the_numbers_of_whole_models(tmp_path, family):
    """Ours against the family's own, which store experts one by one or stacked."""
    packed, original = build_packed(family, tmp_path / "packed"), build_tiny(family, tmp_path / "original")
    found = compare(packed, original, TOKENS, dtype=torch.float32, batch_size=2)
    assert_same(found, of_whole_models(packed, original))
    assert found.kl > 0.01


def test_a_trained_model_with_tied_weights(tmp_path):
    tokens = load_file(f"{FIXTURE}_tokens.safetensors")["test"][:6, :100]
    found = compare(FIXTURE, FIXTURE, tokens, dtype=torch.float32)
    assert_same(found, of_whole_models(FIXTURE, FIXTURE, tokens))
    assert found.kl == pytest.approx(0, abs=1e-9) and found.top1 == 1 and 1 < found.perplexity < 100


def test_several_files_live_models_and_few_tokens_at_a_time(pair, tmp_path, monkeypatch):
    packed, original = pair
    expected = of_whole_models(packed, original)
    write_dense_twin(packed, tmp_path / "twin", torch.float32)
    monkeypatch.setattr(streaming, "_LOGITS", 4 * 258 * 7)
    assert_same(compare(tmp_path / "twin", original, TOKENS, dtype=torch.float32), expected)
    live = load(packed, torch.float32)
    assert_same(compare(live, original, TOKENS, dtype=torch.float32), expected)
    assert_same(compare(packed, load(original, torch.float32), TOKENS, dtype=torch.float32, batch_size=3), expected)
    assert not any(parameter.is_meta for parameter in live.parameters())


def test_the_checkpoints_own_type_is_the_default(pair):
    packed, original = pair
    expected = evaluate(load(packed), TOKENS, log_probabilities(load(original), TOKENS))
    assert_same(compare(packed, original, TOKENS), expected)


def test_hidden_states_in_files_are_the_same_and_leave_nothing_behind(pair, tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    found = compare(*pair, TOKENS, scratch=folder)
    assert_same(found, compare(*pair, TOKENS))
    assert not list(folder.iterdir())
    with pytest.raises(MoeCollabError, match=r"absent: no file of \d+ bytes for hidden states"):
        compare(*pair, TOKENS, scratch=tmp_path / "absent")


def test_masked_experts_may_be_absent(tmp_path):
    path = build_packed("deepseek_v3", tmp_path / "tiny")
    mask(path, [0, 3, 7], MASKED_BIAS)
    expected = load(path, torch.float32)
    drop(path, [0, 3, 7])
    assert compare(path, expected, TOKENS, dtype=torch.float32).kl == pytest.approx(0, abs=1e-9)


def test_only_what_is_asked_for_is_in_memory(pair):
    streamed = StreamedModel(pair[0])

    def there():
        return {name for name, tensor in streamed.model.state_dict().items() if not tensor.is_meta}

    assert not there()
    with streamed.weights_of(["model.layers.1"]):
        assert there() == {name for name in streamed.model.state_dict() if name.startswith("model.layers.1.")}
    assert not there()
    assert all(not buffer.is_meta for _, buffer in streamed.model.named_non_persistent_buffers())


def test_a_tied_weight_is_read_under_either_name():
    streamed = StreamedModel(FIXTURE)
    expected = load_file(f"{FIXTURE}/model.safetensors")["model.embed_tokens.weight"]
    for module in ("lm_head", "model.embed_tokens"):
        with streamed.weights_of([module]):
            assert torch.equal(streamed.model.get_submodule(module).weight, expected)
        assert streamed.model.lm_head.weight.is_meta and streamed.model.model.embed_tokens.weight.is_meta


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(8), "must be .rows, length."),
        (torch.zeros(2, 1), "must be .rows, length."),
        (torch.full((2, 4), 258), "the given ones are 258 to 258"),
        (torch.full((2, 4), -100), "the given ones are -100 to -100"),
    ],
)
def test_tokens_that_cannot_be_predicted_are_refused(pair, tokens, message):
    with pytest.raises(MoeCollabError, match=message):
        compare(*pair, tokens)


def test_models_that_cannot_be_compared_are_refused(pair, tmp_path):
    packed, original = pair
    other = build_tiny("qwen3_moe", tmp_path / "other", vocab_size=300)
    with pytest.raises(MoeCollabError, match=r"packed knows 258 tokens, .*other 300"):
        compare(packed, other, TOKENS)
    edit_config(packed, final_logit_softcapping=30.0)
    with pytest.raises(MoeCollabError, match="final_logit_softcapping"):
        compare(packed, original, TOKENS)
    tensors = load_file(original / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeCollabError, match=r"missing keys.*layers\.1\.input_layernorm"):
        compare(original, original, TOKENS)


_MEASURE = """
import resource, sys
import torch
import moe_collab
from moe_collab.evaluation import compare

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

tokens = torch.arange(64)[None].repeat(4, 1)
few, many = sys.argv[1:]
compare(few, few, tokens, dtype=torch.float32)
peaks = [peak()]
compare(many, many, tokens, dtype=torch.float32)
peaks.append(peak())
model = moe_collab.load(many, torch.float32)
peaks.append(peak())
print("PEAKS", *peaks, sum(parameter.nbytes for parameter in model.parameters()) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
def test_memory_does_not_grow_with_the_layers(tmp_path):
    """Of `compare`, that is; that of `load` is the model and little more."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 16}
    paths = [build_packed("qwen3_moe", tmp_path / str(n), num_hidden_layers=n, **sizes) for n in (3, 14)]
    command = [sys.executable, "-c", _MEASURE, *map(str, paths)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    few, many, loaded, model = map(float, output.split("PEAKS")[1].split())
    assert model > 160  # MiB
    assert many - few < 0.15 * model
    assert loaded - many < 1.25 * model
