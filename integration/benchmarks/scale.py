"""What compressing models from disk takes: memory by size of the model, its layers and the tokens, reads, time.

    make bench-scale

writes `build/bench/scale.json` row by row, goes on where an earlier run was cut off (delete a row to measure it anew),
and prints the README's table. Models have random weights of real shapes (shapes.py): they are made, measured in a
process of their own and deleted one at a time. What is read is counted as safetensors is asked for it. Where rounding
all experts would take hours or days, a sample of them is rounded and the rest is arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moe_collab import MoeCollabError

from ..compress import FIXTURE, checkpoint_size
from .expert_speed import EXPERTS, growth_row, speed_row
from .peak import machine
from .rows import Rows
from .sampled import extrapolated
from .scale_jobs import PLANNED, SAMPLED, run_job
from .scale_report import RECIPES, broken_claims, table
from .shapes import DEEPSEEK, GPT_OSS, OLMOE, SMALL, Shape, check_room, make_model
from .ways import WAYS, run_way

NARROW = SMALL.resized(hidden_size=512, num_attention_heads=4, num_key_value_heads=4, num_experts=8)
"""What can be rounded at many layers in the time of a row."""
FAMILIES = ("qwen3_moe", "deepseek_v3")
ROWS = 64
"""Calibration sequences of the rows that compare ways."""


@dataclass(frozen=True)
class Case:
    """A model, and what is done with it."""

    shape: Shape
    recipe: str
    tokens: int
    """For calibration."""
    quantized: str | None = None
    """How the model is stored, if not in bfloat16."""
    serve: bool = False
    """Reload the checkpoint, and compare what vLLM generates from it."""
    sample: int = 0
    """Experts whose costs and rounding are measured before the recipe runs, after statistics and samples of all."""


CASES = {
    "olmoe-4": Case(OLMOE.resized(num_hidden_layers=4), "prune", 2048, serve=True, sample=8),
    "olmoe-16": Case(OLMOE, SAMPLED, 2048, sample=8),
    "deepseek-layer": Case(DEEPSEEK, SAMPLED, 2048, sample=8),
    "olmoe-4-fp8": Case(OLMOE.resized(num_hidden_layers=4), "prune", 2048, "fp8", sample=8),
    "gpt-oss-4": Case(GPT_OSS.resized(num_hidden_layers=4), "prune", 2048, sample=8),
    "gpt-oss-4-mxfp4": Case(GPT_OSS.resized(num_hidden_layers=4), "prune", 2048, "mxfp4", sample=8),
    "deepseek-layer-fp8": Case(DEEPSEEK, SAMPLED, 2048, "fp8", sample=8),
    "gptq-olmoe-layer": Case(OLMOE.resized(num_hidden_layers=1), "stock GPTQ", 8192),
    "ours-olmoe-layer": Case(OLMOE.resized(num_hidden_layers=1), "our rounding", 8192),
    "outputs-olmoe-layer": Case(OLMOE.resized(num_hidden_layers=1), "our rounding, outputs", 8192),
    "plan-outputs": Case(OLMOE.resized(num_hidden_layers=4), PLANNED[0], 8192),
    "plan-nearest": Case(OLMOE.resized(num_hidden_layers=4), PLANNED[1], 0),
    **{
        f"layers-{count}-{how}": Case(shape.resized(num_hidden_layers=count), how, 4096)
        for how, shape in zip(RECIPES, (SMALL, NARROW), strict=True)
        for count in (4, 8, 16)
    },
    **{
        f"tokens-{times}x-{how}": Case(shape, how, 2048 * times)
        for how, shape in zip(RECIPES, (SMALL, NARROW), strict=True)
        for times in (1, 4, 16)
    },
}
EQUAL = [f"equal-{family}" for family in FAMILIES]
GROWTH = "rounding-growth"
ROWS_OF_ALL = [*CASES, *EQUAL, *EXPERTS, GROWTH]


class ScaleBench:
    """Makes rows, each by `run_job` in a process of its own."""

    def __init__(self, output: Path, serve_python: Path | None = None, cases: Mapping[str, Case] = CASES) -> None:
        self._folder, self._serve, self._cases = output / "scale", serve_python, cases
        self._folder.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(output / "scale.json", json.dumps)

    def add(self, name: str) -> None:
        """The row `name`, made now unless it is there. Whatever happens, its files are deleted, but for its logs."""
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        make = self._compressed if name in self._cases else speed_row if name in EXPERTS else self._equal
        try:
            self.rows.add({"row": name}, partial(growth_row, folder) if name == GROWTH else partial(make, name, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _compressed(self, name: str, folder: Path) -> dict[str, Any]:
        case = self._cases[name]
        # Checkpoint and changed weights are smaller than the model, samples much smaller.
        dense = case.shape.num_bytes
        check_room(self._folder, dense * 5 // 4 if case.recipe == SAMPLED else 2 * dense)
        source = make_model(case.shape, folder / "model", quantized=case.quantized)
        size = checkpoint_size(source)
        job: dict[str, Any] = {"source": str(source), "way": "disk"}
        job |= {"recipe": case.recipe, "tokens": case.tokens, "sample": case.sample}
        if case.serve and self._serve:
            job["serve"] = str(self._serve.absolute())
        (found,) = run_way("disk", job, folder, folder)
        if case.sample:
            found.result["sampled"] = extrapolated(found.result["sampled"], found.stages, size)
        compressing = [stage for name, stage in found.stages.items() if name not in ("plain reading", "serve")]
        layers, stored = case.shape.config["num_hidden_layers"], case.quantized or "bf16"
        return {
            "model": f"{case.shape.family}, {layers} layers, {stored}",
            "model_bytes": size,
            "recipe": case.recipe,
            "tokens": case.tokens,
            "peak": max(stage.memory for stage in compressing),
            "mapped": max(stage.mapped for stage in compressing),
            "reads_per_byte": found.result["reads"]["asked"] / size,
            "passes": (found.result["reads"]["asked_of_source"] - found.result["reads"]["at_load"]) / size,
            "wall": sum(stage.seconds for stage in compressing),
            "stages": {name: asdict(stage) for name, stage in found.stages.items()},
            "machine": machine(),
            **found.result,
        }

    def _equal(self, name: str, folder: Path) -> dict[str, Any]:
        source = FIXTURE.with_name(name.removeprefix("equal-"))
        job = {"source": str(source), "recipe": "all", "rows": ROWS, "attention": "eager"}
        found = {way: run_way(way, job, folder / way, folder) for way in WAYS}
        digests = {way: [one.result["digests"] for one in runs] for way, runs in found.items()}
        return {
            "digests": digests,
            "equal": all(one == digests[WAYS[0]][0] for runs in digests.values() for one in runs),
            "steps": found["killed"][0].result["steps"],
            "seconds": {way: sum(one.seconds for one in runs) for way, runs in found.items()},
        }


def main() -> int:
    """Make the rows that are asked for and not there yet, print the table; 0 if all could be made and hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=ROWS_OF_ALL, choices=ROWS_OF_ALL, metavar="ROW")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--serve-python", type=Path, help="python of the environment with vLLM, for rows that serve")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        run_job(options.job, options.output)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that models are deleted then, too
    bench, problems = ScaleBench(options.output, options.serve_python), []
    for name in options.rows:
        try:
            bench.add(name)
        except MoeCollabError as error:  # the others are measured all the same
            problems.append(f"{name}: {error}")
    print(table(bench.rows.rows))
    problems += broken_claims(bench.rows.rows)
    for problem in problems:
        print(f"NOT AS CLAIMED: {problem}", file=sys.stderr)
    return len(problems)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
