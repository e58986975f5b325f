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
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from moe_collab.allocation import Decision, Planner
from moe_collab.formats import TERNARY, Scheme
from moe_collab.plan import CompressionPlan

from ..compress import checkpoint_size, log_warnings_only, mixed_recipe, run_oneshot
from .ablations import ablation, rank_correlation
from .baselines import ends_rule, paper_greedy, random_ranking
from .bench import TARGETS, Bench
from .codebook import codebook_rows
from .solver import solver_rows
from .trained import BELOW, GROUPS, UNIFORM, TrainedModel
from .whole_model import whole_model

SEEDS = 3
ABLATED = ("2bit-g128", "3bit-g128")
PARTS = ["main", "baselines", "ablation", "costs", "whole", "codebook", "pruning", "solver"]


class AllocationBench(Bench):
    """The parts that `--parts` names: our allocation, uniform GPTQ, other rules, and what is in the other modules."""

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
            ablation(self, size)
        if "costs" in parts:
            self.add("costs", "", "rank correlation", partial(rank_correlation, self))
        if "whole" in parts:
            whole_model(self)
        if "codebook" in parts:
            codebook_rows(self)
        for form, size in product(forms[1:] if "pruning" in parts else (), sizes):
            self.add("allocation", size, f"ours, pruning {form}", partial(self._ours_pruned, size, form))

    def _ours_pruned(self, size: str, form: str) -> dict[str, Any]:
        """The same as with pruning none where the same is decided: most sizes leave no reason to drop an expert."""
        budget, none = self.model.budget(size), "ours, pruning none"
        pruned, whole = self.decide(budget, form), self.decide(budget)
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
        row = self.row(size, checkpoint_size(path), self.model.from_disk(path), "disk")
        row["tuning_steps"] = self.model.tuning_steps
        kept = {"predicted_kl": decided.predicted_kl, "bound_kl": decided.bound_kl, "heldout_kl": decided.heldout_kl}
        dropped = sum(map(len, decided.dropped.values()))
        return row | kept | {"predicted_bytes": decided.predicted_bytes, "experts_dropped": dropped}

    def _uniform(self, size: str) -> dict[str, Any]:
        path, found = self.model.uniform(size)
        return self.row(size, checkpoint_size(path), found, "disk")

    def _baselines(self, size: str, forms: list[str]) -> None:
        model, budget = self.model, self.model.budget(size)
        planner = model.planner(budget=budget)
        for form in forms:
            decide = partial(self.decide, budget, form)
            self.decided("allocation", size, f"ours, pruning {form}, untuned", decide, form=form)
        greedy = partial(planner.cheapest, self.error_table, solver=paper_greedy)
        self.decided("allocation", size, "paper greedy", greedy)
        same = partial(planner.cheapest, model.table, solver=paper_greedy)
        self.decided("allocation", size, "greedy with our costs", same)
        for seed in range(SEEDS):
            draw = partial(planner.cheapest, model.table, solver=random_ranking(seed))
            self.decided("allocation", size, f"random {seed}", draw)
        self.decided("allocation", size, "1/8 ends", partial(self._ends, planner, budget))

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
        AllocationBench(TrainedModel(family, options.output, options.tuning_steps)).run(options.sizes, options.parts)
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
