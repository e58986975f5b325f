"""Deciding needs neither llm-compressor nor a model: a plan made from a checkpoint's headers, in any environment."""

import subprocess
import sys
from dataclasses import replace

import pytest

from integration.tiny_models import build_tiny
from moe_collab import MoeCollabError
from moe_collab.allocation import AllocationRequest, CostTable, Decision, Planner, compression_plan, decide
from moe_collab.formats import Scheme
from moe_collab.plan import CompressionPlan

from .outlines import outline_of_checkpoint


class ByWidth:
    """Costs that fall by four for each bit, differ from expert to expert, and add up exactly."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self.tried: list[Decision] = []

    def costs(self) -> CostTable:
        table = CostTable(tokens=100, routed_tokens={layer.name: [50] * 8 for layer in self._planner.outline.layers})
        for name, matrix in self._planner.matrices.items():
            schemes = [scheme for scheme in self._planner.table.options(name) if scheme.is_packed]
            # Small groups and zero points help a little.
            prices = [
                (1 + max(matrix.expert, 0)) * 4.0**-scheme.num_bits * (0.5 if scheme.group_size == 32 else 1)
                for scheme in schemes
            ]
            table.add(name, schemes, [p * (1 if s.symmetric else 0.9) for p, s in zip(prices, schemes, strict=True)])
        return table

    def drop_costs(self, dropped):
        return {layer.name: [0.01 * (index + 1) for index in range(8)] for layer in self._planner.outline.layers}

    def kl(self, decision: Decision) -> float:
        self.tried.append(decision)
        costs = self.costs()
        return sum(costs.cost(name, scheme) for name, scheme in decision.schemes.items())


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def checkpoint(request, tmp_path_factory):
    return build_tiny(request.param, tmp_path_factory.mktemp("deciding") / request.param)


def test_the_unquantized_size_is_that_of_the_file(checkpoint):
    planner = Planner(outline_of_checkpoint(checkpoint), AllocationRequest(bpw=4.0, group_sizes=(32,)))
    assert planner.file_bytes(Decision({})) == (checkpoint / "model.safetensors").stat().st_size


def test_a_plan_is_made_and_read_back(checkpoint, tmp_path):
    outline = outline_of_checkpoint(checkpoint)
    experts = sum(2 * outline.matrices[name].numel for name in outline.experts)
    budget = (checkpoint / "model.safetensors").stat().st_size - experts * 7 // 10
    request = AllocationRequest(budget=budget, bits=(2, 3, 4, 8), group_sizes=(32, 128))
    planner = Planner(outline, request)
    plan = compression_plan(planner, decide(planner, ByWidth(planner)), "model", "recipe")
    plan.save(tmp_path / "plan.json")
    again = CompressionPlan.load(tmp_path / "plan.json")
    assert again == plan and again.predicted_bytes <= budget and again.bound_kl <= again.predicted_kl
    assert again.predicted_bytes == planner.layout.file_bytes(again.parsed())
    assert set(again.schemes) == set(planner.experts) and len(set(again.schemes.values())) > 1
    assert again.uniform_kl >= again.heldout_kl


def test_experts_go_where_that_is_cheaper(checkpoint):
    request = AllocationRequest(bpw=1.5, bits=(2, 4), group_sizes=(128,), pruning="physical")
    planner = Planner(outline_of_checkpoint(checkpoint), request)
    decided = decide(planner, ByWidth(planner)).decision
    counts = {len(gone) for gone in decided.dropped.values()}
    assert len(counts) == 1 and counts.pop() > 0


@pytest.mark.parametrize("pruning", ["none", "physical"])
def test_the_decision_is_what_was_tried_last(checkpoint, pruning):
    request = AllocationRequest(bpw=3.0, bits=(2, 4), group_sizes=(128,), pruning=pruning)
    planner = Planner(outline_of_checkpoint(checkpoint), request)
    measured = ByWidth(planner)
    decided = decide(planner, measured)
    # So it is already rounded. The uniform scheme came first.
    assert measured.tried[-1] == decided.decision
    assert len(measured.tried) == (2 if pruning == "none" else 3)
    assert len(set(measured.tried[0].schemes.values())) == 1 and decided.uniform_kl > decided.kl


def test_fixed_matrices_get_the_variant_that_pays(checkpoint):
    outline = outline_of_checkpoint(checkpoint)
    request = AllocationRequest(bpw=10.0, bits=(4, 8), group_sizes=(32, 128), fixed=((r"experts\.0\.down_proj", 4),))
    planner = Planner(outline, request)
    schemes = decide(planner, ByWidth(planner)).decision.schemes
    chosen = [scheme for name, scheme in schemes.items() if ".experts.0.down_proj" in name]
    # There is room for everything, so the best of four bits: small groups, zero points.
    assert chosen and set(chosen) == {Scheme(4, 32, symmetric=False)}


def test_fixed_experts_of_a_layer_are_two_parts_of_its_item(checkpoint):
    outline = outline_of_checkpoint(checkpoint)
    request = AllocationRequest(bpw=10.0, bits=(4, 8), group_sizes=(32, 128), granularity="layer")
    planner = Planner(outline, replace(request, fixed=((r"\.experts\.", 4),)))
    schemes = decide(planner, ByWidth(planner)).decision.schemes
    assert set(schemes.values()) == {Scheme(4, 32, symmetric=False)} and len(schemes) == len(outline.experts)


def test_gate_and_up_cannot_be_fixed_apart(checkpoint):
    request = AllocationRequest(bpw=6.0, group_sizes=(32,), fixed=((r"experts\.0\.up_proj", 4),))
    with pytest.raises(MoeCollabError, match=r"fixed: of .*experts\.0\.gate_proj it says None, of .*up_proj 4"):
        Planner(outline_of_checkpoint(checkpoint), request)


def test_no_framework_is_imported(checkpoint):
    code = (
        "import sys; sys.modules['llmcompressor'] = None\n"
        "from importlib import util; stock = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'llmcompressor' else stock(name, *rest)\n"
        "import moe_collab.allocation\n"
        "heavy = ('llmcompressor', 'compressed_tensors', 'transformers', 'vllm', 'moe_collab.modifiers')\n"
        "print([name for name in heavy if sys.modules.get(name) is not None])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
