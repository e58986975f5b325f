"""Rounding on trial, Linears outside the experts, and tuned scales, on the trained fixture."""

import pytest
import torch

pytest.importorskip("llmcompressor")


from moe_collab.calibration import (
    Calibration,
    RoundedModel,
    Trial,
    float32_weights,
    held_out,
    log_probabilities,
    mean_kl,
)
from moe_collab.calibration.at_hand import shadowed
from moe_collab.calibration.costs import linear_problem
from moe_collab.calibration.live import predict
from moe_collab.calibration.results import Bookmark, Results
from moe_collab.calibration.teacher import kl_of, teach
from moe_collab.calibration.tuning import tune_grids
from moe_collab.errors import MoeCollabError
from moe_collab.formats import Scheme
from moe_collab.moe_model import describe
from moe_collab.rounding import Rounder

NEAREST = Rounder(feedback=False)


def uniform(model, scheme):
    return {name: scheme for layer in describe(model).layers for name, *_ in layer.projections()}


def rounded(model, batches, schemes, rounder=NEAREST):
    """(names, what rounds them) by all of `batches`."""
    found = RoundedModel(Calibration(model, describe(model), [*batches, batches[-1]]), rounder)
    return found.round(schemes), found


def test_a_second_trial_rounds_only_what_changed(model, batches, monkeypatch):
    rounded, stock = [], RoundedModel._keep

    def counted(self, what, grids, key):
        rounded.extend(grids)
        stock(self, what, grids, key)

    def trial():
        calibration = Calibration(model, describe(model), batches[:3])
        return Trial(calibration, RoundedModel(calibration, NEAREST))

    monkeypatch.setattr(RoundedModel, "_keep", counted)
    schemes = uniform(model, Scheme(3, 128))
    one = trial()
    first = one.kl(schemes, {})
    changed = schemes | {"model.layers.1.mlp.experts.3.down_proj": Scheme(2, 128)}
    first_rounded, rounded[:] = sorted(rounded), []
    second = one.kl(changed, {})
    assert first_rounded == sorted(schemes) and len(rounded) == 3 and 0 < first < second
    fresh = trial()
    assert fresh.kl(changed, {}) == second
    assert fresh.kl(schemes, {describe(model).layers[0].name: [2, 7]}) > first


def test_a_trial_measures_the_kl_of_the_rounded_model(float32_model, batches):
    model, schemes = float32_model, uniform(float32_model, Scheme(3, 128))
    calibration = Calibration(model, describe(model), batches)
    found = RoundedModel(calibration, Rounder(scale_dtype=torch.float32))
    trial = Trial(calibration, found).kl(schemes, {})
    names, judge = found.round(schemes), calibration.judge.batches
    weights = {model.get_submodule(name): {"weight": found[name].values()} for name in names}
    with torch.no_grad():
        base = [log_probabilities(model, batch) for batch in judge]
        with shadowed(weights):
            assert trial == pytest.approx(mean_kl(model, judge, base), rel=1e-4)


def test_costs_of_linears_predict_kl(model, batches):
    inner, scheme = f"model.layers.{len(model.model.layers) - 1}.self_attn.o_proj", Scheme(5, 128)
    modules = {name: model.get_submodule(name) for name in (inner, "lm_head")}
    _, samples = Calibration(model, describe(model), [*batches, batches[-1]]).samples(modules)
    weights = {name: seen.rounded(NEAREST, scheme).values()[0] for name, seen in samples.items()}
    predicted = {name: linear_problem(seen).predicted(NEAREST, scheme) for name, seen in samples.items()}
    with float32_weights(model), torch.no_grad():
        base = [log_probabilities(model, batch) for batch in batches]
        with shadowed({modules[inner]: {"weight": weights[inner]}}):
            measured = mean_kl(model, batches, base)
        hidden = torch.cat([predict(model, batch)[0].flatten(0, 1) for batch in batches])
        change = hidden @ weights["lm_head"].T  # its weight is the embeddings' too, which stay
        logp = torch.cat([logits.flatten(0, 1) for logits in base])
        of_head = float((logp.exp() * (logp - change.log_softmax(-1))).sum(-1).mean())
    # Behind attention routers flip too, behind lm_head there is nothing.
    assert predicted[inner] == pytest.approx(measured, rel=0.6)
    assert predicted["lm_head"] == pytest.approx(of_head, rel=0.25)


def test_tuning_brings_predictions_closer_and_stays_on_the_grid(model, batches):
    short = [{"input_ids": batch["input_ids"][:, :64]} for batch in batches]
    lessons = teach(model, short)
    names, found = rounded(model, short, uniform(model, Scheme(2, 128)))
    grids = {name: found[name].grid() for name in names}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = tune_grids(model, grids, lessons, 60, torch.bfloat16, Bookmark(Results(), "tuning"))
    assert tuned.after < tuned.before
    for name, grid in tuned.grids.items():
        assert torch.equal(grid.codes, grid.codes.round().clamp(*grid.scheme.levels))
        assert (grid.codes - grids[name].codes).abs().max() <= 1
        assert torch.equal(grid.scales, grid.scales.bfloat16().float())
    assert any(not torch.equal(grid.codes, grids[name].codes) for name, grid in tuned.grids.items())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(p.grad is not None for p in model.parameters())


def test_tuning_needs_a_batch_to_judge_by(model, batches):
    with pytest.raises(MoeCollabError, match="two batches"):
        teach(model, batches[:1])


def test_texts_of_its_own_begin_like_the_data_and_are_only_learned_from(model, batches):
    mask = torch.ones_like(batches[0]["input_ids"][:, :32])
    mask[0, 20:] = 0
    short = [{"input_ids": batch["input_ids"][:, :32], "attention_mask": mask} for batch in batches]
    lessons = teach(model, short)
    originals = len(short) - len(lessons.unseen)
    assert len(lessons.known) == 7 * originals
    assert all(any(lesson.batch is batch for batch in short) for lesson in lessons.unseen)
    for original, own in zip(lessons.known, lessons.known[originals:], strict=False):
        ids, written = original.batch["input_ids"], own.batch["input_ids"]
        assert written.shape == ids.shape and torch.equal(ids[:, :4], written[:, :4])
        assert float((ids != written)[:, 4:].float().mean()) > 0.5
    with float32_weights(model):
        assert kl_of(model, lessons.head, lessons.known) == pytest.approx(0, abs=1e-6)


def test_what_is_held_out_comes_from_everywhere():
    learnt, judged = held_out(list(range(32)))
    assert judged == [7, 15, 23, 31] and sorted(learnt + judged) == list(range(32))
    assert held_out([1, 2, 3]) == ([1, 2], [3])
    assert held_out([1]) == ([1], [1])
