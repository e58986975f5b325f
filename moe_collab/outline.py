"""`ModelOutline`: what a model is made of, by names and shapes alone; deciding needs neither weights nor torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .checkpoint.sizes import TensorEntry
from .routers import RouterLimits

__all__ = ["LayerOutline", "Matrix", "ModelOutline"]


@dataclass(frozen=True)
class Matrix:
    """The weight of one Linear. A routed expert's has the position of its MoE layer, else `layer` is None."""

    name: str
    """Of the module in the live model."""
    saved_as: str
    """Of the module in the checkpoint; families such as Mixtral use other names there."""
    shape: tuple[int, int]
    """[rows, columns], that is [outputs, inputs]."""
    dtype: str = "BF16"
    """As safetensors writes it."""
    layer: int | None = None
    expert: int = -1
    projection: str = ""
    """`gate_proj`, `up_proj` or `down_proj`."""

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.shape[1]

    @property
    def numel(self) -> int:
        """Weights."""
        return self.shape[0] * self.shape[1]

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to a routed expert."""
        return self.layer is not None

    @property
    def names(self) -> tuple[str, str]:
        """What users may call it: as in the model, and as in the checkpoint."""
        return self.name, self.saved_as

    def found_by(self, pattern: str) -> bool:
        """Whether a regex is found in either name."""
        return any(re.search(pattern, name) for name in self.names)


@dataclass(frozen=True)
class LayerOutline:
    """One MoE layer."""

    name: str
    experts_name: str
    """Of the module whose children are the experts."""
    live_experts: tuple[int, ...]
    """Indices of the experts that have weights; masked ones have none."""
    router_tensors: tuple[str, ...] = ()
    """Checkpoint names of the tensors with a row for each expert: the router's, and a selection bias."""
    has_selection_bias: bool = False
    """Whether experts can be masked."""


@dataclass(frozen=True)
class ModelOutline:
    """A model whose routed experts are stored one by one, as it would be saved unquantized."""

    entries: tuple[TensorEntry, ...]
    """Every tensor of the unquantized checkpoint, in the order of writing."""
    matrices: Mapping[str, Matrix]
    """Every Linear by its name in the live model; routers are none."""
    layers: tuple[LayerOutline, ...]
    limits: RouterLimits
    modules: Mapping[str, str]
    """Every module that has tensors of its own: name in the live model -> name in the checkpoint."""
    classes: frozenset[str] = frozenset()
    """Names of the classes of its modules, which `ignore` may name too."""
    tied_head: str | None = None
    """The lm_head, where its weight is that of the embeddings."""

    @cached_property
    def experts(self) -> frozenset[str]:
        """Names of the matrices of routed experts."""
        return frozenset(name for name, matrix in self.matrices.items() if matrix.is_expert)
