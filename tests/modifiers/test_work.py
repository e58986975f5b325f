"""A run that is killed and started again goes on where it was, and comes to the same bytes."""

import errno
import json
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from filelock import FileLock
from loguru import logger
from torch.utils.data import DataLoader

import moe_collab
from integration.compress import recipe
from moe_collab import MoeCollabError
from moe_collab.calibration import fit
from moe_collab.calibration.results import Results
from moe_collab.calibration.scratch import Scratch
from moe_collab.calibration.workspace import TemporaryFolder
from moe_collab.moe_model import describe

from .conftest import QUANTIZE, load, on_disk, run, samples
from .test_stream import digests

PRUNE = {"ExpertPruningModifier": {"retention": 0.75}}
SMOOTH = {"ActivationSmoothModifier": {"num_experts_per_tok": "auto", "max_kl": 0.5, "strength": 0.5}}
FISHER = {"FisherGPTQModifier": {"ignore": ["lm_head"]}}
HALVE = {"ExpertPruningModifier": {"retention": 0.5}}


def tuned(steps):
    return {"FisherGPTQModifier": {"targets": ["re:.*experts.*_proj$"], "scheme": "W4A16", "tuning_steps": steps}}


LEARN = {
    "predictions": (HALVE, {"RouterCalibrationModifier": {"steps": 20, "objective": "predictions"}}),
    "blocks": (HALVE, {"RouterCalibrationModifier": {"steps": 20, "objective": "blocks"}}),
    "tuning": (tuned(20),),
}


class Killed(BaseException):
    """In the place of a signal, so that many kills take one process."""


@pytest.fixture
def steps(monkeypatch):
    """Counts what is finished durably; `steps.limit` is after how many of them the run is killed."""

    class Steps:
        count, limit = 0, None

    def counted(stock):
        def step(self, *args):
            if not self._durable:
                return stock(self, *args)
            if Steps.count == Steps.limit:
                raise Killed
            found = stock(self, *args)
            Steps.count += 1
            return found

        return step

    for owner, name in ((Results, "put"), (Results, "note"), (Scratch, "finish")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return Steps


@pytest.fixture
def adam(monkeypatch):
    """Counts steps of Adam; `adam.limit` is after how many of them the run is killed."""

    class Adam:
        count, limit = 0, None

    stock = torch.optim.Adam.step

    def step(self, *args):
        if Adam.count == Adam.limit:
            raise Killed
        Adam.count += 1
        return stock(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return Adam


def allocate(family, **fields):
    pruning = "masked" if family == "deepseek_v3" else "physical"
    own = {"bpw": 2.2, "bits": ["ternary", 2, 4], "pruning": pruning, "fixed": {"o_proj$": 4}}
    return {"MixedBitAllocModifier": own | fields}


@pytest.mark.parametrize(("family", "kills"), [("qwen3_moe", 5), ("deepseek_v3", 3)])
def test_a_killed_run_goes_on_to_the_same_bytes(family, kills, tiny, tmp_path, steps, monkeypatch):
    recipe = PRUNE, SMOOTH, allocate(family), FISHER
    if family == "deepseek_v3":  # whatever learns, too, and block by block, as if nothing else fitted in memory
        monkeypatch.setattr(fit, "available_memory", lambda: 1)
        tune = {"FisherGPTQModifier": {"ignore": ["lm_head"], "tuning_steps": 2}}
        recipe = PRUNE, allocate(family), tune, {"RouterCalibrationModifier": {"steps": 4}}
    run(tiny(family), *recipe, output=tmp_path / "unkilled")
    expected = digests(tmp_path / "unkilled")

    def start(name, limit):
        steps.count, steps.limit = 0, limit
        model = on_disk(tiny(family), tmp_path / "offload" / name / str(limit))
        work = str(tmp_path / "work" / name)
        moe_collab.oneshot(**arguments(model, *recipe, output=tmp_path / "out" / name), work=work)

    start("once", None)
    total = steps.count
    assert digests(tmp_path / "out" / "once") == expected and total > 50
    for part in range(1, kills + 1):
        with pytest.raises(Killed):
            start(str(part), part * total // (kills + 1))
        before = steps.count
        start(str(part), None)
        assert digests(tmp_path / "out" / str(part)) == expected
        assert before + steps.count - total <= 20  # a layer of experts, one file each


def test_a_run_that_is_killed_again_and_again_ends(tiny, tmp_path, steps):
    run(tiny("mixtral"), allocate("mixtral"), FISHER, output=tmp_path / "unkilled")
    ended, starts = False, 0
    while not ended:
        steps.count, steps.limit = 0, 25
        with suppress(Killed):
            work = str(tmp_path / "work")
            moe_collab.oneshot(
                **arguments(load(tiny("mixtral")), allocate("mixtral"), FISHER, output=tmp_path / "out"), work=work
            )
            ended = True
        starts += 1
    assert starts > 3 and digests(tmp_path / "out") == digests(tmp_path / "unkilled")


def arguments(model, *modifiers, output):
    return {"model": model, "recipe": recipe(*modifiers), "dataset": samples(), "output_dir": str(output)}


_KILLED = """
import json, os, signal, sys
import torch
from moe_collab.calibration.results import Results
from tests.modifiers.conftest import load
from tests.modifiers.test_work import arguments
import moe_collab
model, work, modifiers, name, left = map(json.loads, sys.argv[1:])
owner = Results if name == "note" else torch.optim.Adam
stock = getattr(owner, name)
def counted(self, *args):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(self, *args)
setattr(owner, name, counted)
moe_collab.oneshot(**arguments(load(model), *modifiers, output=work + "-out"), work=work)
"""


def killed(model, work, modifiers, name, left):
    """Run until the `left`-th call of `name`, a note of a result or a step of Adam, and then kill the process."""
    arguments = (json.dumps(argument) for argument in (str(model), str(work), modifiers, name, left))
    found = subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True, text=True)
    assert found.returncode == -9, found.stderr


def test_a_signal_that_nobody_can_catch_loses_nothing(tiny, tmp_path):
    modifiers, work = (PRUNE, allocate("qwen3_moe"), FISHER), tmp_path / "work"
    killed(tiny("qwen3_moe"), work, modifiers, "note", 8)
    known = sum(file.stat().st_size for file in work.rglob("*.json"))
    moe_collab.oneshot(**arguments(load(tiny("qwen3_moe")), *modifiers, output=tmp_path / "work-out"), work=work)
    run(tiny("qwen3_moe"), *modifiers, output=tmp_path / "out")
    assert digests(tmp_path / "work-out") == digests(tmp_path / "out") != {} and known > 1000


def test_a_finished_run_is_not_computed_again(tiny, tmp_path, steps):
    modifiers = PRUNE, allocate("qwen3_moe", plan=str(tmp_path / "plan.json")), FISHER
    for _ in range(2):
        steps.count = 0
        moe_collab.oneshot(
            **arguments(load(tiny("qwen3_moe")), *modifiers, output=tmp_path / "out"), work=tmp_path / "work"
        )
    assert steps.count == 0
    assert not any((tmp_path / "work").rglob("*.data"))  # hidden states and samples are gone


def masked(loader):
    """The same tokens, of which the last counts as padding."""
    rows = [row | {"attention_mask": row["attention_mask"].clone()} for row in loader.dataset]
    rows[0]["attention_mask"][-1] = 0
    return DataLoader(rows, batch_size=4)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"recipe": ({"ExpertPruningModifier": {"retention": 0.5}},)}, "recipe is not"),
        ({"data": samples(count=12)}, "data is not"),
        ({"data": masked(samples())}, "data is not"),
        ({"changed": "model.layers.1.self_attn.o_proj"}, "model is not"),
        ({"family": "mixtral"}, "model is not"),
        ({"family": "mixtral", "data": samples(count=12)}, "model, data are not"),
    ],
)
def test_another_runs_directory_is_refused_by_what_differs(other, named, tiny, tmp_path):
    work = str(tmp_path / "work")
    run(tiny("qwen3_moe"), {"ExpertPruningModifier": {"retention": 0.75, "work": work}})
    changed = {"recipe": ({"ExpertPruningModifier": {"retention": 0.75}},), "data": samples(), "family": "qwen3_moe"}
    changed |= other
    model = load(tiny(changed["family"]))
    if "changed" in changed:
        model.get_submodule(changed["changed"]).weight.data.mul_(1.5)
    with pytest.raises(MoeCollabError, match=rf"work: this `work` directory belongs to another run: {named}"):
        moe_collab.oneshot(
            model=model,
            recipe=recipe(*changed["recipe"]),
            dataset=changed["data"],
            work=work,
        )


def test_a_recipe_that_names_a_changed_file_is_refused(tiny, tmp_path, steps):
    scores = tmp_path / "scores.json"
    layers = describe(load(tiny("qwen3_moe"))).layers
    modifiers = {"ExpertPruningModifier": {"retention": 0.75, "criterion": str(scores)}}, allocate("qwen3_moe"), FISHER
    for sign, error in ((1, Killed), (-1, MoeCollabError)):
        scores.write_text(json.dumps({layer.name: [sign * i for i in range(layer.num_experts)] for layer in layers}))
        steps.count, steps.limit = 0, 60
        with pytest.raises(error, match=r"MixedBitAllocModifier found another model|^$"):
            moe_collab.oneshot(
                **arguments(load(tiny("qwen3_moe")), *modifiers, output=tmp_path / "out"), work=tmp_path / "work"
            )


def unfinished(work):
    """The files of a run that tell how far something has come that learns."""
    return [file.name for part in ("learning", "tuning") for file in work.rglob(f"{part}*.safetensors")]


@pytest.mark.parametrize("what", LEARN)
def test_what_learns_goes_on_where_it_was_killed_again_and_again(what, tiny, tmp_path, adam):
    run(tiny("qwen3_moe"), tuned(0) if what == "tuning" else HALVE, output=tmp_path / "unlearned")
    run(tiny("qwen3_moe"), *LEARN[what], output=tmp_path / "unkilled")
    expected, all_at_once, taken, ended, starts = digests(tmp_path / "unkilled"), adam.count, 0, False, 0
    assert expected != digests(tmp_path / "unlearned")
    while not ended:
        adam.count, adam.limit = 0, 5
        with suppress(Killed):
            given = arguments(load(tiny("qwen3_moe")), *LEARN[what], output=tmp_path / "out")
            moe_collab.oneshot(**given, work=tmp_path / "work")
            ended = True
        taken, starts = taken + adam.count, starts + 1
        assert len(unfinished(tmp_path / "work")) == (not ended) and starts < 20
    assert digests(tmp_path / "out") == expected
    assert starts > 3 and taken <= all_at_once + starts - 1  # a step between two judgements, each time


@pytest.mark.parametrize("what", LEARN)
def test_what_learns_is_killed_while_it_is_put_down(what, tiny, tmp_path, steps, adam):
    def start(limit):
        steps.count, steps.limit, adam.count = 0, limit, 0
        given = arguments(load(tiny("qwen3_moe")), *LEARN[what], output=tmp_path / "out")
        moe_collab.oneshot(**given, work=tmp_path / f"work{limit}")
        return digests(tmp_path / "out")

    expected, total = start(None), steps.count
    for limit in range(total - 3, total):
        with pytest.raises(Killed):
            start(limit)
        steps.limit, steps.count, adam.count = None, 0, 0
        given = arguments(load(tiny("qwen3_moe")), *LEARN[what], output=tmp_path / "out")
        moe_collab.oneshot(**given, work=tmp_path / f"work{limit}")
        assert digests(tmp_path / "out") == expected and adam.count <= 2
        assert not unfinished(tmp_path / f"work{limit}")


def test_a_signal_in_a_step_of_adam_loses_little(tiny, tmp_path, adam):
    modifiers, work = LEARN["predictions"], tmp_path / "work"
    run(tiny("qwen3_moe"), *modifiers, output=tmp_path / "out")
    total, adam.count = adam.count, 0
    killed(tiny("qwen3_moe"), work, modifiers, "step", 20)
    moe_collab.oneshot(**arguments(load(tiny("qwen3_moe")), *modifiers, output=tmp_path / "work-out"), work=work)
    assert digests(tmp_path / "work-out") == digests(tmp_path / "out") != {} and adam.count <= total - 18


def test_a_directory_in_use_or_of_somebody_else_is_refused(tiny, tmp_path):
    prune = {"ExpertPruningModifier": {"retention": 0.75, "work": str(tmp_path)}}
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(MoeCollabError, match="a directory with other files in it"):
        run(tiny("qwen3_moe"), prune)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "thesis.txt").unlink()
    with (
        FileLock(tmp_path / "moe-collab.lock"),
        pytest.raises(MoeCollabError, match="another run is working in this directory"),
    ):
        run(tiny("qwen3_moe"), prune)
    run(tiny("qwen3_moe"), prune)
    both = [prune, {"ActivationSmoothModifier": {"strength": 0.5, "work": str(tmp_path / "other")}}]
    with pytest.raises(MoeCollabError, match="one run works in one directory, but"):
        run(tiny("qwen3_moe"), *both)


def test_what_a_killed_process_left_of_temporary_files_goes(tmp_path):
    code = "import os, sys; from pathlib import Path\n"
    code += "from moe_collab.calibration.workspace import TemporaryFolder as T\n"
    code += "folder = T(Path(sys.argv[1])); (folder.path / 'large').write_bytes(bytes(999)); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    (left,) = tmp_path.iterdir()
    assert (left / "large").exists()
    own, other = TemporaryFolder(tmp_path), TemporaryFolder(tmp_path)
    assert not left.exists() and own.path.exists() and other.path.exists()
    own.cleanup(), other.cleanup()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room on it"), OSError(errno.ENOSPC, "No space left")])
def test_what_runs_out_is_one_error_that_says_what_is_kept(error, tiny, tmp_path, monkeypatch):
    def fail(*_args, **_named):
        raise error

    monkeypatch.setattr("moe_collab.calibration.study.ExpertGroup.moments_of", fail)
    work = tmp_path / "work"
    with pytest.raises(MoeCollabError, match=rf"(memory ran out|the disk is full).*\n?.*is kept in {work}"):
        moe_collab.oneshot(
            **arguments(load(tiny("qwen3_moe")), allocate("qwen3_moe"), FISHER, output=tmp_path), work=work
        )
    assert any(work.rglob("*.hidden.data"))


def test_stock_modifiers_are_announced(tiny, tmp_path):
    heard = []
    sink = logger.add(heard.append, level="INFO")
    run(
        tiny("qwen3_moe"),
        {"MixedBitAllocModifier": {"bpw": 3.5, "bits": [2, 4], "work": str(tmp_path / "w")}},
        QUANTIZE,
    )
    logger.remove(sink)
    said = [line for line in heard if "GPTQModifier is llm-compressor's" in line]
    assert len(said) == 1 and "about 0.0 GB" in said[0] and "keeps nothing in `work`" in said[0]
