"""What was written before something else went wrong, and what must not be overwritten."""

import shutil

import pytest

from moe_collab import MoeCollabError
from moe_collab.modifiers.glue import saving

from .conftest import load, run

PRUNE = {"ExpertPruningModifier": {"retention": 0.75}}


@pytest.mark.parametrize("step", ["write_description", "verify"])
def test_weights_that_are_written_are_kept_if_what_follows_fails(step, tiny, tmp_path, monkeypatch):
    def failing(*_args):
        raise OSError("a cable was pulled")

    monkeypatch.setattr(saving, step, failing)
    with pytest.raises(
        MoeCollabError, match=r"weights are written, but what follows failed.*a cable was pulled"
    ) as error:
        run(tiny("qwen3_moe"), PRUNE, output=tmp_path / "out")
    kept = list((tmp_path / "out").glob(".moe-collab-*/model.safetensors"))
    assert len(kept) == 1 and str(kept[0].parent) in str(error.value)


def test_the_source_is_not_replaced(tiny, tmp_path):
    source = shutil.copytree(tiny("qwen3_moe"), tmp_path / "source")
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(MoeCollabError, match="the model was read from there"):
        run(load(source), PRUNE, output=source)
    assert (source / "model.safetensors").read_bytes() == before
