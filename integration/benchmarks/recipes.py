"""What the shipped recipes and the README's give on both trained fixtures: bytes, their digest, KL.

    make bench-recipes

Budgets are written for models of 61 and 1300 GB, so each is replaced by a share of the fixture's size. Two versions of
this package make the same checkpoints if `sha256` is equal; on another machine, or with another number of threads,
sums differ in their last bits and the digests with them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

import moe_collab
from moe_collab import MoeCollabError
from moe_collab.evaluation import evaluate, log_probabilities

from ..compress import FIXTURE, calibration, checkpoint_size, log_warnings_only, run_oneshot, tokens

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen3_moe", "deepseek_v3")
SHARE = {"qwen3_moe": 0.28, "deepseek_v3": 0.3}
"""Of the fixture's bytes: about 3 bits per expert weight once a quarter of the experts is gone."""


def recipes() -> dict[str, dict[str, Any]]:
    """Name -> recipe, the README's first."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found = {"README": yaml.safe_load(next(block for block in blocks if "compress_stage" in block))}
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        found[f"{path.parent.name}/{path.stem}"] = yaml.safe_load(path.read_text())
    return found


def fitted(recipe: dict[str, Any], source: Path) -> str:
    """The recipe with its budget scaled to the fixture, without files of its own."""
    for stage in recipe.values():
        for group in stage.values():
            for name, fields in group.items():
                if name == "MixedBitAllocModifier":
                    fields.pop("plan", None)
                    fields.pop("costs", None)
                    if "budget" in fields:
                        fields["budget"] = int(SHARE[source.name] * checkpoint_size(source))
    return yaml.safe_dump(recipe, sort_keys=False)


def measure(
    name: str, recipe: dict[str, Any], family: str, folder: Path, base: torch.Tensor, rows: int
) -> dict[str, Any]:
    """Run one recipe on one fixture; a row of the table, with the reason if the recipe does not fit the model."""
    source, output = FIXTURE.with_name(family), folder / f"{family}-{name.replace('/', '-')}"
    started = time.monotonic()
    try:
        run_oneshot(fitted(recipe, source), output, source, calibration(rows, model=source))
    except MoeCollabError as error:
        return {"recipe": name, "model": family, "refused": str(error)}
    seconds = time.monotonic() - started
    digest = hashlib.sha256()
    for file in sorted(output.glob("*.safetensors")):
        digest.update(file.read_bytes())
    found = evaluate(moe_collab.load(output, dtype=torch.float32), tokens("test", source), base)
    return {
        "recipe": name,
        "model": family,
        "bytes": checkpoint_size(output),
        "kl": round(found.kl, 5),
        "top1": round(found.top1, 5),
        "sha256": digest.hexdigest()[:16],
        "seconds": round(seconds),
    }


def main() -> None:
    """Measure every recipe on every fixture, write the rows, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=FAMILIES)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--rows", type=int, default=64, help="calibration sequences of 128 tokens")
    options = parser.parse_args()
    log_warnings_only()
    rows = []
    for family in options.models:
        source = FIXTURE.with_name(family)
        base = log_probabilities(moe_collab.load(source, dtype=torch.float32), tokens("test", source))
        for name, recipe in tqdm(recipes().items(), desc=family, unit="recipe"):
            rows.append(measure(name, recipe, family, options.output / "recipes", base, options.rows))
            (options.output / "recipes.json").write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
