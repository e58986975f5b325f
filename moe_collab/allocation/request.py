"""`AllocationRequest`: everything that is asked of an allocation, as plain values.

`MixedBitAllocModifier` fills it from the fields of a recipe; a caller without a recipe fills it directly.
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
"""Largest bit-width at which zero points are worth their bytes; `symmetric: auto` offers them up to here."""
_FEWEST_ROWS = 16
"""Fewest rows of a matrix that scope `model` quantizes: vLLM wants matrices with fewer, such as the gate of a shared
expert, unquantized."""

Patterns = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class AllocationRequest:
    """How large the checkpoint may become, how every matrix may be stored, and whether experts may be dropped."""

    budget: int | None = None
    """Bytes of all `*.safetensors` files together."""
    bpw: float | None = None
    """Limit instead of `budget`: mean bits per routed-expert weight, scales included."""
    max_kl: float | None = None
    """Largest KL that is allowed on held-out tokens, nats per token."""
    bits: tuple[int, ...] = (2, 3, 4, 8)
    """Bit-widths on offer, out of `SUPPORTED_BITS`; 16 leaves a matrix unquantized."""
    group_sizes: tuple[int, ...] = (128,)
    """Group sizes on offer: so many weights of a row share a scale; -1 = the whole row, which is an output channel."""
    symmetric: bool | Literal["auto"] = "auto"
    """Whether zero points are left out; `auto` offers weights with and without them up to 4 bits."""
    pruning: Literal["none", "physical", "masked"] = "none"
    """Whether experts may be dropped, and in which of the two forms that `ExpertChoice` describes."""
    scope: Literal["experts", "model"] = "experts"
    """What may be quantized besides the matrices that `fixed` names: the routed experts, or every Linear."""
    fixed: Patterns = ()
    """(regex of module names, bits) for any Linear; of several that match, the first counts."""
    floors: Patterns = FLOORS
    """(regex of module names, fewest bits) for Linears other than routed experts; of several that match, the first
    counts."""
    granularity: Literal["projection", "layer"] = "projection"
    """Which matrices share a scheme: gate and up of one expert, and its down alone; or all experts of a layer."""
    ignore: tuple[str, ...] = IGNORED
    """Modules that keep their precision: names, or regexes that begin with `re:`."""
    strict: bool = True
    """Whether a pattern that matches nothing is an error; for the default patterns it never is."""
    origin: str = "MixedBitAllocModifier"
    """Where the request comes from; error messages put it before the name of a field."""

    @property
    def has_budget(self) -> bool:
        """Whether anything but `max_kl` limits the size."""
        return self.budget is not None or self.bpw is not None

    def key(self, field: str) -> str:
        """What error messages call a field, such as `MixedBitAllocModifier.budget`."""
        return f"{self.origin}.{field}"

    def schemes(self, bits: tuple[int, ...] | None = None) -> list[Scheme]:
        """All schemes on offer for routed experts; with `bits`, all schemes of those bit-widths instead."""
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
        """The bits that `fixed` prescribes for a matrix; None if it does not name it."""
        return _first(self.fixed, matrix)

    def options(self, matrix: Matrix) -> list[Scheme]:
        """The schemes that a matrix may get. Raises `MoeCollabError` if no group size divides its number of columns."""
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
        """Every matrix that may be quantized, by name.

        These are the matrices of routed experts, those that `fixed` names, and with scope `model` all others, each
        unless `ignore` names it. Raises `MoeCollabError` for a pattern that matches nothing, if `strict`.
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
    """Value of the first pattern that is found in a name of `matrix`; None if none is."""
    return next((value for pattern, value in patterns if matrix.found_by(pattern)), None)


def _listed(sizes: tuple[int, ...]) -> str:
    return str(sizes[0] if len(sizes) == 1 else list(sizes))
