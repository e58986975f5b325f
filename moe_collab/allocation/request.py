"""`AllocationRequest`: everything that is asked of an allocation, as plain values.

`MixedBitAllocModifier` fills it from a recipe's fields; whoever else wants a decision fills it from what he has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

from ..errors import MoeCollabError
from ..formats import DENSE, TERNARY, Scheme
from ..outline import Matrix, ModelOutline
from .patterns import check_ignored, check_regexes, is_named

__all__ = ["FLOORS", "IGNORED", "SUPPORTED_BITS", "AllocationRequest"]

SUPPORTED_BITS = (TERNARY, 2, 3, 4, 5, 6, 8, 16)
IGNORED = ("lm_head",)
FLOORS = (("lm_head$", 4), (".", 3))
_ASYMMETRIC_BITS = 4
"""Widths up to which zero points are worth their bytes."""
_FEWEST_ROWS = 16
"""Rows of a matrix; vLLM wants smaller ones, such as the gate of a shared expert, unquantized."""

Patterns = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class AllocationRequest:
    """How large the result may be, what every matrix may be stored as, and which experts may go."""

    budget: int | None = None
    """Bytes of all `*.safetensors` files together."""
    bpw: float | None = None
    """Instead: mean bits per routed-expert weight, scales included."""
    max_kl: float | None = None
    """KL on held-out tokens that may not be exceeded, nats per token."""
    bits: tuple[int, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] = (128,)
    """Weights that share a scale; -1 = all of an output channel."""
    symmetric: bool | Literal["auto"] = "auto"
    """Whether zero points are left out; `auto` offers both up to 4 bits."""
    pruning: Literal["none", "physical", "masked"] = "none"
    scope: Literal["experts", "model"] = "experts"
    fixed: Patterns = ()
    """(regex of module names, bits) for any Linear; the first that is found counts."""
    floors: Patterns = FLOORS
    """(regex of module names, fewest bits) for Linears other than routed experts; the first that is found counts."""
    granularity: Literal["projection", "layer"] = "projection"
    """What shares a scheme: gate and up of an expert, its down apart; or all experts of a layer."""
    ignore: tuple[str, ...] = IGNORED
    """Modules that keep their precision: names, or regexes that begin with `re:`."""
    strict: bool = True
    """Whether a pattern that matches nothing is an error; in the defaults it never is."""
    origin: str = "MixedBitAllocModifier"
    """What errors call the place that the request comes from."""

    @property
    def has_budget(self) -> bool:
        """Whether anything but `max_kl` limits the size."""
        return self.budget is not None or self.bpw is not None

    def key(self, field: str) -> str:
        """A field as errors name it."""
        return f"{self.origin}.{field}"

    def schemes(self, bits: tuple[int, ...] | None = None) -> list[Scheme]:
        """All that routed experts can be stored as, or what `bits` can be had as."""
        bits = self.bits if bits is None else bits
        packed = [
            Scheme(width, size, symmetric)
            for width, size in product(bits, self.group_sizes)
            if width != 16
            for symmetric in self._symmetries(width)
        ]
        return packed + [DENSE] * (16 in bits)

    def _symmetries(self, bits: int) -> tuple[bool, ...]:
        if bits == TERNARY:
            return (True,)
        if self.symmetric == "auto":
            return (True, False) if bits <= _ASYMMETRIC_BITS else (True,)
        return (self.symmetric,)

    def fixed_bits(self, matrix: Matrix) -> int | None:
        """What `fixed` says of a matrix."""
        return _first(self.fixed, matrix)

    def options(self, matrix: Matrix) -> list[Scheme]:
        """What a matrix can be stored as. Raises `MoeCollabError` if no group size divides its inputs."""
        fixed = self.fixed_bits(matrix)
        if fixed == 16:
            return [DENSE]
        offered = self.schemes() if fixed is None else self.schemes((fixed,))
        fitting = [s for s in offered if not s.is_packed or matrix.columns % s.group_of(matrix.columns) == 0]
        if not fitting:
            raise MoeCollabError(
                f"{self.key('group_size')}: {_listed(self.group_sizes)} does not divide the {matrix.columns} inputs of "
                f"{matrix.name}. Choose a divisor, or -1 for one scale per channel."
            )
        floor = 0 if matrix.is_expert else _first(self.floors, matrix) or 0
        return [s for s in fitting if fixed is not None or s.num_bits >= floor] or [DENSE]

    def targets(self, outline: ModelOutline) -> dict[str, Matrix]:
        """Every matrix that may lose bits, by name: routed experts, what `fixed` names, with scope `model` all others.

        Raises `MoeCollabError` for a pattern that matches nothing.
        """
        left = {name: m for name, m in outline.matrices.items() if not any(is_named(e, m.names) for e in self.ignore)}
        if self.strict:
            self._check_patterns(outline, left)
        return {name: matrix for name, matrix in left.items() if self._takes_part(outline, matrix)}

    def _check_patterns(self, outline: ModelOutline, left: Mapping[str, Matrix]) -> None:
        if self.ignore != IGNORED:
            check_ignored(self.key("ignore"), self.ignore, outline)
        everything = list(outline.matrices.values())
        check_regexes(self.key("fixed"), [pattern for pattern, _ in self.fixed], everything, left)
        if self.floors and self.floors != FLOORS:
            if self.scope != "model":
                raise MoeCollabError(f"{self.key('floors')}: only Linears of scope: model have floors. Leave it out.")
            others = [matrix for matrix in everything if not matrix.is_expert]
            check_regexes(self.key("floors"), [pattern for pattern, _ in self.floors], others, left)

    def _takes_part(self, outline: ModelOutline, matrix: Matrix) -> bool:
        others = self.scope == "model" and matrix.rows >= _FEWEST_ROWS and matrix.name != outline.tied_head
        return matrix.is_expert or others or self.fixed_bits(matrix) not in (None, 16)


def _first(patterns: Patterns, matrix: Matrix) -> int | None:
    """Value of the first pattern that is found in a name of `matrix`."""
    return next((value for pattern, value in patterns if matrix.found_by(pattern)), None)


def _listed(sizes: tuple[int, ...]) -> str:
    return str(sizes[0] if len(sizes) == 1 else list(sizes))
