"""What works for which family, on tiny random models: pruning, saving, reloading, serving.

    make bench-families

Writes `build/bench/families.json`, a row for each family, and the table in README.md. If families are named on the
command line, only they are checked anew.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import moe_collab
from moe_collab.checkpoint.load import write_dense_twin
from moe_collab.checkpoint.reader import Checkpoint
from moe_collab.moe_model import describe
from moe_collab.plan import CompressionPlan

from .compress import checkpoint_size, log_warnings_only, recipe, run_oneshot
from .served import MLA, TOLERANCE, assert_equal, generate, generate_with_transformers
from .tiny_models import TINY_FAMILIES, build_tiny, model_class

__all__ = ["Row", "check", "check_serving", "readme_rows", "table"]

README = Path(__file__).parents[1] / "README.md"
_HEADER = ("family", "prune", "save", "reload exact", "serve")
_RELOAD_TOLERANCE = 1e-5
_BF16_TOLERANCE = 0.05


@dataclass
class Row:
    """What was found of one family; `reason` says why something is missing."""

    family: str
    prune: bool = False
    """The model, the saved config and the checkpoint have 6 of 8 experts."""
    save: bool = False
    """The checkpoint passed its verification and has the size that the plan predicted."""
    reload: bool = False
    """Reloaded in float32 it gives the logits of the compressed model in memory."""
    reload_error: float | None = None
    """Largest difference between those logits."""
    serve: bool = False
    """vLLM generates the tokens of the dequantized weights, with their log-probabilities."""
    reason: str | None = None


def check(family: str, folder: Path) -> tuple[Row, Path]:
    """Prune, allocate, quantize, save and reload a tiny `family` model; what was found, and the checkpoint."""
    source, plan, output = build_tiny(family, folder / "source"), folder / "plan.json", folder / "compressed"
    model = run_oneshot(_recipe(plan), output, source, _samples(), model_class(family))
    moe, row = describe(model), Row(family)
    saved = Checkpoint(output)
    text = saved.config.get("text_config", saved.config)
    counts = {text[key] for key in moe.family.num_experts_keys if key in text}
    row.prune = {moe.num_experts} == counts == {6} and not any(".experts.6." in name for name in saved.names())
    row.save = checkpoint_size(output) == CompressionPlan.load(plan).predicted_bytes
    row.reload_error = _difference(model.float(), moe_collab.load(output, torch.float32))
    row.reload = row.reload_error <= _RELOAD_TOLERANCE
    return row, output


def _recipe(plan: Path) -> str:
    return recipe(
        {"ExpertPruningModifier": {"retention": 0.75}},
        {"MixedBitAllocModifier": {"bpw": 4.0, "bits": [2, 3, 4, 8], "group_size": 32, "plan": str(plan)}},
        {"GPTQModifier": {"ignore": ["lm_head"]}},
    )


def _samples() -> DataLoader:
    rows = torch.randint(0, 250, (16, 32), generator=torch.Generator().manual_seed(1))
    return DataLoader([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows], batch_size=4)


@torch.no_grad()
def _difference(live: Any, reloaded: Any) -> float:
    ids = torch.arange(40)[None] * 5
    return float((live(ids).logits - reloaded(ids).logits).abs().max())


def check_serving(checkpoint: Path, python: Path) -> None:
    """Serve `checkpoint` with the vLLM of `python`'s environment.

    Raises `RuntimeError` if vLLM fails, and `AssertionError` if it generates something else than the dequantized
    weights do: in transformers, or, where vLLM's attention on CPUs is not transformers', in vLLM too.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    options, tolerance = {}, TOLERANCE
    if "kv_lora_rank" in config:
        options = MLA
    elif "linear_num_key_heads" in config:
        options, tolerance = {"dtype": "bfloat16"}, _BF16_TOLERANCE  # all that linear attention is there for
    found = generate(checkpoint, options, python=python)
    if options:
        with tempfile.TemporaryDirectory() as twin:
            write_dense_twin(checkpoint, twin, getattr(torch, options.get("dtype", "float32")))
            expected = generate(Path(twin), options, python=python)
    else:
        expected = generate_with_transformers(checkpoint)
    assert_equal(found, expected, tolerance)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [_HEADER, ("---", *(":-:" for _ in _HEADER[1:]))]
    lines += [(r.family, *("yes" if done else "" for done in (r.prune, r.save, r.reload, r.serve))) for r in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def readme_rows() -> list[Row]:
    """The rows of README.md's table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _readme_table().splitlines()[2:]]
    return [
        Row(name, prune == "yes", save == "yes", reload == "yes", serve=serve == "yes")
        for name, prune, save, reload, serve in rows
    ]


def _readme_table() -> str:
    text = README.read_text()
    start = text.index(f"| {' | '.join(_HEADER)} |")
    return text[start : text.index("\n\n", start) + 1]


def main() -> None:
    """Check every family, write the JSON file and README.md's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=TINY_FAMILIES, metavar="FAMILY")
    parser.add_argument("--serve-python", type=Path, required=True, help="python of the environment with vLLM")
    parser.add_argument("--output", type=Path, default=Path("build/bench/families.json"))
    options = parser.parse_args()
    log_warnings_only()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.output.read_text()) if options.output.exists() else []
    rows = {row["family"]: Row(**row) for row in known}
    for family in tqdm(options.families, unit="family"):
        rows[family] = _row(family, options.serve_python.absolute())
        ordered = [rows[name] for name in TINY_FAMILIES if name in rows]
        options.output.write_text(json.dumps([asdict(row) for row in ordered], indent=1) + "\n")
        README.write_text(README.read_text().replace(_readme_table(), table(ordered)))
    print(table(ordered))


def _row(family: str, python: Path) -> Row:
    row = Row(family)
    with tempfile.TemporaryDirectory() as folder:
        try:
            row, checkpoint = check(family, Path(folder))
            check_serving(checkpoint, python)
            row.serve = True
        except Exception as error:  # whatever a family does not support is what this finds out
            row.reason = _first_error(str(error))
    return row


def _first_error(text: str) -> str:
    """What went wrong at first, of a log or a message; wrappers of other errors come last."""
    lines = [line for line in text.strip().splitlines() if "WARNING" not in line]
    named = [found[0] for line in lines if (found := re.search(r"\w+Error: .+", line))]
    own = [error for error in named if not error.startswith(("CalledProcessError", "EngineDeadError", "RuntimeError"))]
    return (own or named or lines or ["no message"])[0]


if __name__ == "__main__":
    main()
