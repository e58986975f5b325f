"""A plan that is reused gives what the run that made it gave, byte for byte, pruning and tuning included."""

import pytest

from .conftest import run


@pytest.mark.parametrize(("family", "form"), [("qwen3_moe", "physical"), ("deepseek_v3", "masked")])
def test_a_reused_plan_gives_the_same_bytes(family, form, tiny, tmp_path):
    allocate = {"bpw": 1.7, "bits": ["ternary", 2, 4], "group_size": [32, 128], "pruning": form}
    allocate["plan"] = str(tmp_path / "plan.json")
    tuned = {"FisherGPTQModifier": {"ignore": ["lm_head"], "tuning_steps": 4}}
    files = []
    for out in ("made", "reused"):
        run(tiny(family), {"MixedBitAllocModifier": allocate}, tuned, output=tmp_path / out)
        files.append((tmp_path / out / "model.safetensors").read_bytes())
    assert '"dropped": {}' not in (tmp_path / "plan.json").read_text()
    assert files[0] == files[1]
