"""A trained model on the bench: what all rows of the allocation benchmark share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from llmcompressor.utils import load_context
from transformers import AutoModelForCausalLM

import moe_collab
from moe_collab.allocation import CostTable, Decision, Planner
from moe_collab.calibration import Calibration, RoundedModel, inputs_of, kept_masks
from moe_collab.calibration.at_hand import at_hand, shadowed
from moe_collab.calibration.routing import choosing_among
from moe_collab.checkpoint.load import stock_conversions
from moe_collab.evaluation import Evaluation, evaluate, log_probabilities
from moe_collab.formats import TERNARY, Scheme
from moe_collab.modifiers.mixed_bit_alloc import MixedBitAllocModifier
from moe_collab.moe_model import describe
from moe_collab.rounding import Rounder

from ..compress import FIXTURE, calibration, checkpoint_size, run_oneshot, tokens, uniform_recipe

__all__ = ["BELOW", "BITS", "GROUPS", "UNIFORM", "TrainedModel"]

UNIFORM = {"2bit-g128": (2, 128), "2bit-g32": (2, 32), "3bit-g128": (3, 128), "4bit-g128": (4, 128)}
BELOW = "1.75bpw"
"""A size that no uniform integers have; ternary has it."""
BITS, GROUPS = ["ternary", 2, 3, 4, 5, 6, 8], [32, 64, 128]


class TrainedModel:
    """One trained model, its tokens, its uniform checkpoints, and ways to evaluate a decision."""

    def __init__(self, family: str, output: Path, tuning_steps: int) -> None:
        self.family, self.tuning_steps = family, tuning_steps
        self.source, self.folder = FIXTURE.with_name(family), output / "allocation" / family
        self.folder.mkdir(parents=True, exist_ok=True)
        self.test = tokens("test", self.source)
        self.costs = self.folder / "costs.json"

    @cached_property
    def live(self) -> Any:
        """The model, its experts linearized."""
        with stock_conversions(), load_context():
            return AutoModelForCausalLM.from_pretrained(self.source, dtype="auto").eval()

    @cached_property
    def moe(self) -> Any:
        """Its MoE layers."""
        return describe(self.live)

    @cached_property
    def calibration(self) -> Calibration:
        """What the calibration tokens tell about it."""
        batches = [inputs_of(batch, torch.device("cpu")) for batch in calibration(model=self.source)]
        return Calibration(self.live, self.moe, batches)

    @contextmanager
    def changed(
        self, weights: Mapping[str, torch.Tensor], dropped: Mapping[str, Collection[int]] | None = None
    ) -> Iterator[None]:
        """Let the model compute in float32 within the block, with other weights of modules and without experts."""
        kept = kept_masks(self.moe, dropped or {})
        with ExitStack() as stack:
            stack.enter_context(at_hand(self.live.modules(), torch.device("cpu")))
            stack.enter_context(shadowed({self.live.get_submodule(n): {"weight": w} for n, w in weights.items()}))
            for layer in self.moe.layers:
                stack.enter_context(choosing_among(layer, kept.get(layer.name)))
            yield

    @cached_property
    def base(self) -> torch.Tensor:
        """The original's log-probabilities of the test tokens."""
        return log_probabilities(moe_collab.load(self.source, dtype=torch.float32), self.test)

    @cached_property
    def original(self) -> Evaluation:
        """The original on the test tokens."""
        return evaluate(moe_collab.load(self.source, dtype=torch.float32), self.test, self.base)

    def planner(self, **fields: Any) -> Planner:
        """A planner for a recipe with these fields of MixedBitAllocModifier."""
        recipe = MixedBitAllocModifier(**({"bits": BITS, "group_size": GROUPS} | fields))
        return recipe.planner(self.live)

    @cached_property
    def table(self) -> CostTable:
        """The costs that the first oneshot() run left."""
        return CostTable.model_validate_json(self.costs.read_text())

    def uniform(self, size: str) -> tuple[Path, Evaluation]:
        """Stock GPTQ's checkpoint, and how it does."""
        path = self.folder / f"uniform-{size}"
        if not (path / "config.json").exists():
            run_oneshot(uniform_recipe(*UNIFORM[size]), path, self.source)
        return path, self.from_disk(path)

    def from_disk(self, path: Path) -> Evaluation:
        """Evaluate a checkpoint."""
        return evaluate(moe_collab.load(path, dtype=torch.float32), self.test, self.base)

    def budget(self, size: str) -> int:
        """Bytes."""
        if size == BELOW:
            planner = self.planner(budget="1TB")
            return planner.layout.file_bytes(dict.fromkeys(planner.experts, Scheme(TERNARY, 128)))
        return checkpoint_size(self.folder / f"uniform-{size}")

    def in_memory(self, decision: Decision, rounder: Rounder | None = None) -> Evaluation:
        """Round as `decision` says and evaluate, on the live model."""
        rounded = RoundedModel(self.calibration, rounder or Rounder(scale_dtype=self.live.dtype))
        names = rounded.round(decision.schemes, kept_masks(self.moe, decision.dropped))
        with self.changed({name: rounded[name].values() for name in names}, decision.dropped):
            return evaluate(self.live, self.test, self.base)
