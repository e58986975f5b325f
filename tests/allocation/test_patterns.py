"""Patterns of module names: both names of a module are known, and what matches nothing is an error."""

import pytest

from moe_collab import MoeCollabError
from moe_collab.allocation import AllocationRequest, Planner
from moe_collab.checkpoint.sizes import TensorEntry
from moe_collab.outline import LayerOutline, Matrix, ModelOutline
from moe_collab.routers import RouterLimits


def mixtral() -> ModelOutline:
    """Two experts in one layer, which the checkpoint calls otherwise than the model, and two other Linears."""
    saved = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    matrices = [
        Matrix(
            f"model.layers.0.mlp.experts.{expert}.{projection}",
            f"model.layers.0.block_sparse_moe.experts.{expert}.{saved[projection]}",
            (64, 64),
            layer=0,
            expert=expert,
            projection=projection,
        )
        for expert in (0, 1)
        for projection in saved
    ]
    names = ("model.layers.0.self_attn.o_proj", "lm_head")
    matrices += [Matrix(name, name, (64, 64)) for name in names]
    gate = ("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate")
    return ModelOutline(
        entries=tuple(TensorEntry(f"{m.saved_as}.weight", "BF16", m.shape) for m in matrices),
        matrices={matrix.name: matrix for matrix in matrices},
        layers=(LayerOutline("model.layers.0.mlp", "model.layers.0.mlp.experts", (0, 1)),),
        limits=RouterLimits(2, 1),
        modules={matrix.name: matrix.saved_as for matrix in matrices} | dict([gate]),
        classes=frozenset({"Linear", "MixtralTopKRouter"}),
    )


def planner(**fields) -> Planner:
    return Planner(mixtral(), AllocationRequest(bpw=4.0, group_sizes=(32,), **fields))


@pytest.mark.parametrize("pattern", [r"experts\.0\.w[13]$", r"experts\.0\.(gate|up)_proj$"])
def test_fixed_knows_both_names(pattern):
    found = planner(bits=(2,), fixed=((pattern, 8),))
    assert {s.num_bits for s in found.table.options("model.layers.0.mlp.experts.0.up_proj")} == {8}
    assert {s.num_bits for s in found.table.options("model.layers.0.mlp.experts.1.up_proj")} == {2}


@pytest.mark.parametrize("entry", [r"re:.*experts\.0\.w[123]$", r"re:.*experts\.0\..*_proj"])
def test_ignore_knows_both_names(entry):
    assert {m.expert for m in planner(ignore=(entry,)).matrices.values()} == {1}


def test_floors_know_both_names_and_the_first_counts():
    found = planner(scope="model", ignore=(), bits=(2, 4, 8), floors=(("lm_head$", 8), ("o_proj", 4)))
    assert min(s.num_bits for s in found.table.options("lm_head")) == 8
    assert min(s.num_bits for s in found.table.options("model.layers.0.self_attn.o_proj")) == 4


@pytest.mark.parametrize(
    "entry", ["re:.*lm_head", "re:.*gate$", "MixtralTopKRouter", "re:.*block_sparse_moe.gate", "Linear"]
)
def test_ignore_may_name_any_module(entry):
    planner(ignore=(entry,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ignore": ("re:.*nope.*",)}, r"ignore: 're:\.\*nope\.\*' names no module\. The nearest names: "),
        ({"ignore": ("lm_haed",)}, r"ignore: 'lm_haed' names no module \(regexes begin with re:\).*: lm_head"),
        ({"fixed": ((r"experts\.0\.w7$", 8),)}, r"fixed: .* matches no Linear\. .*experts\.0\.w"),
        ({"fixed": ((r"experts\.9\.", 8),)}, "fixed: .* matches no Linear"),
        ({"fixed": (("lm_head", 8),)}, "matches only what `ignore` leaves alone, such as lm_head"),
        ({"floors": (("lm_head$", 8),)}, "floors: only Linears of scope: model have floors"),
        ({"floors": ((r"experts", 8),), "scope": "model"}, "floors: 'experts' matches no Linear"),
    ],
)
def test_what_has_no_effect_is_an_error(fields, message):
    with pytest.raises(MoeCollabError, match=message):
        planner(**fields)


def test_once_experts_are_pruned_patterns_may_match_nothing():
    assert planner(ignore=("re:.*nope.*",), fixed=((r"experts\.9\.", 8),), strict=False).experts
