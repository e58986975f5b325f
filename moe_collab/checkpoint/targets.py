"""Which config group of a compressed-tensors checkpoint a module belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import regex
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from ..errors import MoeCollabError

__all__ = ["Targets"]

_SECONDS = 1.0
"""Most that one target may take to match one name; those that tools write take microseconds."""


class _Weights(BaseModel):
    model_config = ConfigDict(strict=True)  # what is read is what was checked: no number may be given as text
    num_bits: Annotated[int, Field(ge=1, le=32)]
    type: str = "int"
    strategy: str | None = None
    symmetric: bool = True
    group_size: int | None = None
    block_structure: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _has_blocks(self) -> _Weights:
        if self.strategy == "block" and self.block_structure is None:
            raise ValueError("strategy block needs a block_structure")
        return self


class _Group(BaseModel):
    targets: list[str]
    weights: _Weights | None = None
    format: str | None = None


class _Quantization(BaseModel):
    """What is used of `quantization_config`."""

    config_groups: dict[str, _Group] = {}
    format: str | None = None


class Targets:
    """The config groups of `quantization_config` in the config.json at `path`, found by a module's name.

    Raises `MoeCollabError` for groups that are not what they should be.
    """

    def __init__(self, path: Path, quantization: Mapping[str, Any]) -> None:
        self._path = path
        try:
            _Quantization.model_validate(quantization)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise MoeCollabError(f"{path}: quantization_config.{where}: {problem['msg']}.") from error
        self._patterns: dict[str, list[tuple[regex.Pattern[str], dict[str, Any]]]] = defaultdict(list)
        """By the layer prefix that they can match, so that a module is tried on few of them."""
        self._names: dict[str, dict[str, Any]] = {}
        """The groups that name a module as it is."""
        self.of_linears: dict[str, Any] | None = None
        """The group that names no module but their class, as in uniform checkpoints."""
        for group in quantization.get("config_groups", {}).values():
            for target in group["targets"]:
                if target == "Linear":
                    self.of_linears = group
                elif target.startswith("re:"):
                    self._add(target, group)
                else:
                    self._names[target] = group

    def _add(self, target: str, group: dict[str, Any]) -> None:
        literal = regex.match(r"re:\^((?:[\w]|\\\.)*?layers\\\.\d+)\\\.", target)
        try:
            pattern = regex.compile(target[3:])
        except regex.error as error:
            raise MoeCollabError(f"{self._path}: the target {target!r} is no regular expression ({error}).") from error
        self._patterns[literal[1].replace("\\", "") if literal else ""].append((pattern, group))

    def find(self, module: str) -> dict[str, Any] | None:
        """The group that names `module`, None if none does. Raises `MoeCollabError` if that cannot be found out."""
        if module in self._names:
            return self._names[module]
        layer = regex.match(r"(.*?layers\.\d+)\.", module)
        for key in dict.fromkeys((layer[1] if layer else "", "")):
            for pattern, group in self._patterns.get(key, ()):
                try:
                    if pattern.match(module, timeout=_SECONDS):
                        return group
                except TimeoutError as error:
                    raise MoeCollabError(
                        f"{self._path}: to match {module} with the target {pattern.pattern!r} takes more than "
                        f"{_SECONDS:.0f} s. Simplify it; if others wrote it, do not trust this checkpoint."
                    ) from error
        return None
