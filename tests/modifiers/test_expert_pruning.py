"""Who stays: criteria, forms, protection, and statistics that are measured once."""

import json

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

import moe_collab
from moe_collab import MoeCollabError
from moe_collab.architectures import is_masked
from moe_collab.modifiers.glue.outline import model_fingerprint
from moe_collab.moe_model import describe
from moe_collab.pruning import CRITERIA, kept_experts
from moe_collab.statistics import SavedStatistics

from .conftest import load, run, samples

GATE = "model.layers.{}.mlp"


def prune(model, folder=None, data=None, **fields):
    """(the pruned model, statistics by layer name if kept)."""
    original = load(model) if not isinstance(model, torch.nn.Module) else model
    fingerprint = model_fingerprint(original)
    fields = {"retention": 0.5, "statistics": str(folder) if folder else None} | fields
    run(original, {"ExpertPruningModifier": fields}, data=data)
    return original, SavedStatistics.load(folder, fingerprint) if folder else None


def kept_rows(pruned, path):
    """Layer -> the original rows that its router has now."""
    rows = [layer.router.weight.detach() for layer in describe(load(path)).layers]
    return [
        [next(i for i, old in enumerate(before) if torch.equal(old, row)) for row in layer.router.weight.detach()]
        for before, layer in zip(rows, describe(pruned).layers, strict=True)
    ]


def test_statistics_are_measured_once_for_every_criterion(tiny, tmp_path):
    path, folder = tiny("qwen3_moe"), tmp_path / "seen"
    _, (domains, seen) = prune(path, folder)
    assert domains == [""] and float(seen[GATE.format(0)].tokens.sum()) == 16 * 32
    assert float(seen[GATE.format(1)].counts.sum()) == 16 * 32 * 2
    before = (folder / "statistics.safetensors").read_bytes()
    for criterion, score in CRITERIA.items():
        model, _ = prune(path, folder, criterion=criterion, data=samples(4))
        assert kept_rows(model, path) == [kept_experts(score(seen[GATE.format(i)]), 4) for i in (0, 1)]
    assert (folder / "statistics.safetensors").read_bytes() == before
    with pytest.raises(MoeCollabError, match="of another model"):
        prune(tiny("qwen3_moe", seed=1), folder)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_statistics_agree_with_a_plain_pass(family, tiny, tmp_path):
    # In float32, for in bfloat16 near ties are routed by chance.
    path = tiny(family)
    _, (_, seen) = prune(load(path).float(), tmp_path / "seen")
    model, norms = load(path).float(), torch.zeros(8, dtype=torch.float64)
    moe = describe(model)
    layer = moe.layers[0]

    def see(_module, args, _output):
        hidden, indices, weights = args
        for expert in range(8):
            tokens, slots = torch.where(indices == expert)
            output = layer.expert(expert)(hidden[tokens]).float().norm(dim=-1)
            norms[expert] += (output * weights[tokens, slots] / moe.routed_scaling_factor).sum()

    handle = layer.experts.register_forward_hook(see)
    with torch.no_grad():
        for batch in samples():
            model(**batch)
    handle.remove()
    torch.testing.assert_close(seen[layer.name].weighted_norm_sum[0], norms, rtol=1e-4, atol=1e-4)


def test_padding_counts_for_nothing(tiny, tmp_path):
    rows = [batch["input_ids"] for batch in samples(8)]
    padded = [
        {"input_ids": torch.cat([ids, torch.full((8,), 257)]), "attention_mask": (torch.arange(40) < 32).long()}
        for ids in torch.cat(rows)
    ]
    plain = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.cat(rows)]
    path = tiny("qwen3_moe")
    _, (_, with_padding) = prune(load(path).float(), tmp_path / "a", data=DataLoader(padded, batch_size=4))
    _, (_, without) = prune(load(path).float(), tmp_path / "b", data=DataLoader(plain, batch_size=4))
    for name, seen in without.items():
        assert torch.equal(seen.tokens, with_padding[name].tokens)
        assert torch.equal(seen.selections, with_padding[name].selections)


def padded_rows(count=16):
    """Rows of 32 tokens, of which the last 4 to 16 are padding, of each row another number."""
    generator = torch.Generator().manual_seed(7)
    for index in range(count):
        ids = torch.randint(0, 250, (32,), generator=generator)
        mask = (torch.arange(32) < 16 + index % 13).long()
        yield {"input_ids": torch.where(mask.bool(), ids, 257).tolist(), "attention_mask": mask.tolist()}


@pytest.mark.parametrize("pipeline", ["independent", "basic"])
def test_padding_of_a_shuffled_sample_counts_for_nothing(pipeline, tiny, tmp_path):
    rows = list(padded_rows(60))
    model, drawn = load(tiny("qwen3_moe")), set()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: drawn.update(map(tuple, args[0].tolist())))
    fingerprint = model_fingerprint(model)
    fields = {"retention": 0.5, "statistics": str(tmp_path / "seen")}
    options = {"batch_size": 4, "num_calibration_samples": 12, "pipeline": pipeline}
    run(model, {"ExpertPruningModifier": fields}, data=Dataset.from_list(rows), **options)
    _, seen = SavedStatistics.load(tmp_path / "seen", fingerprint)
    assert len(drawn) == 12
    real = sum(token != 257 for row in drawn for token in row)
    for statistics in seen.values():
        assert float(statistics.tokens.sum()) == real and float(statistics.counts.sum()) == 2 * real


def test_domains_of_a_shuffled_sample_of_a_dataset_are_its_rows(tiny, tmp_path):
    # Even and odd tokens, so that a row that was drawn tells its domain.
    generator = torch.Generator().manual_seed(9)
    names = ["even", "odd"] * 20
    ids = [(torch.randint(0, 120, (16,), generator=generator) * 2 + (name == "odd")).tolist() for name in names]
    rows = [{"input_ids": row, "domain": name} for row, name in zip(ids, names, strict=True)]
    model, drawn = load(tiny("qwen3_moe")), set()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: drawn.update(map(tuple, args[0].tolist())))
    fingerprint = model_fingerprint(model)
    fields = {"retention": 0.5, "statistics": str(tmp_path / "seen")}
    run(model, {"ExpertPruningModifier": fields}, data=Dataset.from_list(rows), num_calibration_samples=9)
    domains, seen = SavedStatistics.load(tmp_path / "seen", fingerprint)
    expected = {name: 16.0 * sum(row[0] % 2 == (name == "odd") for row in drawn) for name in ("even", "odd")}
    assert len(drawn) == 9
    for statistics in seen.values():
        assert dict(zip(domains, statistics.tokens.tolist(), strict=True)) == expected


def test_domains_that_are_not_known_for_every_row(tiny):
    ids = torch.arange(8 * 8).view(8, 8)
    some = [{"input_ids": row} | ({"domain": "rare"} if index % 2 else {}) for index, row in enumerate(ids)]
    every = [{"input_ids": row, "domain": "common"} for row in ids]
    collate = lambda part: {"input_ids": torch.stack([row["input_ids"] for row in part])}  # noqa: E731
    backwards = lambda part: collate(part[::-1])  # noqa: E731
    packed = lambda part: {"input_ids": collate(part)["input_ids"].view(1, -1)}  # noqa: E731
    for rows, way, message in (
        (some, collate, "for some samples only"),
        (every, backwards, "not the samples' own tokens in their order"),
        (every, packed, "not the samples' own tokens in their order"),
    ):
        with pytest.raises(MoeCollabError, match=message):
            prune(tiny("qwen3_moe"), data=DataLoader(rows, batch_size=4, collate_fn=way))


def by_domain():
    """Samples of two domains; the collator knows nothing of domains."""
    generator = torch.Generator().manual_seed(3)
    rows = [
        {"input_ids": torch.randint(low, low + 20, (32,), generator=generator), "domain": name}
        for _ in range(6)
        for name, low in (("common", 0), ("common", 0), ("rare", 200))
    ]
    collate = lambda part: {"input_ids": torch.stack([row["input_ids"] for row in part])}  # noqa: E731
    return DataLoader(rows, batch_size=3, shuffle=True, collate_fn=collate)


def test_the_best_experts_of_a_rare_domain_survive(tiny, tmp_path):
    path, folder = tiny("qwen3_moe"), tmp_path / "seen"
    _, (domains, seen) = prune(path, folder, data=by_domain(), criterion="frequency")
    common, rare = domains.index("common"), domains.index("rare")
    assert sorted(domains) == ["common", "rare"] and seen[GATE.format(0)].tokens[rare] == 6 * 32
    # Let the rare domain need only the two experts that the other needs least.
    least = [seen[GATE.format(i)].selections[common].topk(2, largest=False).indices.tolist() for i in (0, 1)]
    for statistics, two in zip(seen.values(), least, strict=True):
        statistics.selections[rare] = 0
        statistics.selections[rare, two] = 1e-3
    fingerprint = model_fingerprint(load(path))
    meta = SavedStatistics(model_fingerprint=fingerprint, domains=domains, num_experts=8, layers=list(seen))
    meta.save(folder, seen)
    model, _ = prune(path, folder, data=by_domain(), criterion="frequency", protect=2)
    assert all(set(two) <= set(kept) for two, kept in zip(least, kept_rows(model, path), strict=True))
    model, _ = prune(path, folder, data=by_domain(), criterion="frequency")
    assert not any(set(two) & set(kept) for two, kept in zip(least, kept_rows(model, path), strict=True))


def test_super_experts_survive(tiny):
    model = load(tiny("qwen3_moe"))
    expert = describe(model).layers[1].expert(6)
    expert.down_proj.weight.data *= 50
    row = describe(model).layers[1].router.weight[6].detach().clone()
    prune(model, criterion="importance", protect_super_experts=True, num_experts=2, retention=None)
    assert any(torch.equal(row, kept) for kept in describe(model).layers[1].router.weight)


def test_masked_groups_may_lose_different_numbers(tiny, tmp_path):
    path, out = tiny("deepseek_v3"), tmp_path / "out"
    scores = {GATE.format(1): [9, 8, 7, 6, 1, 2, 3, 4]}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    fields = {"retention": 0.75, "pruning": "masked", "criterion": str(tmp_path / "scores.json")}
    model = run(load(path), {"ExpertPruningModifier": fields}, output=out)
    layer = describe(model).layers[0]
    assert layer.live_experts == [0, 1, 2, 3, 6, 7]
    assert is_masked(layer.router.e_score_correction_bias).nonzero().flatten().tolist() == [4, 5]
    ids = torch.arange(40)[None] * 5
    with torch.no_grad():
        torch.testing.assert_close(
            moe_collab.load(out)(ids).logits.float(), model(ids).logits.float(), rtol=0.05, atol=0.15
        )


def last_first(statistics):
    """A user's own criterion."""
    return torch.arange(statistics.num_experts)


def test_a_function_of_your_own(tiny):
    path = tiny("qwen3_moe")
    model, _ = prune(path, criterion=f"{__name__}:last_first")
    assert kept_rows(model, path) == [[4, 5, 6, 7]] * 2


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen3_moe", {"criterion": "best"}, "none of importance, frequency"),
        ("qwen3_moe", {"criterion": "nowhere:at_all"}, "cannot import nowhere:at_all"),
        ("qwen3_moe", {"criterion": "{}/none.json"}, "does not hold a list of scores for each of"),
        ("qwen3_moe", {"criterion": "math:fsum"}, "not iterable"),
        ("qwen3_moe", {"protect": 1}, "no sample of the calibration set names its `domain`"),
        ("qwen3_moe", {"protect": 1, "criterion": "x.json"}, "not by domain"),
        ("qwen3_moe", {"pruning": "masked"}, "has no selection bias to mask"),
        ("deepseek_v3", {"pruning": "masked", "num_experts": 3, "retention": None}, "no fewer than 4"),
    ],
)
def test_bad_input(family, fields, message, tiny, tmp_path):
    model = load(tiny(family))
    rows = [layer.router.weight.clone() for layer in describe(model).layers]
    fields = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in fields.items()}
    with pytest.raises((MoeCollabError, ValueError, TypeError), match=message):
        prune(model, **fields)
    assert all(torch.equal(a, b.router.weight) for a, b in zip(rows, describe(model).layers, strict=True))
