"""`CompressionPlan`: what is decided about a model before any tensor is rounded, as JSON on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .checkpoint.atomic import replace_text
from .errors import MoeCollabError
from .formats import Scheme

__all__ = ["CompressionPlan", "description_digest"]


class CompressionPlan(BaseModel):
    """Which experts go, how every other tensor is stored, and the exact size of the checkpoint that follows."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[2] = 2
    model_fingerprint: str
    recipe_fingerprint: str
    num_experts: int = Field(ge=1)
    """Per layer, as the saved config will say."""
    num_experts_per_tok: int = Field(ge=1)
    pruning: Literal["none", "physical", "masked"] = "none"
    dropped: dict[str, list[int]] = Field(default_factory=dict)
    """MoE layer name -> experts that go, by their indices before."""
    schemes: dict[str, str]
    """Module name, before experts go -> how its weight is stored: "int3-g128-asym", "ternary-g64", "dense"."""
    budget_bytes: int | None = None
    budget_bpw: float | None = None
    predicted_bytes: int = Field(gt=0)
    expert_bpw: float = Field(gt=0)
    """Bits per weight of the routed experts that there were before."""
    predicted_kl: float = Field(ge=0)
    """Sum of the measured costs, in nats per token: an estimate."""
    bound_kl: float = Field(ge=0)
    """No allocation of these options within the budget has a smaller sum of costs."""
    heldout_kl: float | None = None
    """Measured on held-out calibration tokens with weights rounded on trial."""
    uniform: str | None = None
    """The best scheme that fits the budget for all routed experts alike."""
    uniform_kl: float | None = None
    """The same measure for it."""
    routed_tokens: dict[str, list[int]]
    """MoE layer name -> calibration tokens routed to each expert."""

    def parsed(self) -> dict[str, Scheme]:
        """Module name -> scheme."""
        return {name: Scheme.parse(text) for name, text in self.schemes.items()}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        replace_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CompressionPlan:
        """Read a plan. Raises `MoeCollabError` naming the file when it is not a valid plan."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (ValidationError, UnicodeDecodeError, OSError) as error:
            raise MoeCollabError(
                f"{path}: not a valid compression plan of version 2. Name another, or delete it to plan anew.\n{error}"
            ) from error

    def check_matches(self, path: str | Path, model: str, recipe: str | None = None) -> None:
        """Raise `MoeCollabError` if the plan at `path` is for another model, or another recipe if that matters."""
        for what, mine, theirs in (
            ("model", self.model_fingerprint, model),
            ("recipe", self.recipe_fingerprint, recipe),
        ):
            if theirs is not None and mine != theirs:
                raise MoeCollabError(
                    f"MixedBitAllocModifier.plan: {path} was made for another {what} ({mine}, this one is {theirs}). "
                    f"{'Name' if recipe is None else 'Delete the file to plan anew, or name'} another one."
                )


def description_digest(description: Mapping[str, Any]) -> str:
    """Twelve hex digits that change with any JSON-able part of `description`."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]
