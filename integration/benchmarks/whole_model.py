"""All Linears of a model take part, not its experts alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from moe_collab.allocation import Decision
from moe_collab.formats import Scheme
from moe_collab.plan import CompressionPlan

from ..compress import checkpoint_size, mixed_recipe, run_oneshot, uniform_recipe
from .bench import Bench
from .trained import UNIFORM

__all__ = ["whole_model"]


def whole_model(bench: Bench) -> None:
    """All Linears take part; against the better of experts-only and all-Linear uniform GPTQ at their sizes."""
    model = bench.model
    for size, (bits, group) in {s: UNIFORM[s] for s in ("2bit-g128", "3bit-g128", "4bit-g128")}.items():
        path = model.folder / f"all-{size}"
        if not (path / "config.json").exists():
            every = uniform_recipe(bits, group).replace(r"re:.*\.experts\.\d+\.(gate|up|down)_proj$", "Linear")
            # Its 64 inputs are no whole group.
            every = every.replace("[lm_head]", "[lm_head, 're:.*kv_b_proj$']")
            run_oneshot(every, path, model.source)
        bench.add("whole_model", size, "all Linears uniform GPTQ", lambda path=path: bench.disk_row(path))
        budget = checkpoint_size(path)
        bench.add("whole_model", size, "ours", partial(_whole, bench, size, budget))
    quarter = int(checkpoint_size(model.source) / 4.2)
    bench.add("whole_model", "4.2x smaller", "ours", partial(_whole, bench, "4.2x", quarter))
    eight = Decision(dict.fromkeys(model.planner(budget="1TB").experts, Scheme(8, 128)))
    bench.decided("whole_model", "8bit-g128", "experts at 8 bits", lambda: eight)


def _whole(bench: Bench, size: str, budget: int) -> dict[str, Any]:
    path = bench.model.folder / f"whole-{size}"
    plan, costs = path.with_name(f"{path.name}.plan.json"), bench.model.folder / "whole_costs.json"
    plan.unlink(missing_ok=True)
    fields = {"scope": "model", "ignore": [], "plan": str(plan), "costs": str(costs)}
    run_oneshot(mixed_recipe(bench.model.tuning_steps, budget=budget, **fields), path, bench.model.source)
    return bench.disk_row(path) | {"predicted_bytes": CompressionPlan.load(plan).predicted_bytes}
