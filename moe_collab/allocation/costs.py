"""`CostTable`: the cost of every way to store every matrix; allocation adds these costs up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checkpoint.atomic import replace_text
from ..errors import MoeCollabError
from ..formats import Scheme

__all__ = ["CostTable"]


class CostTable(BaseModel):
    """Costs by matrix and scheme, in nats of KL per token, and tokens routed to each layer's experts."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str = ""
    """Identifies the model and all that decides how costs are measured, except the data."""
    costs: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Matrix name -> the scheme's text -> cost."""
    routed_tokens: dict[str, list[int]] = Field(default_factory=dict)
    """MoE layer name -> calibration tokens routed to each expert."""
    tokens: int = 0
    """Number of calibration tokens."""

    def cost(self, name: str, scheme: Scheme) -> float:
        """The cost of storing matrix `name` at `scheme`; 0 if none was measured."""
        return self.costs.get(name, {}).get(str(scheme), 0.0)

    def add(self, name: str, schemes: Sequence[Scheme], costs: Sequence[float]) -> None:
        """Set the costs of one matrix at `schemes`; its costs at other schemes stay."""
        self.costs.setdefault(name, {}).update(
            (str(scheme), float(cost)) for scheme, cost in zip(schemes, costs, strict=True)
        )

    def join(self, other: CostTable) -> None:
        """Add what `other` has measured, of matrices and layers that this table does not have."""
        self.costs |= other.costs
        self.routed_tokens |= other.routed_tokens
        self.tokens = self.tokens or other.tokens

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        replace_text(path, self.model_dump_json() + "\n")

    @classmethod
    def load(cls, path: str | Path, fingerprint: str) -> CostTable:
        """Read a table. Raises `MoeCollabError` when it is not valid or was measured for something else."""
        try:
            table = cls.model_validate_json(Path(path).read_text())
        except (ValidationError, UnicodeDecodeError) as error:
            raise MoeCollabError(f"{path}: not a valid table of costs; delete it to measure anew.\n{error}") from error
        if table.fingerprint != fingerprint:
            raise MoeCollabError(
                f"{path}: these costs were measured for another model or other options ({table.fingerprint}, this one "
                f"is {fingerprint}). Delete the file to measure anew, or name another one."
            )
        return table
