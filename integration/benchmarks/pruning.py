"""What losing experts costs the two trained models: by criterion, form and activated experts, calibrated or not.

    make bench-pruning

writes `build/bench/pruning.json`. Every row went through oneshot(), the checkpoint and `moe_collab.load()`, but stock
REAP's, which is measured as oneshot() leaves it in memory: its checkpoints of DeepSeek-V3 cannot be read back.
`delta_nll` is to the original model, in nats per token. Nothing is tuned or chosen on the test tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.utils import load_context
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from moe_collab.calibration import float32_weights
from moe_collab.checkpoint.load import stock_conversions
from moe_collab.evaluation import evaluate
from moe_collab.modifiers.glue.compat import keep_attention_causal
from moe_collab.pruning import CRITERIA

from ..compress import calibration, log_warnings_only, recipe, run_oneshot, uniform_recipe
from .rows import Rows, standard_error
from .trained import TrainedModel

FAMILIES = ["qwen3_moe", "deepseek_v3"]
RETENTIONS = (0.75, 0.5)
DEFAULT = "frequency_reap"
PAPER = "importance"
SEEDS = 4
SAMPLES = 3
PARTS = ["criteria", "calibration", "quantized", "samples"]
CALIBRATE = {"RouterCalibrationModifier": {}}


class Bench:
    """The rows of one model."""

    def __init__(self, family: str, output: Path) -> None:
        self.model = TrainedModel(family, output, tuning_steps=0)
        self.folder = output / "pruning" / family
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(self.folder / "rows.json", _line)

    def run(self, parts: list[str]) -> None:
        """All rows of these parts."""
        for part in parts:
            getattr(self, f"_{part}")()

    def _add(self, case: str, method: str, retention: float, *modifiers: dict, data: DataLoader | None = None) -> None:
        key = {"case": case, "model": self.model.family, "retention": retention, "method": method}
        self.rows.add(key, partial(self._from_disk, modifiers, data))

    def _from_disk(self, modifiers: tuple[dict, ...], data: DataLoader | None) -> dict[str, Any]:
        path = self.folder / "checkpoint"
        run_oneshot(recipe(*modifiers), path, self.model.source, data=data)
        return self._row(self.model.from_disk(path))

    def _row(self, found: Any) -> dict[str, Any]:
        return {
            "delta_nll": math.log(found.perplexity / self.model.original.perplexity),
            "kl": found.kl,
            "kl_error": standard_error(found.kl_by_row),
            "top1": found.top1,
        }

    def _stock_reap(self, case: str, method: str, retention: float, data: DataLoader | None = None) -> None:
        def make() -> dict[str, Any]:
            with stock_conversions(), load_context():
                model = AutoModelForCausalLM.from_pretrained(self.model.source, dtype="auto")
            keep_attention_causal(model)
            prune = recipe({"REAPPruningModifier": {"sparsity": 1 - retention}})
            oneshot(model=model, recipe=prune, dataset=data or calibration(model=self.model.source))
            with float32_weights(model):
                return self._row(evaluate(model.eval(), self.model.test, self.model.base))

        self.rows.add({"case": case, "model": self.model.family, "retention": retention, "method": method}, make)

    def _criteria(self) -> None:
        """Who stays, in which form, and how many of them are activated."""
        for retention in RETENTIONS:
            for criterion in (PAPER, *CRITERIA):
                self._add("criteria", criterion, retention, _prune(retention, criterion))
            for seed in range(SEEDS):
                scores = self._random_scores(seed)
                self._add("criteria", f"random {seed}", retention, _prune(retention, str(scores)))
            self._stock_reap("criteria", "stock REAPPruningModifier", retention)
            for criterion in (PAPER, DEFAULT):
                scale = {"ActivationSmoothModifier": {"num_experts_per_tok": "scale"}}
                self._add("criteria", f"{criterion}, k scaled", retention, _prune(retention, criterion), scale)
                if self.model.moe.layers[0].bias_holder is not None:
                    masked = _prune(retention, criterion, pruning="masked")
                    self._add("criteria", f"{criterion}, masked", retention, masked)

    def _random_scores(self, seed: int) -> Path:
        generator, path = torch.Generator().manual_seed(seed), self.folder / f"random-{seed}.json"
        layers = self.model.moe.layers
        path.write_text(json.dumps({m.name: torch.rand(m.num_experts, generator=generator).tolist() for m in layers}))
        return path

    def _calibration(self) -> None:
        """Router calibration after pruning."""
        most, least = RETENTIONS
        self._add("calibration", f"{DEFAULT}, calibrated", most, _prune(most), CALIBRATE)
        blocks = {"RouterCalibrationModifier": {"objective": "blocks"}}
        self._add("calibration", f"{DEFAULT}, calibrated by blocks", most, _prune(most), blocks)
        if self.model.moe.layers[0].bias_holder is not None:
            masked = _prune(most, pruning="masked")
            self._add("calibration", f"{DEFAULT}, masked, calibrated", most, masked, CALIBRATE)
        self._add("calibration", f"{DEFAULT}, calibrated", least, _prune(least), CALIBRATE)
        self._add("calibration", f"{PAPER}, calibrated", most, _prune(most, PAPER), CALIBRATE)

    def _quantized(self) -> None:
        """Router calibration after stock uniform GPTQ at 2 bits in groups of 128, all experts kept."""
        quantize = yaml.safe_load(uniform_recipe(2, 128))["uniform_stage"]["quant_modifiers"]
        self._add("quantized", "2-bit GPTQ", 1, quantize)
        for objective in ("predictions", "blocks"):
            calibrate = {"RouterCalibrationModifier": {"objective": objective}}
            self._add("quantized", f"2-bit GPTQ, calibrated by {objective}", 1, quantize, calibrate)

    def _samples(self) -> None:
        """The default criterion against stock REAP, each on the same thirds of the calibration set."""
        rows = calibration(model=self.model.source).dataset
        for retention in RETENTIONS:
            for sample in range(SAMPLES):
                data = DataLoader(rows[sample::SAMPLES], batch_size=8)
                self._add("samples", f"{DEFAULT}, sample {sample}", retention, _prune(retention), data=data)
                self._stock_reap("samples", f"stock REAPPruningModifier, sample {sample}", retention, data)


def _prune(retention: float, criterion: str = DEFAULT, **fields: Any) -> dict[str, Any]:
    return {"ExpertPruningModifier": {"retention": retention, "criterion": criterion, **fields}}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:12} {row['retention']:4} {row['method']:42} delta NLL {row['delta_nll']:.4f} "
        f"KL {row['kl']:.4f}±{row['kl_error']:.4f} top-1 {row['top1']:.2%} {row['seconds']} s"
    )


def main() -> None:
    """Run what is asked for and not yet there; then write all rows together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=FAMILIES)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    log_warnings_only()
    for family in options.models:
        Bench(family, options.output).run(options.parts)
    files = sorted((options.output / "pruning").glob("*/rows.json"))
    rows = [row for file in files for row in json.loads(file.read_text())]
    (options.output / "pruning.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{options.output}/pruning.json: {len(rows)} rows")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
