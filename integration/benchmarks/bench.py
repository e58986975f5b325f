"""The rows of the allocation benchmark for one model: how they are kept, decided, measured and printed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_collab.allocation import CostTable, Decision
from moe_collab.allocation.decide import with_fewer_experts
from moe_collab.calibration import RoundedModel
from moe_collab.calibration.measurements import LiveMeasurements
from moe_collab.evaluation import Evaluation
from moe_collab.rounding import Rounder

from ..compress import checkpoint_size
from .output_errors import output_error_table
from .rows import Rows, ratio_error, standard_error
from .trained import UNIFORM, TrainedModel

__all__ = ["TARGETS", "Bench"]

TARGETS = {
    "qwen3_moe": {"2bit-g128": 0.35, "2bit-g32": 0.28, "3bit-g128": 0.42, "4bit-g128": 0.55},
    "deepseek_v3": {"2bit-g128": 0.55, "2bit-g32": 0.55, "3bit-g128": 0.75},
    "olmoe": {},
}
"""Model -> size -> KL that ours shall have, as a share of uniform GPTQ's. Nothing was ever tuned on olmoe."""


class Bench:
    """Makes the rows of one model and keeps what is there already."""

    def __init__(self, model: TrainedModel) -> None:
        self.model, self.rows = model, Rows(model.folder / "rows.json", _line)

    def add(self, case: str, size: str, method: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row, made now unless an earlier run was cut off after it."""
        return self.rows.add({"case": case, "model": self.model.family, "size": size, "method": method}, make)

    def decide(self, budget: int, form: str = "none", **fields: Any) -> Decision:
        """As MixedBitAllocModifier decides, before it tries that on held-out tokens."""
        model = self.model
        planner = model.planner(budget=budget, pruning=form, **fields)
        if form == "none":
            return planner.cheapest(model.table)
        rounded = RoundedModel(model.calibration, Rounder(scale_dtype=model.live.dtype))
        measured = LiveMeasurements(model.calibration, planner, rounded, "")
        return with_fewer_experts(planner, measured, model.table)

    def decided(
        self,
        case: str,
        size: str,
        method: str,
        decide: Callable[[], Decision | None],
        rounder: Rounder | None = None,
        form: str = "none",
    ) -> None:
        """Add the row of what `decide` returns, rounded and evaluated in memory; None makes a row that says so."""

        def make() -> dict[str, Any]:
            decision = decide()
            if decision is None:
                return {"bytes": None, "kl": None, "path": "memory", "note": "does not fit"}
            size_now = self.model.planner(budget="1TB", pruning=form).file_bytes(decision)
            dropped = sum(map(len, decision.dropped.values()))
            row = self.row(size, size_now, self.model.in_memory(decision, rounder), "memory")
            return row | {"experts_dropped": dropped}

        self.add(case, size, method, make)

    @cached_property
    def error_table(self) -> CostTable:
        """Costs by the paper's lights, measured once."""
        return output_error_table(self.model)

    def disk_row(self, path: Path) -> dict[str, Any]:
        """The columns of a checkpoint, loaded and evaluated."""
        return self.row(None, checkpoint_size(path), self.model.from_disk(path), "disk")

    def row(self, size: str | None, found_bytes: int, found: Evaluation, path: str) -> dict[str, Any]:
        """The columns of an evaluation, with its ratio to uniform GPTQ of this `size`; `path` is disk or memory."""
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
