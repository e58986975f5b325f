"""Saving a live model: what belongs to it comes along, what is wrong is kept aside, memory does not hold the model."""

import errno
import gc
import json
import shutil
import weakref

import pytest
import torch
from compressed_tensors.offload.cache.disk import DiskCache
from llmcompressor.utils import load_context
from safetensors.torch import load_file
from transformers import AutoTokenizer

import moe_collab
from integration.tiny_models import TINY_FAMILIES, model_class
from moe_collab import MoeCollabError
from moe_collab.checkpoint.atomic import REJECTED
from moe_collab.checkpoint.companions import copy_companions, source_directory
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.checkpoint.verify import tensor_digest
from moe_collab.modifiers.glue import saving
from moe_collab.modifiers.glue.live_tensors import LiveTensors
from moe_collab.modifiers.glue.saving import install_save
from moe_collab.moe_model import describe

from .conftest import load, run, samples

KEEP = {"ActivationSmoothModifier": {"num_experts_per_tok": "keep"}}
ROUND = {"GPTQModifier": {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16"}}
COMPANIONS = {
    "LICENSE": "Apache",
    "NOTICE.txt": "notice",
    "README.md": "# Tiny",
    "USE_POLICY.md": "policy",
    "preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "tokenizer.model": "sentencepiece",
    "vocab.json": "{}",
    "merges.txt": "merges",
    "qwen.tiktoken": "ranks",
    "modeling_tiny.py": "from .parts.layer import X\n",
    "parts/layer.py": "X = 1\n",
}
LEFT_BEHIND = {
    "pytorch_model.bin": "weights",
    "consolidated.00.pth": "weights",
    "consolidated.safetensors": "weights",
    "model.gguf": "weights",
    "pytorch_model.bin.index.json": "{}",
    "params.json": "{}",
    "figure.png": "picture",
    ".gitattributes": "hidden",
    ".git/HEAD": "hidden",
    ".cache/x.json": "hidden",
    "__pycache__/modeling_tiny.pyc": "cache",
    "original/tokenizer.model": "another format",
    "checkpoint-5/optimizer.pt": "a training run",
    "checkpoint-5/tokenizer_config.json": "{}",
}


def add(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)


@pytest.fixture
def source(tiny, tmp_path):
    """A tiny model with everything beside it that a model may have."""
    path = shutil.copytree(tiny("qwen3_moe"), tmp_path / "source")
    add(path, COMPANIONS | LEFT_BEHIND)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_tiny.X"}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("given", ["object", "path"])
@pytest.mark.parametrize("processor", [True, False])
def test_companions_come_along(given, processor, source, tmp_path):
    options = {}
    if processor:
        options["processor"] = AutoTokenizer.from_pretrained(source)
        options["processor"].model_max_length = 77
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    if given == "object":
        run(load(source), KEEP, ROUND, output=out, **options)
    else:
        with load_context():
            run_from_path(source, out, options)
    for name, text in COMPANIONS.items():
        if name != "chat_template.jinja" or not processor:  # a processor writes its own, and that wins
            assert (out / name).read_text() == text, name
    assert not [name for name in LEFT_BEHIND if (out / name).exists()]
    assert (out / "mine.txt").read_text() == "mine"
    assert json.loads((out / "config.json").read_text())["auto_map"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a b")["input_ids"] == AutoTokenizer.from_pretrained(source)("a b")["input_ids"]
    assert (tokenizer.model_max_length == 77) == processor


def run_from_path(source, out, options):
    from llmcompressor import oneshot

    from integration.compress import recipe

    oneshot(model=str(source), recipe=recipe(KEEP, ROUND), dataset=samples(), output_dir=str(out), **options)


def test_what_was_written_anew_wins(tmp_path):
    source, staged = tmp_path / "source", tmp_path / "staged"
    for folder in (source, staged):
        folder.mkdir()
        add(folder, {"config.json": folder.name, "generation_config.json": folder.name})
    add(source, {"README.md": "source"})
    (source / "README.md").chmod(0o444)  # as in the hub's cache
    assert copy_companions(source, staged) == ["README.md"]
    assert (staged / "generation_config.json").read_text() == (staged / "config.json").read_text() == "staged"
    assert (staged / "README.md").stat().st_mode & 0o200


def test_a_folder_that_is_no_model_is_not_copied(tmp_path):
    (tmp_path / "staged").mkdir()
    add(tmp_path, {"secret.txt": "x"})
    assert copy_companions(tmp_path, tmp_path / "staged") == []


def test_where_a_model_comes_from(tmp_path, monkeypatch):
    import huggingface_hub

    def cached(name, revision, local_files_only):
        assert local_files_only and revision == "abc"
        if name != "org/cached":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert source_directory(str(tmp_path)) == source_directory("org/cached", "abc") == tmp_path
    assert source_directory("org/other", "abc") is source_directory("") is None


def on_disk(path, folder, family="qwen3_moe"):
    with load_context(model_class(family)):
        return model_class(family).from_pretrained(
            path, dtype="auto", device_map="auto_offload", max_memory={"cpu": 100_000}, offload_folder=str(folder)
        )


@pytest.fixture
def most_at_once(monkeypatch):
    """A list whose last number is the most bytes that were read from disk and alive at the same time."""
    stock, alive, most = DiskCache.onload, {}, [0]

    def onload(self, offloaded):
        value = stock(self, offloaded)
        if isinstance(value, torch.Tensor):
            key = object()
            alive[key] = value.nbytes
            weakref.finalize(value, alive.pop, key, None)
            most.append(max(most[-1], sum(alive.values())))
        return value

    monkeypatch.setattr(DiskCache, "onload", onload)
    return most


def made(tensors):
    """Digest of each tensor that a live model would be saved as."""
    return {entry.name: tensor_digest(tensors.make(entry.name)[entry.name]) for entry in tensors.entries}


def test_a_model_on_disk_is_read_one_tensor_at_a_time(tiny, tmp_path, most_at_once):
    path = tiny("qwen3_moe", num_hidden_layers=4)
    model = on_disk(path, tmp_path / "disk")
    install_save(model)
    gc.collect()
    most_at_once[:] = [0]
    model.save_pretrained(tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    assert 0 < most_at_once[-1] <= 2 * max(tensor.nbytes for tensor in tensors.values())
    assert len(most_at_once) > 50
    assert (tmp_path / "out/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_what_is_announced_is_what_is_saved(family, tiny, tmp_path):
    with load_context(model_class(family)):
        model = model_class(family).from_pretrained(tiny(family), dtype="auto")
    describe(model)
    install_save(model)
    model.save_pretrained(tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    assert made(LiveTensors(model)) == {name: tensor_digest(checkpoint.tensor(name)) for name in checkpoint.names()}


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_tied_weights_are_stored_once(place, tiny, tmp_path):
    path = tiny("qwen3_moe", tie_word_embeddings=True)
    model = load(path) if place == "memory" else on_disk(path, tmp_path / "disk")
    run(model, KEEP, ROUND, output=tmp_path / "out", data=samples(2, 8))
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").names()
    moe_collab.load(tmp_path / "out")


def test_converted_tensors_are_made_as_they_are_saved(tiny, monkeypatch):
    """No family here needs a conversion, so two tensors of each layer are joined as one would."""
    from moe_collab.modifiers.glue import live_tensors

    def joining(_model, state):
        saved = {}
        for name, tensor in state.items():
            if not name.endswith(("k_proj.weight", "v_proj.weight")):
                saved[f"saved.{name}"] = tensor
        for name in [n for n in state if n.endswith("k_proj.weight")]:
            pair = [state[name], state[name.replace("k_proj", "v_proj")]]
            saved["saved." + name.replace("k_proj", "kv_proj")] = torch.cat(pair)
        return saved

    model = load(tiny("qwen3_moe"))
    expected = {name: tensor_digest(tensor) for name, tensor in joining(model, model.state_dict()).items()}
    monkeypatch.setattr(live_tensors, "revert_weight_conversion", joining)
    monkeypatch.setattr(live_tensors, "checkpoint_names", lambda _model, names: {n: f"saved.{n}" for n in names})
    assert made(LiveTensors(model)) == expected


def expert(layer, index):
    return f"model.layers.{layer}.mlp.experts.{index}.up_proj"


def test_unsound_weights_are_all_named_and_the_rest_is_kept(tiny, tmp_path):
    model = run(tiny("qwen3_moe"), KEEP, ROUND)
    for index in range(7):
        weight = model.get_submodule(expert(index % 2, index)).weight
        weight.data[0, 0] = float("nan") if index == 0 else weight.data[0, 0] + 0.3
    good = "model.layers.0.mlp.experts.7.up_proj"
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("old")
    with pytest.raises(MoeCollabError, match=r"7 quantized weights") as error:
        model.save_pretrained(tmp_path / "out")
    said, rejected = str(error.value), tmp_path / "out" / REJECTED
    assert f"{expert(0, 0)}.weight: not finite" in said and "and 2 more" in said and str(rejected) in said
    assert said.count("not on the grid") == 4 and "must not be served" in said
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == ["config.json"]
    assert Checkpoint(rejected).quantized(good).codes.any()


def test_unsound_weights_are_refused_until_they_are_repaired(tiny, tmp_path):
    model = run(tiny("qwen3_moe"), KEEP, ROUND)
    module = model.get_submodule(expert(0, 1))
    rounded = module.weight.detach().clone()
    module.weight.data[0, 0] += 0.3
    for attempt in ("first", "second"):
        with pytest.raises(MoeCollabError, match=r"experts\.1\.up_proj\.weight: not on the grid"):
            model.save_pretrained(tmp_path / attempt)
    module.weight.data.copy_(rounded)
    model.save_pretrained(tmp_path / "third")
    assert moe_collab.load(tmp_path / "third")


@pytest.mark.parametrize("modifiers", [[KEEP], [KEEP, ROUND]], ids=["plain", "quantized"])
def test_a_plain_tensor_that_is_not_a_number_is_refused(modifiers, tiny, tmp_path):
    model = run(tiny("qwen3_moe"), *modifiers)
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(MoeCollabError, match=r"tensor model\.norm\.weight holds NaN"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(MoeCollabError, match=r"tensor model\.norm\.weight holds NaN"):
        moe_collab.load(tmp_path / "out" / REJECTED)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_save_that_fails_half_way_can_be_repeated_elsewhere(place, tiny, tmp_path, monkeypatch):
    path = tiny("qwen3_moe")
    model = run(load(path) if place == "memory" else on_disk(path, tmp_path / "disk"), KEEP, ROUND, data=samples(2, 8))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(MoeCollabError, match="the disk is full"):
            model.save_pretrained(tmp_path / "full")
    assert not (tmp_path / "full").exists()
    model.save_pretrained(tmp_path / "out")
    assert moe_collab.load(tmp_path / "out")
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_an_output_that_is_a_file_is_refused_before_anything_is_read(tiny, tmp_path, monkeypatch):
    model = run(tiny("qwen3_moe"), KEEP, data=samples(2, 8))
    (tmp_path / "out").write_text("")
    monkeypatch.setattr(saving, "LiveTensors", None)
    with pytest.raises(MoeCollabError, match="a file stands where"):
        model.save_pretrained(tmp_path / "out")
