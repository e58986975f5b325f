"""`CompressionPlan`: what is decided about a model before any tensor is rounded, as JSON on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import MoeCollabError

__all__ = ["CompressionPlan", "fingerprint"]


class CompressionPlan(BaseModel):
    """Which tensors get how many bits, and the exact size of the checkpoint that follows."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    model_fingerprint: str
    recipe_fingerprint: str
    num_experts: int = Field(ge=1)
    num_experts_per_tok: int = Field(ge=1)
    group_size: int
    symmetric: bool
    budget_bytes: int | None = None
    budget_bpw: float | None = None
    predicted_bytes: int = Field(gt=0)
    expert_bpw: float = Field(gt=0)
    predicted_kl: float = Field(ge=0)
    """Sum of the measured costs: an estimate, in nats per token."""
    num_bits: dict[str, int]
    """Module name -> bits of its weight; 16 = as it was."""
    routed_tokens: dict[str, list[int]]
    """MoE layer name -> calibration tokens routed to each expert."""

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; beside first, then renamed, so that no half plan is ever found."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> CompressionPlan:
        """Read a plan. Raises `MoeCollabError` naming the file when it is not a valid plan."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (ValidationError, UnicodeDecodeError) as error:
            raise MoeCollabError(f"{path}: not a valid compression plan; delete it to plan anew.\n{error}") from error

    def check_matches(self, path: str | Path, model: str, recipe: str) -> None:
        """Raise `MoeCollabError` if the plan at `path` was made for another model or another recipe."""
        for what, mine, theirs in (
            ("model", self.model_fingerprint, model),
            ("recipe", self.recipe_fingerprint, recipe),
        ):
            if mine != theirs:
                raise MoeCollabError(
                    f"MixedBitAllocModifier.plan: {path} was made for another {what} ({mine}, this one is {theirs}). "
                    "Delete the file to plan anew, or name another one."
                )


def fingerprint(description: Mapping[str, Any]) -> str:
    """Twelve hex digits that change with any JSON-able part of `description`."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]
