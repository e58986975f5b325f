"""Calibration data in every form oneshot() takes: one sample for all passes, and the same one in the next run."""

import json

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.args import DatasetArguments
from llmcompressor.core import State
from llmcompressor.datasets import utils
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler
from transformers import AutoTokenizer, default_data_collator

from integration.compress import recipe
from moe_collab import MoeCollabError
from moe_collab.modifiers.glue.data import check_data, one_pass

from .calibration_rows import ROWS, own_cache, texts, watch  # noqa: F401 (a fixture)
from .conftest import load, run

PRUNE = {"ExpertPruningModifier": {"retention": 0.75}}


def tokenized(path, rows):
    tokens = AutoTokenizer.from_pretrained(path)(rows)
    return Dataset.from_dict({name: tokens[name] for name in ("input_ids", "attention_mask")})


def json_folder(path, rows):
    path.mkdir(exist_ok=True)
    (path / "train.json").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return {"dataset_path": str(path), "num_calibration_samples": 8, "batch_size": 2, "max_seq_length": 64}


def forms(path, tmp_path):
    """The same rows as a name, as a dataset, and behind a loader with a sampler of its own."""
    rows = texts()
    few = {"num_calibration_samples": 8, "batch_size": 2, "max_seq_length": 64}
    dataset = tokenized(path, rows)
    sampler = RandomSampler(dataset, num_samples=8)
    return {
        "name": ("json", {**json_folder(tmp_path / "rows", rows), "splits": "train"}),
        "dataset": (dataset, few),
        "loader": (DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=default_data_collator), {}),
    }


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    """form -> (rows, plan, weights) of two runs."""
    path, results = tiny("qwen3_moe"), {}
    all_rows = set(map(tuple, tokenized(path, texts())["input_ids"]))
    tmp_path = tmp_path_factory.mktemp("forms")
    for turn in range(2):
        for form, (data, options) in forms(path, tmp_path).items():
            folder, model = tmp_path / f"{form}{turn}", load(path)
            seen = watch(model)
            modifiers = (
                PRUNE,
                {
                    "MixedBitAllocModifier": {
                        "bits": [2, 4, 8],
                        "bpw": 4,
                        "group_size": 32,
                        "plan": str(folder / "plan.json"),
                    }
                },
                {"FisherGPTQModifier": {"ignore": ["lm_head"]}},
                {"RouterCalibrationModifier": {"steps": 2}},
            )
            torch.manual_seed(turn)
            run(model, *modifiers, data=data, output=folder / "out", **options)
            plan = json.loads((folder / "plan.json").read_text())
            results.setdefault(form, []).append(
                (seen & all_rows, plan, (folder / "out" / "model.safetensors").read_bytes())
            )
    return results


@pytest.mark.parametrize("form", ["name", "dataset", "loader"])
def test_all_passes_of_all_runs_see_the_same_rows(form, found):
    known, plan, weights = found["dataset"][0]
    assert len(known) == 8
    for rows, own_plan, own_weights in found[form]:
        assert rows == known and own_plan == plan and own_weights == weights


def state_of(loader):
    """A state as a run has it: its data are those that pipelines read, not a copy."""
    state = State()
    state.update(calib_data=loader)
    check_data(state, "a modifier")
    assert state.data.calib is loader
    return state


def drawn(batches):
    return [index for batch in batches for index in batch]


def ids_of(loader):
    return [batch["input_ids"].flatten().tolist() for batch in loader]


def plain_rows(count=20):
    return [{"input_ids": torch.tensor([index])} for index in range(count)]


def once_shuffled(rows):
    """A batch sampler that is a generator: its second pass would be empty."""
    yield from BatchSampler(RandomSampler(rows), 4, False)


LOADERS = {
    "shuffle": lambda rows: DataLoader(rows, batch_size=4, shuffle=True),
    "single rows": lambda rows: DataLoader(rows, batch_size=None, shuffle=True),
    "subset": lambda rows: DataLoader(rows, batch_size=4, sampler=SubsetRandomSampler(range(5, 15))),
    "batch sampler": lambda rows: DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 3, True)),
    "generator": lambda rows: DataLoader(rows, batch_sampler=once_shuffled(rows)),
    "kept workers": lambda rows: DataLoader(
        rows, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_sample_is_drawn_once_and_alike_in_every_run(kind):
    orders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loader = LOADERS[kind](plain_rows())
        before = torch.random.get_rng_state()
        state = state_of(loader)
        assert torch.equal(torch.random.get_rng_state(), before)
        num_batches = len(loader)
        next(iter(loader))  # as the sequential pipeline does before its own pass
        orders += [ids_of(loader), ids_of(one_pass(state)), ids_of(loader)]
        check_data(state, "the next modifier")
        orders += [ids_of(one_pass(state))]
        assert len(orders[-1]) == num_batches
    assert all(order == orders[0] for order in orders)
    assert drawn(orders[0]) != sorted(drawn(orders[0]))


def test_a_loader_that_was_read_before_is_frozen_too():
    loader = LOADERS["kept workers"](plain_rows())
    iter(loader)
    state_of(loader)
    assert ids_of(loader) == ids_of(loader)


def test_your_own_generator_is_respected():
    rows = plain_rows()
    generator = torch.Generator().manual_seed(11)
    sampler = RandomSampler(rows, num_samples=6, generator=generator)
    loader = DataLoader(rows, sampler=sampler)
    state_of(loader)
    expected = torch.randperm(20, generator=torch.Generator().manual_seed(11)).tolist()[:6]
    assert drawn(ids_of(loader)) == expected == drawn(ids_of(loader))


def test_freezing_reads_no_data():
    class Untouchable:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise AssertionError("no data may be read yet")

    state_of(DataLoader(Untouchable(), shuffle=True))


class Stream(IterableDataset):
    """The same rows in another order each time; or always in order."""

    def __init__(self, rows, shuffled):
        self.rows, self.shuffled = rows, shuffled

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        order = torch.randperm(len(self.rows)).tolist() if self.shuffled else range(len(self.rows))
        return (self.rows[index] for index in order)


def test_what_cannot_be_frozen_is_watched():
    steady, shuffled = (DataLoader(Stream(plain_rows(), own), batch_size=4) for own in (False, True))
    state = state_of(steady)
    assert ids_of(one_pass(state)) == ids_of(one_pass(state))
    state = state_of(shuffled)
    ids_of(one_pass(state))
    with pytest.raises(MoeCollabError, match=r"changed between two passes over it, at batch \d of 5"):
        ids_of(one_pass(state))
    state = state_of([{"input_ids": torch.ones(1, 2)}])
    ids_of(one_pass(state))
    state.data.calib.append({"input_ids": torch.ones(1, 3)})
    with pytest.raises(MoeCollabError, match="at batch 1 of 1"):
        ids_of(one_pass(state))
    with pytest.raises(MoeCollabError, match=r"no `input_ids`, only \['pixel_values'\]"):
        list(one_pass(state_of([{"pixel_values": torch.ones(1)}])))


def test_a_stream_in_another_order_each_time_is_one_error(tiny):
    rows = [{"input_ids": torch.randint(0, 250, (16,))} for _ in range(8)]
    with pytest.raises(MoeCollabError, match="changed between two passes over it, at batch 0 of 4"):
        run(tiny("qwen3_moe"), PRUNE, data=DataLoader(Stream(rows, True), batch_size=2))


@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_an_empty_dataset_is_one_error(column, tiny):
    # `run` takes an empty dataset for none.
    data = Dataset.from_dict({column: []})
    with pytest.raises(MoeCollabError, match="has no rows"):
        oneshot(model=load(tiny("qwen3_moe")), recipe=recipe(PRUNE), dataset=data)


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_of_several_processes_samples_its_own_share(shuffle, monkeypatch):
    dataset = Dataset.from_dict({"input_ids": [[index] for index in range(10)]})
    args = DatasetArguments(dataset=dataset, num_calibration_samples=8, shuffle_calibration_samples=shuffle)
    monkeypatch.setattr(utils, "_is_dist_and_same_ds", lambda _: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank, share in enumerate([[0, 1, 2, 3], [4, 5, 6, 7]]):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        loader = utils.format_calibration_data(args, dataset, None)
        state_of(loader)
        assert sorted(ids_of(loader)) == [[index] for index in share]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to pin memory for")
def test_memory_is_not_pinned_for_an_accelerator_that_is_not_there():
    cache = IntermediatesCache.empty(1, torch.device("cpu"))
    cache.update(0, {"hidden": torch.ones(2)})
    cache.pin_memory(0)
    assert not cache.fetch(0)["hidden"].is_pinned()
