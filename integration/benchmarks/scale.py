"""What compressing models from disk takes: memory by size of the model, its layers and the tokens, reads, time.

    make bench-scale

writes `build/bench/scale.json` row by row, goes on where an earlier run was cut off (delete a row to measure it anew),
and prints the README's table. Models have random weights of real shapes (shapes.py): they are made, measured in a
process of their own and deleted one at a time. What is read is counted as safetensors is asked for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.utils import load_context
from loguru import logger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from moe_collab import MoeCollabError
from moe_collab.modifiers.glue.compat import keep_attention_causal

from ..compress import FIXTURE, calibration, checkpoint_size, recipe
from ..served import assert_equal, generate, generate_with_transformers
from .peak import DiskReads, Measured, announce, machine, report, run_measured
from .rows import Rows
from .shapes import DEEPSEEK, OLMOE, SMALL, Shape, check_room, make_model

LIMIT = 40 * 60
"""Seconds that a row may take."""
LENGTH, BATCH = 128, 8
"""Of calibration sequences."""
FLAT = {"layers": 0.05, "tokens": 0.20}
"""How much the peaks of such rows may differ."""
RECIPES = ("prune", "all")
NARROW = SMALL.resized(hidden_size=512, num_attention_heads=4, num_key_value_heads=4)
"""What can be rounded at many layers in the time of a row."""
FAMILIES = ("qwen3_moe", "deepseek_v3")
WAYS = ("memory", "disk")
"""From where the model is read; the checkpoint must not depend on it."""


@dataclass(frozen=True)
class Case:
    """A model, and what is done with it."""

    shape: Shape
    recipe: str
    tokens: int
    """For calibration."""
    serve: bool = False
    """Reload the checkpoint, and compare what vLLM generates from it."""


CASES = {
    "olmoe-4": Case(OLMOE.resized(num_hidden_layers=4), "all", 8192, serve=True),
    "olmoe-16": Case(OLMOE, "prune", 8192),
    "deepseek-layer": Case(DEEPSEEK, "prune", 8192),
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


def steps(name: str, folder: Path) -> str:
    """The recipe `name`, `prune` or `all`, which leaves its files in `folder`."""
    prune = {"ExpertPruningModifier": {"retention": 0.75, "statistics": str(folder / "statistics")}}
    plan = {key: str(folder / f"{key}.json") for key in ("plan", "costs")}
    options = {"bits": [2, 4], "group_size": 128, "symmetric": True}  # few, for time: memory is what is measured
    allocate = {"MixedBitAllocModifier": {"bpw": 3.0} | options | plan}
    quantize = {"FisherGPTQModifier": {"ignore": ["lm_head"]}}
    modifiers: dict[str, list[dict]] = {"prune": [prune], "all": [prune, allocate, quantize]}
    return recipe(*modifiers[name])


def random_tokens(vocabulary: int, tokens: int) -> DataLoader:
    """Calibration sequences of tokens drawn evenly."""
    rows = torch.randint(vocabulary, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(1))
    samples: Any = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    return DataLoader(samples, batch_size=BATCH)


class ScaleBench:
    """Makes rows, each by this module's `run_job` in a process of its own."""

    def __init__(self, output: Path, serve_python: Path | None = None, cases: Mapping[str, Case] = CASES) -> None:
        self._folder, self._serve, self._cases = output / "scale", serve_python, cases
        self._folder.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(output / "scale.json", json.dumps)

    def add(self, name: str) -> None:
        """The row `name`, made now unless it is there. Whatever happens, its files are deleted, but for its logs."""
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        make = self._compressed if name in self._cases else self._equal
        try:
            self.rows.add({"row": name}, partial(make, name, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _compressed(self, name: str, folder: Path) -> dict[str, Any]:
        case = self._cases[name]
        size = case.shape.num_bytes
        check_room(self._folder, 2 * size)  # checkpoint and changed weights are smaller than the model
        job: dict[str, Any] = {"source": str(make_model(case.shape, folder / "model")), "way": "disk"}
        job |= {"recipe": case.recipe, "tokens": case.tokens}
        if case.serve and self._serve:
            job["serve"] = str(self._serve.absolute())
        found = self._run(folder, job)
        compressing = [stage for name, stage in found.stages.items() if name != "serve"]
        return {
            "model": f"{case.shape.family}, {case.shape.config['num_hidden_layers']} layers",
            "model_bytes": size,
            "recipe": case.recipe,
            "tokens": case.tokens,
            "peak": max(stage.memory for stage in compressing),
            "mapped": max(stage.mapped for stage in compressing),
            "reads_per_byte": found.result["reads"]["asked"] / size,
            "wall": sum(stage.seconds for stage in compressing),
            "stages": {name: asdict(stage) for name, stage in found.stages.items()},
            "machine": machine(),
            **found.result,
        }

    def _equal(self, name: str, folder: Path) -> dict[str, Any]:
        source = FIXTURE.with_name(name.removeprefix("equal-"))
        jobs = {way: {"source": str(source), "way": way, "recipe": "all"} for way in WAYS}
        digests = {way: self._run(folder, job).result["digests"] for way, job in jobs.items()}
        return {"digests": digests, "equal": all(found == digests[WAYS[0]] for found in digests.values())}

    def _run(self, folder: Path, job: dict[str, Any]) -> Measured:
        command = [sys.executable, "-m", "integration.benchmarks.scale", "--job", json.dumps(job)]
        log = folder.with_name(f"{folder.name}-{job['way']}.log")
        return run_measured([*command, "--output", str(folder)], log, LIMIT)


def run_job(job: dict[str, Any], folder: Path) -> None:
    """Compress the model `job["source"]`, and report what came of it; all files go to `folder`."""
    logger.remove()
    logger.add(sys.stdout, level="INFO", filter=lambda record: record["level"].name != "METRIC")
    source, work = Path(job["source"]), folder / job["way"]
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    data = random_tokens(vocabulary, job["tokens"]) if "tokens" in job else calibration(model=source)
    reads = DiskReads()
    reads.install()
    announce("load")
    model = load(source, work / "offload" if job["way"] == "disk" else None)
    announce("prepare")
    checkpoint = work / "checkpoint"
    oneshot(model=model, recipe=steps(job["recipe"], work), dataset=data, output_dir=str(checkpoint))
    result = {
        "reads": reads.by_system(),
        "bytes": checkpoint_size(checkpoint),
        "digests": {"checkpoint": digest(checkpoint.glob("*.safetensors")), "plan": digest(work.glob("plan.json"))},
        "threads": torch.get_num_threads(),
    }
    if "serve" in job:
        del model
        announce("serve")
        assert_equal(generate(checkpoint, {}, python=job["serve"]), generate_with_transformers(checkpoint))
        result["served"] = True
    report(result)


def load(source: Path, offload: Path | None) -> Any:
    """The model with its experts linearized, in memory, or all of it on disk if `offload` is a folder for changes."""
    where: dict[str, Any] = {}
    if offload is not None:
        offload.mkdir(parents=True)
        where = {"device_map": "auto_offload", "max_memory": {"cpu": 100_000}, "offload_folder": str(offload)}
    with load_context():
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **where)
    keep_attention_causal(model)
    return model


def digest(files: Iterable[Path]) -> str:
    """Of all their bytes."""
    found = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                found.update(part)
    return found.hexdigest()[:16]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The README's tables, in markdown: what runs took, and which checkpoints are equal."""
    rows = list(rows)
    lines = [
        "| | model | recipe | tokens | checkpoint | peak memory | mapped files | read / size | time |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in (row for row in rows if "peak" in row):
        sizes = " | ".join(f"{row[key] / 1e9:.2f} GB" for key in ("bytes", "peak", "mapped"))
        what = f"{row['row']} | {row['model']}, {row['model_bytes'] / 1e9:.1f} GB | {row['recipe']} | {row['tokens']:,}"
        lines.append(f"| {what} | {sizes} | {row['reads_per_byte']:.1f} | {row['wall'] / 60:.1f} min |")
    machines = dict.fromkeys(f"{row['machine']}, {row['threads']} threads" for row in rows if "peak" in row)
    lines += ["", f"Measured on {'; '.join(machines)}." if machines else ""]
    equal = [row for row in rows if "equal" in row]
    lines += [
        f"{row['row']}: plan and bytes {'equal' if row['equal'] else 'DIFFER'}, {row['digests']}" for row in equal
    ]
    return "\n".join(lines)


def broken_claims(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What should hold and does not: peaks flat by layers and by tokens, equal checkpoints from memory and disk."""
    rows = list(rows)
    problems = [f"{row['row']}: checkpoints differ" for row in rows if not row.get("equal", True)]
    for (kind, share), how in product(FLAT.items(), RECIPES):
        peaks = [r["peak"] for r in rows if r["row"].startswith(f"{kind}-") and r["row"].endswith(f"-{how}")]
        if peaks and max(peaks) > (1 + share) * min(peaks):
            problems.append(f"{kind}, {how}: peaks from {min(peaks):,} to {max(peaks):,} bytes, not within {share:.0%}")
    return problems


def main() -> int:
    """Make the rows that are asked for and not there yet, print the table; 0 if all could be made and hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[*CASES, *EQUAL], choices=[*CASES, *EQUAL], metavar="ROW")
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
