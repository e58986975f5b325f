"""How many experts ActivationSmoothModifier lets a token activate, and what makes up for those that are not."""

import json
from contextlib import suppress

import pytest
from loguru import logger

from moe_collab.modifiers.glue.top_k import bytes_per_token
from moe_collab.moe_model import describe
from moe_collab.pruning.surgery import set_top_k

from .conftest import load, samples
from .smoothing_models import Trained, equal, smooth, state


@pytest.mark.parametrize(
    ("family", "pruning", "wanted", "top_k"),
    [
        ("qwen3_moe", {}, "keep", 4),
        ("qwen3_moe", {}, 3, 3),
        ("qwen3_moe", {}, 0.6, 2),
        ("qwen3_moe", {}, 0.625, 3),
        ("qwen3_moe", {}, 0.01, 1),
        ("qwen3_moe", {"num_experts": 5}, "scale", 3),
        ("deepseek_v3", {"num_experts": 5, "pruning": "masked"}, "scale", 3),
    ],
)
def test_number_of_experts(family, pruning, wanted, top_k, tiny, tmp_path):
    more = {"topk_group": 2} if family == "deepseek_v3" else {}
    before = [{"ExpertPruningModifier": pruning}] if pruning else []
    model = smooth(
        tiny(family, num_experts_per_tok=4, **more),
        *before,
        num_experts_per_tok=wanted,
        output=tmp_path,
        data=samples(4),
    )
    assert describe(model).top_k == top_k
    assert json.loads((tmp_path / "config.json").read_text())["num_experts_per_tok"] == top_k


def test_auto_takes_the_fewest_experts_that_keep_the_limit():
    chosen = {}
    for max_kl in (1e-6, 0.04):
        trained = Trained("qwen3_moe").remember()
        smooth(trained.model, data=trained.data(), num_experts_per_tok="auto", max_kl=max_kl)
        chosen[max_kl] = describe(trained.model).top_k
        assert trained.kl() <= max_kl
    assert chosen == {1e-6: 4, 0.04: 3}
    trained = Trained("qwen3_moe").remember()
    smooth(trained.model, data=trained.data(), num_experts_per_tok=2)
    assert trained.kl() > 0.04


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("renormalised", [True, False])
def test_outputs_are_brought_near_to_what_they_were(family, renormalised):
    def trained():
        model = Trained(family)
        return (model if renormalised else model.do_not_renormalise()).remember()

    matched, plain = trained(), trained()
    smooth(matched.model, data=matched.data(), num_experts_per_tok=2)
    sums = {}
    for layer in plain.moe.layers:
        see = lambda _m, _a, output, name=layer.name: sums.setdefault(name, []).append(output[1].sum(-1).mean())  # noqa: E731
        layer.router.register_forward_hook(see)
    plain.kl()
    set_top_k(plain.moe, 2)
    assert matched.kl() < (0.85 if renormalised else 0.99) * plain.kl()
    # Making up for the sum of the weights instead, as one might where they are not renormalised.
    for layer in plain.moe.layers:
        for index in layer.live_experts:
            layer.expert(index).down_proj.weight.data *= sums[layer.name][0] / sums[layer.name][1]
    assert matched.kl() <= plain.kl()


def test_without_compensation_only_the_number_changes(tiny):
    model = load(tiny("qwen3_moe"))
    before = state(model)
    smooth(model, num_experts_per_tok=1, compensate=False)
    assert equal(state(model), (before[0], 1))


def test_speed_up_is_reported_by_bytes_per_token(tiny):
    model, said = load(tiny("qwen3_moe")), []
    read = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    expert = 3 * 128 * 128 * 2
    moe = describe(model)
    assert bytes_per_token(model, moe, 2) == read - 2 * 6 * expert
    assert bytes_per_token(model, moe, 1) == read - 2 * 7 * expert
    handle = logger.add(said.append, level="INFO")
    with suppress(ValueError):
        smooth(model, num_experts_per_tok=1)
    logger.remove(handle)
    ratio = (read - 12 * expert) / (read - 14 * expert)
    assert any(f"about {ratio:.2f} times as fast (an estimate" in line for line in said)
