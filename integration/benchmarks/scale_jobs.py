"""What one row of the benchmark of scale measures, in a process of its own: a model compressed from disk."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from loguru import logger
from torch import distributed
from torch.utils.data import DataLoader

from moe_collab import load_linearized, oneshot
from moe_collab.allocation import CostTable, compression_plan
from moe_collab.allocation.decide import Decided
from moe_collab.distributed import is_source_process
from moe_collab.modifiers.glue.compat import keep_attention_causal
from moe_collab.modifiers.glue.outline import model_fingerprint
from moe_collab.modifiers.mixed_bit_alloc import MixedBitAllocModifier

from ..compress import calibration, checkpoint_size, recipe
from ..served import assert_equal, generate, generate_with_transformers
from .baselines import random_ranking
from .peak import DiskReads, announce, report
from .sampled import measure_sampled
from .ways import die_after

__all__ = ["PLANNED", "SAMPLED", "digest", "load", "run_job"]

_FOUR_BITS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
LENGTH, BATCH = 128, 8
"""Of calibration sequences."""
SAMPLED = "sampled"
"""The recipe that changes nothing: all that is measured is a sample of the experts."""


PLANNED = ("plan, rounded for outputs", "plan, rounded to nearest")
"""The recipes that carry out a plan that somebody else has made; the second one without data."""


def run_job(job: dict[str, Any], folder: Path) -> None:
    """Compress the model `job["source"]`, and report what came of it; all files go to `folder`."""
    logger.remove()
    logger.add(sys.stdout, level="INFO", filter=lambda record: record["level"].name != "METRIC")
    source, work = Path(job["source"]), folder / job["way"]
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    data = random_tokens(vocabulary, job["tokens"]) if "tokens" in job else calibration(job["rows"], model=source)
    reads = DiskReads(source)
    reads.install()
    steps_done = die_after(job.get("die_after"))
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    if job["recipe"] in PLANNED:
        announce("plain reading")
        result["reading_seconds"] = _reading_seconds(source)
    announce("load")
    if job["way"] == "torchrun":
        distributed.init_process_group("gloo")
        data = own_share(data)
    model = load(source, work / "offload" if job["way"] == "disk" else None, job.get("attention"))
    at_load = reads.asked_of_source
    if job.get("sample"):
        result["sampled"] = measure_sampled(model, data, job["sample"], work / "scratch", reads)
    if job["recipe"] != SAMPLED:
        result |= _compress(model, job, data, work)
    result["reads"] = reads.by_system() | {"at_load": at_load}
    if "serve" in job:
        del model
        announce("serve")
        checkpoint = work / "checkpoint"
        assert_equal(generate(checkpoint, {}, python=job["serve"]), generate_with_transformers(checkpoint))
        result["served"] = True
    if is_source_process():
        report(result | {"steps": steps_done()})


def _compress(model: Any, job: dict[str, Any], data: DataLoader, work: Path) -> dict[str, Any]:
    """Run the recipe and save to `work`; the size and the digests of what was written."""
    announce("prepare")
    # What a run that is started again finds: its `work` directory, and the files that its recipe names.
    checkpoint, files = work / "checkpoint", Path(f"{job['work']}-files") if "work" in job else work
    if job["recipe"] in PLANNED:
        _write_plan(model, files / "plan.json")
    oneshot(
        model=model,
        recipe=steps(job["recipe"], files),
        dataset=None if job["recipe"] == PLANNED[1] else data,
        output_dir=str(checkpoint),
        work=job.get("work"),
    )
    digests = {"checkpoint": digest(checkpoint.glob("*.safetensors")), "plan": digest(files.glob("plan.json"))}
    return {"bytes": checkpoint_size(checkpoint), "digests": digests}


def _write_plan(model: Any, path: Path) -> None:
    """A plan by somebody who knows no costs, 3 bits per weight: random experts get more of them than others."""
    planner = MixedBitAllocModifier(bpw=3.0).planner(model)
    decision = planner.cheapest(CostTable(), solver=random_ranking(0))
    plan = compression_plan(planner, Decided(decision, CostTable()), model_fingerprint(model), "nobody's")
    plan.save(path)


def _reading_seconds(source: Path) -> float:
    """How long it takes to read the model's files from the disk, and nothing else; they are not in memory after it."""
    seconds = 0.0
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            _forget(file)
            began = time.monotonic()
            while file.read(1 << 24):
                pass
            seconds += time.monotonic() - began
            _forget(file)
    return seconds


def _forget(file: IO[bytes]) -> None:
    """Have the system take the file's pages back."""
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def steps(name: str, folder: Path) -> str:
    """The recipe `name`, which leaves its files in `folder`."""
    prune = {"ExpertPruningModifier": {"retention": 0.75, "statistics": str(folder / "statistics")}}
    plan = {key: str(folder / f"{key}.json") for key in ("plan", "costs")}
    options = {"bits": [2, 4], "group_size": 128, "symmetric": True}  # few, for time: memory is what is measured
    allocate = {"MixedBitAllocModifier": {"bpw": 3.0} | options | plan}
    quantize = {"FisherGPTQModifier": {"ignore": ["lm_head"]}}
    experts = {"targets": ["re:.*\\.experts\\.\\d+\\.(gate|up|down)_proj$"], "weights": _FOUR_BITS}
    alike = {"ignore": ["lm_head"], "config_groups": {"experts": experts}}
    modifiers: dict[str, list[dict]] = {
        "prune": [prune],
        "all": [prune, allocate, quantize],
        "stock GPTQ": [{"GPTQModifier": alike}],
        "our rounding": [{"FisherGPTQModifier": alike}],
        "our rounding, outputs": [{"FisherGPTQModifier": alike | {"objective": "outputs"}}],
    }
    for planned, objective in zip(PLANNED, ("outputs", "weights"), strict=True):
        applied = {"FisherGPTQModifier": {"ignore": ["lm_head"], "objective": objective}}
        modifiers[planned] = [{"MixedBitAllocModifier": {"plan": plan["plan"]}}, applied]
    return recipe(*modifiers[name])


def random_tokens(vocabulary: int, tokens: int) -> DataLoader:
    """Calibration sequences of tokens drawn evenly."""
    rows = torch.randint(vocabulary, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(1))
    samples: Any = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    return DataLoader(samples, batch_size=BATCH)


def own_share(data: DataLoader) -> DataLoader:
    """Whole batches for this process, which come after those of the process before it."""
    samples: Any = data.dataset
    own = len(samples) // BATCH // distributed.get_world_size() * BATCH
    return DataLoader(samples[distributed.get_rank() * own :][:own], batch_size=BATCH)


def load(source: Path, offload: Path | None, attention: str | None = None) -> Any:
    """The model with its experts linearized, in memory, or all of it on disk if `offload` is a folder for changes."""
    model = load_linearized(source, offload_folder=offload)
    if attention is not None:
        model.set_attn_implementation(attention)
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
