"""How good allocations are at equal bytes, on both trained models, and how fast the solver is.

    make bench-allocation

writes `build/bench/allocation.json`. Rows with path `disk` went through oneshot(), the checkpoint and
`moe_collab.load()`; rows with path `memory` have their sizes predicted, which is exact, and the same rounding without
tuning: they compare with our row without tuning. Nothing is tuned or chosen on the test tokens.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scipy.stats import spearmanr

from moe_collab.calibration import (
    float32_weights,
    log_probabilities,
    mean_kl,
    replaced_weights,
    round_model,
)
from moe_collab.calibration import study as study_module
from moe_collab.calibration.costs import CostTable
from moe_collab.calibration.moments import second_moments
from moe_collab.evaluation import Evaluation, evaluate
from moe_collab.formats import TERNARY, Scheme
from moe_collab.modifiers.planner import Decision, Planner
from moe_collab.modifiers.search import Search
from moe_collab.plan import CompressionPlan
from moe_collab.rounding import Rounder

from ..compress import (
    checkpoint_size,
    log_warnings_only,
    mixed_recipe,
    run_oneshot,
    tokens,
    uniform_recipe,
)
from .baselines import ends_rule, paper_greedy, random_ranking
from .codebook import BITS_PER_WEIGHT, codebook_bytes, codebook_weights
from .output_errors import output_error_table
from .rows import Rows, ratio_error, standard_error
from .solver import solver_rows
from .trained import BELOW, BITS, GROUPS, UNIFORM, TrainedModel

SEEDS = 3
TARGETS = {
    "qwen3_moe": {"2bit-g128": 0.35, "2bit-g32": 0.28, "3bit-g128": 0.42, "4bit-g128": 0.55},
    "deepseek_v3": {"2bit-g128": 0.55, "2bit-g32": 0.55, "3bit-g128": 0.75},
}
ABLATED = ("2bit-g128", "3bit-g128")
COSTS_SAMPLED = 40
PARTS = ["main", "baselines", "ablation", "costs", "whole", "codebook", "pruning", "solver"]


class Bench:
    """Makes the rows of one model and keeps what is there already."""

    def __init__(self, model: TrainedModel) -> None:
        self.model, self.rows = model, Rows(model.folder / "rows.json", _line)

    def add(self, case: str, size: str, method: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row, made now unless an earlier run was cut off after it."""
        return self.rows.add({"case": case, "model": self.model.family, "size": size, "method": method}, make)

    def run(self, sizes: list[str], parts: list[str]) -> None:
        """All rows, the main table first."""
        for size in sizes:
            if size != BELOW:
                self.add("allocation", size, "uniform GPTQ", partial(self._uniform, size))
        forms = ["none", "physical", *(["masked"] * self.model.moe.family.grouped)]
        for size in sizes if "main" in parts else ():
            self.add("allocation", size, "ours, pruning none", partial(self._ours, size))
        for size in sizes if "baselines" in parts else ():
            self._baselines(size, forms)
        for size in (s for s in ABLATED if s in sizes and "ablation" in parts):
            self._ablation(size)
        if "costs" in parts:
            self.add("costs", "", "rank correlation", self._rank_correlation)
        if "whole" in parts:
            self._whole_model()
        if "codebook" in parts:
            self._codebook()
        for form, size in product(forms[1:] if "pruning" in parts else (), sizes):
            self.add("allocation", size, f"ours, pruning {form}", partial(self._ours_pruned, size, form))

    def _ours_pruned(self, size: str, form: str) -> dict[str, Any]:
        """The same as with pruning none where the same is decided: most sizes leave no reason to drop an expert."""
        budget, none = self.model.budget(size), "ours, pruning none"
        pruned, whole = self._decide(budget, form), self._decide(budget)
        if pruned.dropped or pruned.schemes != whole.schemes:
            return self._ours(size, pruning=form)
        same = self.add("allocation", size, none, partial(self._ours, size))
        return {key: value for key, value in same.items() if key not in ("method", "seconds")} | {"same_as": none}

    def _ours(self, size: str, **fields: Any) -> dict[str, Any]:
        path = self.model.folder / f"ours-{size}-{fields.get('pruning', 'none')}"
        plan = path.with_name(f"{path.name}.plan.json")
        plan.unlink(missing_ok=True)
        budget, costs = self.model.budget(size), str(self.model.costs)
        recipe = mixed_recipe(self.model.tuning_steps, budget=budget, plan=str(plan), costs=costs, **fields)
        run_oneshot(recipe, path, self.model.source)
        decided = CompressionPlan.load(plan)
        row = self._row(size, checkpoint_size(path), self.model.from_disk(path), "disk")
        row["tuning_steps"] = self.model.tuning_steps
        kept = {"predicted_kl": decided.predicted_kl, "bound_kl": decided.bound_kl, "heldout_kl": decided.heldout_kl}
        dropped = sum(map(len, decided.dropped.values()))
        return row | kept | {"predicted_bytes": decided.predicted_bytes, "experts_dropped": dropped}

    def _uniform(self, size: str) -> dict[str, Any]:
        path, found = self.model.uniform(size)
        return self._row(size, checkpoint_size(path), found, "disk")

    def _baselines(self, size: str, forms: list[str]) -> None:
        model, budget = self.model, self.model.budget(size)
        planner = model.planner(budget=budget)
        for form in forms:
            decide = partial(self._decide, budget, form)
            self._decided("allocation", size, f"ours, pruning {form}, untuned", decide, form=form)
        greedy = partial(planner.decide, self.error_table, solver=paper_greedy)
        self._decided("allocation", size, "paper greedy", greedy)
        same = partial(planner.decide, model.table, solver=paper_greedy)
        self._decided("allocation", size, "greedy with our costs", same)
        for seed in range(SEEDS):
            draw = partial(planner.decide, model.table, solver=random_ranking(seed))
            self._decided("allocation", size, f"random {seed}", draw)
        self._decided("allocation", size, "1/8 ends", partial(self._ends, planner, budget))

    def _decide(self, budget: int, form: str = "none", **fields: Any) -> Decision:
        """As MixedBitAllocModifier decides, before it tries that on held-out tokens."""
        model = self.model
        planner = model.planner(budget=budget, pruning=form, **fields)
        if form == "none":
            return planner.decide(model.table)
        search = Search(model.live, model.moe, planner, planner.recipe, Rounder(scale_dtype=model.live.dtype))
        return search.with_fewer_experts(model.table, model.batches)

    def _ends(self, planner: Planner, budget: int) -> Decision | None:
        best = None
        for group in GROUPS:
            ladder = [Scheme(TERNARY, group), *(Scheme(bits, group) for bits in (2, 3, 4, 5, 6))]
            fits = lambda schemes: planner.layout.file_bytes(schemes) <= budget  # noqa: E731
            schemes = ends_rule(self.model.moe, sorted(planner.experts), ladder, fits)
            size = 0 if schemes is None else planner.layout.file_bytes(schemes)
            if schemes is not None and (best is None or size > best[0]):
                best = size, schemes
        return None if best is None else Decision(best[1])

    def _decided(
        self,
        case: str,
        size: str,
        method: str,
        decide: Callable[[], Decision | None],
        rounder: Rounder | None = None,
        form: str = "none",
    ) -> None:
        def make() -> dict[str, Any]:
            decision = decide()
            if decision is None:
                return {"bytes": None, "kl": None, "path": "memory", "note": "does not fit"}
            size_now = self.model.planner(budget="1TB", pruning=form).file_bytes(decision)
            dropped = sum(map(len, decision.dropped.values()))
            row = self._row(size, size_now, self.model.in_memory(decision, rounder), "memory")
            return row | {"experts_dropped": dropped}

        self.add(case, size, method, make)

    def _ablation(self, size: str) -> None:
        """Ours without tuning and pruning, less one ingredient each."""
        budget = self.model.budget(size)
        decide = partial(self._decide, budget)
        self._decided("ablation", size, "all, untuned, no pruning", decide)
        for method, fields in {
            "without ternary": {"bits": BITS[1:]},
            "without 5, 6 and 8 bits": {"bits": BITS[:4]},
            "groups of 128 only": {"group_size": 128},
            "symmetric only": {"symmetric": True},
            "one scheme for an expert": {"granularity": "expert"},
        }.items():
            self._decided("ablation", size, method, partial(decide, **fields))
        rounding = {
            "rounding without Fisher weights": mock.patch.object(study_module, "second_moments", _unweighted),
            "rounding without feedback within experts": mock.patch.object(study_module, "FEW_TOKENS", 1 << 60),
            "rounding without coordinate descent": mock.patch.object(
                Rounder, "_descend", lambda self, rows, moments, grid: None
            ),
        }
        for method, patch in rounding.items():
            with patch:
                self._decided("ablation", size, method, decide)
        planner = self.model.planner(budget=budget)
        self._decided("ablation", size, "costs without Fisher", partial(planner.decide, self.error_table))
        scheme = Scheme(*UNIFORM[size], False)
        uniform = Decision(dict.fromkeys(planner.experts, scheme))
        self._decided("ablation", size, "no allocation: uniform, our rounding", lambda: uniform)

    @cached_property
    def error_table(self) -> CostTable:
        """Costs by the paper's lights, measured once."""
        return output_error_table(self.model)

    def _rank_correlation(self) -> dict[str, Any]:
        """Predicted against measured KL of rounding one expert's half, on selection tokens."""
        model, generator = self.model, torch.Generator().manual_seed(0)
        heldout = [{"input_ids": ids} for ids in tokens("selection", model.source)[:64].split(16)]
        predicted, measured, errors = [], [], []
        rounder = Rounder(scale_dtype=model.live.dtype)
        schemes = [Scheme(TERNARY, 128), Scheme(2, 128), Scheme(3, 128)]
        with float32_weights(model.live), torch.no_grad():
            base = [log_probabilities(model.live, batch) for batch in heldout]
        for _ in range(COSTS_SAMPLED):
            layer = model.moe.layers[int(torch.randint(len(model.moe.layers), (), generator=generator))]
            index = int(torch.randint(layer.num_experts, (), generator=generator))
            scheme = schemes[int(torch.randint(len(schemes), (), generator=generator))]
            half = ("gate_proj", "up_proj") if bool(torch.randint(2, (), generator=generator)) else ("down_proj",)
            chosen = {f"{layer.experts_name}.{index}.{projection}": scheme for projection in half}
            moe = replace(model.moe, layers=(layer,))
            with float32_weights(model.live):
                grids = round_model(model.live, moe, chosen, model.batches[:8], rounder)
                weights = {model.live.get_submodule(n).weight: grid.values()[0] for n, grid in grids.items()}
                with replaced_weights(weights):
                    measured.append(mean_kl(model.live, heldout, base))
            predicted.append(sum(model.table.cost(name, scheme) for name in chosen))
            errors.append(sum(self.error_table.cost(name, scheme) for name in chosen))
        return {
            "sampled": COSTS_SAMPLED,
            "spearman": round(float(spearmanr(predicted, measured).statistic), 4),
            "spearman_without_fisher": round(float(spearmanr(errors, measured).statistic), 4),
            "predicted_over_measured": round(sum(predicted) / sum(measured), 4),
            "kl": None,
        }

    def _codebook(self) -> None:
        """A vector codebook of 1.5 bits against ternary, alike for all experts."""
        model = self.model
        layout = model.planner(budget="1TB").layout
        names = sorted(model.planner(budget="1TB").experts)
        ternary = dict.fromkeys(names, Scheme(TERNARY, 128))
        weights = sum(model.live.get_submodule(name).weight.numel() for name in names)
        rest = layout.file_bytes(ternary) - sum(layout.size(name, s, header=False) for name, s in ternary.items())
        size = rest + int(weights * BITS_PER_WEIGHT / 8) + codebook_bytes()
        for method, feedback in (("codebook, nearest", False), ("codebook, error feedback", True)):

            def make(feedback: bool = feedback) -> dict[str, Any]:
                found = codebook_weights(model.live, model.moe, model.batches, feedback)
                with float32_weights(model.live):
                    replaced = {model.live.get_submodule(name).weight: value for name, value in found.items()}
                    with replaced_weights(replaced):
                        return self._row(None, size, evaluate(model.live, model.test, model.base), "memory")

            self.add("codebook", BELOW, method, make)
        for method, rounder in {
            "ternary-g128, nearest": Rounder(feedback=False),
            "ternary-g128, error feedback": Rounder(descent=False),
            "ternary-g128, our rounding": Rounder(),
        }.items():
            self._decided("codebook", BELOW, method, partial(Decision, ternary), rounder)

    def _whole_model(self) -> None:
        """All Linears take part; against the better of experts-only and all-Linear uniform GPTQ at their sizes."""
        model = self.model
        for size, (bits, group) in {s: UNIFORM[s] for s in ("2bit-g128", "3bit-g128", "4bit-g128")}.items():
            path = model.folder / f"all-{size}"
            if not (path / "config.json").exists():
                every = uniform_recipe(bits, group).replace(r"re:.*\.experts\.\d+\.(gate|up|down)_proj$", "Linear")
                # Its 64 inputs are no whole group.
                every = every.replace("[lm_head]", "[lm_head, 're:.*kv_b_proj$']")
                run_oneshot(every, path, model.source)
            self.add("whole_model", size, "all Linears uniform GPTQ", lambda path=path: self._disk_row(path))
            budget = checkpoint_size(path)
            self.add("whole_model", size, "ours", partial(self._whole, size, budget))
        quarter = int(checkpoint_size(model.source) / 4.2)
        self.add("whole_model", "4.2x smaller", "ours", partial(self._whole, "4.2x", quarter))
        eight = Decision(dict.fromkeys(model.planner(budget="1TB").experts, Scheme(8, 128)))
        self._decided("whole_model", "8bit-g128", "experts at 8 bits", lambda: eight)

    def _whole(self, size: str, budget: int) -> dict[str, Any]:
        path = self.model.folder / f"whole-{size}"
        plan, costs = path.with_name(f"{path.name}.plan.json"), self.model.folder / "whole_costs.json"
        plan.unlink(missing_ok=True)
        fields = {"scope": "model", "ignore": [], "plan": str(plan), "costs": str(costs)}
        run_oneshot(mixed_recipe(self.model.tuning_steps, budget=budget, **fields), path, self.model.source)
        return self._disk_row(path) | {"predicted_bytes": CompressionPlan.load(plan).predicted_bytes}

    def _disk_row(self, path: Path) -> dict[str, Any]:
        return self._row(None, checkpoint_size(path), self.model.from_disk(path), "disk")

    def _row(self, size: str | None, found_bytes: int, found: Evaluation, path: str) -> dict[str, Any]:
        original = self.model.original
        row = {
            "bytes": found_bytes,
            "kl": found.kl,
            "kl_error": standard_error(found.kl_by_row),
            "perplexity": found.perplexity,
            "top1": found.top1,
            "accuracy_loss": 1 - found.accuracy / original.accuracy,
            "path": path,
        }
        if size in UNIFORM:
            uniform = self.model.uniform(size)[1]
            row["ratio"] = found.kl / uniform.kl
            row["ratio_error"] = ratio_error(found.kl_by_row, uniform.kl_by_row)
        return row


def _unweighted(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return second_moments(inputs, torch.ones_like(gradients))


def _line(row: dict[str, Any]) -> str:
    head = f"{row['model']:12} {row['size']:10} {row['method']:42}"
    if row.get("kl") is None:
        rest = {k: v for k, v in row.items() if k not in ("case", "model", "size", "method")}
        return f"{head} {rest}"
    text = f"{head} {row['bytes']:>9,} KL {row['kl']:.4f}±{row['kl_error']:.4f} ppl {row['perplexity']:.3f}"
    text += f" top-1 {row['top1']:.2%} accuracy {-row['accuracy_loss']:+.2%}"
    if "ratio" in row:
        target = TARGETS[row["model"]].get(row["size"])
        text += f" ratio {row['ratio']:.3f}±{row['ratio_error']:.3f}" + (f" (target {target})" if target else "")
    return f"{text} {row['seconds']} s"


def main() -> None:
    """Run what is asked for and not yet there; then write all rows together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(TARGETS))
    parser.add_argument("--sizes", nargs="*", default=[*UNIFORM, BELOW])
    parser.add_argument("--parts", nargs="*", default=PARTS)
    parser.add_argument("--tuning-steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    log_warnings_only()
    for family in options.models:
        Bench(TrainedModel(family, options.output, options.tuning_steps)).run(options.sizes, options.parts)
    files = sorted((options.output / "allocation").glob("*/rows.json"))
    rows = [row for file in files for row in json.loads(file.read_text())]
    if "solver" in options.parts:
        solver = options.output / "allocation" / "solver.json"
        solver.write_text(json.dumps(solver_rows(), indent=1))
    for file in (options.output / "allocation").glob("solver.json"):
        rows += json.loads(file.read_text())
    (options.output / "allocation.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{options.output}/allocation.json: {len(rows)} rows")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
