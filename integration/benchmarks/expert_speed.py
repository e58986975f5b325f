"""How long rounding one expert of a large model takes, and the costs of all schemes, beside an old engine."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch

from moe_collab import MoeCollabError

from .peak import Measured, machine, run_measured

__all__ = ["EXPERTS", "growth_row", "speed_row"]

BASELINE = "0c77406"
"""The commit to compare with: torch's loops, a second moment for each quarter of the rows, a rounding for each cost."""
EXPERTS = {"expert-qwen3-30b": (2048, 768, 48 * 128), "expert-deepseek-v3": (7168, 2048, 58 * 256)}
"""Row -> (H, I, experts of the model)."""
GROWTH = (512, 1024, 2048, 4096, 7168)
"""Columns of the matrices whose rounding shows how time and memory grow."""
TOKENS = 8192
"""As many as are kept of an expert."""
STAGES = ("moments", "rounding", "costs")
_LIMIT = 40 * 60


def speed_row(name: str, folder: Path) -> dict[str, Any]:
    """Both engines on the expert `name`, and what all experts of its model would take; processor seconds."""
    hidden, inner, experts = EXPERTS[name]
    shapes = [[2 * inner, hidden], [hidden, inner]]
    job = {"shapes": shapes, "tokens": TOKENS, "costs": True}
    new = _run(job, Path.cwd(), folder / "new.log").result
    old = _run(job, _baseline(folder / "baseline"), folder / "old.log").result
    return {
        "shapes": shapes,
        "old": old,
        "new": new,
        "rounding_ratio": new["rounding"] / old["rounding"],
        "all_ratio": sum(new[stage] for stage in STAGES) / sum(old[stage] for stage in STAGES),
        "costs_per_rounding": new["costs"] / (new["moments"] + new["rounding"]),
        "share_of_peak": _operations(shapes) / new["rounding"] / new["operations_per_second"],
        "core_hours": {stage: new[stage] * experts / 3600 for stage in STAGES},
        "machine": machine(),
    }


def _operations(shapes: list[list[int]]) -> float:
    """Of rounding R x C weights: C^3 / 3 for the factorization, and products of R x C x C.

    These are half a one for feedback, one for the first slope, and three and a half for four sweeps: five.
    """
    return sum(columns**3 / 3 + 5 * 2 * rows * columns**2 for rows, columns in shapes)


def growth_row(folder: Path) -> dict[str, Any]:
    """Seconds and bytes of rounding 1,024 rows of more and more columns, and the power by which they grow."""
    found = {}
    for columns in GROWTH:
        measured = _run({"shapes": [[1024, columns]], "tokens": 1024, "costs": False}, Path.cwd(), folder / "log")
        stages, start = measured.stages, measured.stages["start"].memory
        found[columns] = measured.result["rounding"], stages["rounding"].memory - start
    logs = torch.tensor([[columns, *pair] for columns, pair in found.items()]).log()
    logs -= logs.mean(0)
    time, memory = (logs[:, 0] @ logs[:, 1:] / logs[:, 0].square().sum()).tolist()
    seconds, sizes = zip(*found.values(), strict=True)
    grown = {"columns": GROWTH, "rounding_seconds": seconds, "bytes": sizes}
    return {"grown": grown | {"time_exponent": time, "memory_exponent": memory}, "machine": machine()}


def _run(job: dict[str, Any], sources: Path, log: Path) -> Measured:
    program = Path(__file__).with_name("expert_job.py")
    command = ["env", f"PYTHONPATH={sources}", sys.executable, "-P", str(program), json.dumps(job)]
    return run_measured(command, log, _LIMIT)


def _baseline(folder: Path) -> Path:
    """The package as it was at `BASELINE`, from this repository's history."""
    archived = subprocess.run(["git", "archive", BASELINE, "moe_collab"], capture_output=True)
    if archived.returncode:
        raise MoeCollabError(
            f"the engine to compare with is not at hand ({archived.stderr.decode().strip()}): run this in a clone with "
            f"its whole history, `git fetch --unshallow`, which has commit {BASELINE}."
        )
    with tarfile.open(fileobj=io.BytesIO(archived.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder
