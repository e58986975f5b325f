"""A run with `work` that is killed while it saves goes on at the file where it was, and comes to the same bytes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe_collab
from moe_collab import MoeCollabError
from moe_collab.calibration.results import Results
from moe_collab.checkpoint.atomic import PARTIAL
from moe_collab.checkpoint.shards import write_shards
from moe_collab.modifiers.glue import saving
from moe_collab.modifiers.glue.finished_files import FinishedFiles
from moe_collab.modifiers.glue.live_tensors import LiveTensors
from moe_collab.moe_model import describe

from .conftest import load, on_disk, run, samples
from .test_work import arguments

EXPERTS = {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16_ASYM"}
PRUNE, ROUND = {"ExpertPruningModifier": {"retention": 0.75}}, {"FisherGPTQModifier": EXPERTS}
SIZE, FINISHED = 30_000, 4

_KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from tests.modifiers.test_saving_resumed import FINISHED, files_synced, start
def die(file):
    if file.startswith(f".model-{FINISHED + 1:05}"):
        os.kill(os.getpid(), signal.SIGKILL)
files_synced(die, pytest.MonkeyPatch())
start(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], eval(sys.argv[4]))
"""


def files_synced(see, patch):
    """Have `see` called with the name of each file before it reaches the disk."""
    stock = os.fsync

    def fsync(descriptor):
        see(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        stock(descriptor)

    patch.setattr(os, "fsync", fsync)


def start(path, folder, place="memory", recipe=(PRUNE, ROUND), size=SIZE, **options):
    """Begin, or go on with, a run that saves files of `size` bytes into `folder / "out"`; returns the model."""
    model = load(path) if place == "memory" else on_disk(path, folder / f"offload-{os.getpid()}")
    options = {"work": folder / "work"} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "DEFAULT_SHARD_SIZE", size)
        moe_collab.oneshot(**arguments(model, *recipe, output=folder / "out"), **options)
    return model


def kill(path, folder, place="memory", recipe=(PRUNE, ROUND)):
    """Kill a run while it writes the file behind the first `FINISHED`; returns the directory in which they wait."""
    command = [sys.executable, "-c", _KILLED, str(path), str(folder), place, repr(recipe)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == -9, found.stderr
    assert [file.name for file in (folder / "out").iterdir()] == [PARTIAL]
    return folder / "out" / PARTIAL


@pytest.fixture(scope="module")
def once(tiny, tmp_path_factory):
    """A folder with a run that was killed, a copy of it, and the files of one that was not."""
    folder = tmp_path_factory.mktemp("saving")
    kill(tiny("qwen3_moe"), folder)
    shutil.copytree(folder, folder.with_name("as-killed"))
    start(tiny("qwen3_moe"), folder.with_name("whole"), work=None)
    return folder, folder.with_name("as-killed"), contents(folder.with_name("whole") / "out")


@pytest.fixture
def killed(once):
    """As after the kill: the folder of the run, and the files of one that was not killed."""
    folder, as_killed, expected = once
    shutil.rmtree(folder)
    shutil.copytree(as_killed, folder)
    return folder, expected


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in sorted(folder.glob("model-*.safetensors"))}


def kept(before, folder):
    """The numbers of those files that were not written again."""
    after = times(folder / "out")
    return [int(name[6:11]) for name, time in before.items() if after.get(name) == time]


@pytest.fixture
def made(monkeypatch):
    """Names of the tensors that are made to be saved."""
    stock, names = LiveTensors.make, []
    monkeypatch.setattr(LiveTensors, "make", lambda self, name: names.append(name) or stock(self, name))
    return names


def test_finished_files_are_taken(killed, tiny, made):
    folder, expected = killed
    before = times(folder / "out" / PARTIAL)
    assert [*(folder / "out" / PARTIAL).glob(".*.partial")]
    start(tiny("qwen3_moe"), folder)
    assert contents(folder / "out") == expected and kept(before, folder) == [1, 2, 3, 4]
    index = json.loads(expected["model.safetensors.index.json"])["weight_map"]
    made = set(made) - {"model.embed_tokens.weight", "lm_head.weight"}  # which are compared, as they may be tied
    assert made and all(int(index[name][6:11]) > FINISHED for name in made)


def test_finished_files_of_a_model_on_disk_are_taken(tiny, tmp_path, once):
    before = times(kill(tiny("qwen3_moe"), tmp_path, "disk"))
    start(tiny("qwen3_moe"), tmp_path, "disk")
    assert contents(tmp_path / "out") == once[-1] and kept(before, tmp_path) == [1, 2, 3, 4]


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_file_that_has_changed_is_written_anew(killed, tiny):
    folder, expected = killed
    waiting = folder / "out" / PARTIAL
    files = sorted(waiting.glob("model-*.safetensors"))
    assert b'"format":"pt"' in files[0].read_bytes()[:50]
    flip(files[0], files[0].read_bytes().index(b'"pt"') + 1)
    files[1].unlink()
    flip(files[2], -1)
    (waiting / "notes").mkdir()
    (waiting / "notes" / "mine.txt").write_text("somebody's")
    before = times(waiting)
    start(tiny("qwen3_moe"), folder)
    assert contents(folder / "out") == expected and kept(before, folder) == [4]


def test_files_cut_in_another_way_are_written_anew(killed, tiny, tmp_path, made):
    folder, _ = killed
    start(tiny("qwen3_moe"), folder, size=2 * SIZE)
    all_made = set(made)
    start(tiny("qwen3_moe"), tmp_path, size=2 * SIZE, work=None)
    assert contents(folder / "out") == contents(tmp_path / "out") and set(made) == all_made


@pytest.mark.parametrize("other", [None, "other"])
def test_only_the_same_run_takes_them(other, killed, tiny):
    folder, expected = killed
    before = times(folder / "out" / PARTIAL)
    start(tiny("qwen3_moe"), folder, work=other and folder / other)
    assert contents(folder / "out") == expected and kept(before, folder) == []


def test_files_of_another_model_by_the_same_recipe_are_written_anew(tiny, tmp_path):
    scores, layers = tmp_path / "scores.json", describe(load(tiny("qwen3_moe"))).layers
    # To a stock modifier nobody says that the file has changed.
    recipe = {"ExpertPruningModifier": {"retention": 0.75, "criterion": str(scores)}}, {"QuantizationModifier": EXPERTS}
    for sign in (1, -1):
        scores.write_text(json.dumps({layer.name: [sign * i for i in range(layer.num_experts)] for layer in layers}))
        if sign == 1:
            before = times(kill(tiny("qwen3_moe"), tmp_path, recipe=recipe))
        else:
            start(tiny("qwen3_moe"), tmp_path, recipe=recipe)
    start(tiny("qwen3_moe"), tmp_path / "whole", recipe=recipe, work=None)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out") and kept(before, tmp_path) == []


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "stopped"])
def test_what_can_be_cured_leaves_the_finished_files(error, tiny, tmp_path, once, monkeypatch):
    out, waiting, before = tmp_path / "out", tmp_path / "out" / PARTIAL, {}
    out.mkdir()
    (out / "config.json").write_text("old")

    def fail(file):
        if file.startswith(f".model-{number:05}"):
            raise error

    for number in (1, 6, 9):
        with monkeypatch.context() as patch, pytest.raises((MoeCollabError, KeyboardInterrupt)) as raised:
            files_synced(fail, patch)
            start(tiny("qwen3_moe"), tmp_path)
        assert len(contents(waiting)) == len(times(waiting)) == number - 1 and waiting.exists() == (number > 1)
        assert before.items() <= times(waiting).items() and (out / "config.json").read_text() == "old"
        before = times(waiting)
        if isinstance(error, OSError):
            said = f"disk; then start the same run again: the files that are finished are kept in {waiting}. ("
            assert "the disk is full" in str(raised.value) and (said in str(raised.value)) == (number > 1)
    start(tiny("qwen3_moe"), tmp_path)
    assert contents(out) == once[-1] and kept(before, tmp_path) == [*range(1, 9)]


def full(*_):
    raise FULL


def test_a_disk_that_fills_up_behind_the_weights_leaves_them(tiny, tmp_path, once, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MoeCollabError, match="the files that are finished are kept"):
        patch.setattr(saving, "write_description", full)
        start(tiny("qwen3_moe"), tmp_path)
    before = times(tmp_path / "out" / PARTIAL)
    start(tiny("qwen3_moe"), tmp_path)
    assert contents(tmp_path / "out") == once[-1] and len(kept(before, tmp_path)) == len(before) > FINISHED


def test_a_save_after_the_run_begins_anew(killed, tiny):
    folder, expected = killed
    model = start(tiny("qwen3_moe"), folder)
    shutil.copytree(folder.with_name("as-killed") / "out" / PARTIAL, folder / "out" / PARTIAL)
    before = times(folder / "out" / PARTIAL)
    model.save_pretrained(folder / "out", max_shard_size=SIZE)
    found = contents(folder / "out")
    assert found.keys() == expected.keys() and all(found[name] == expected[name] for name in before)
    assert kept(before, folder) == []


def test_files_with_unsound_weights_do_not_count_as_finished(tiny, tmp_path):
    model = run(tiny("qwen3_moe"), ROUND, data=samples(2, 8))
    module = "model.layers.0.mlp.experts.1.up_proj"
    model.get_submodule(module).weight.data[0, 0] += 0.3
    (tmp_path / "files").mkdir()
    known = Results(tmp_path / "known")
    tensors = LiveTensors(model)
    finished = FinishedFiles(known, model, tensors, tmp_path, SIZE)
    write_shards(tmp_path / "files", tensors.entries, tensors.make, SIZE, finished)
    where = json.loads((tmp_path / "files" / "model.safetensors.index.json").read_text())["weight_map"]
    unsound = {file for name, file in where.items() if name.startswith(f"{module}.")}
    again = LiveTensors(model)
    finished = FinishedFiles(known, model, again, tmp_path, SIZE)
    assert {file for file in where.values() if finished.recall(file) is None} == unsound != set()
    assert again.digests.items() <= tensors.digests.items() and module not in again.digests and again.digests
