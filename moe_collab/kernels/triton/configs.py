"""How large a kernel's tiles are, by device, bits and number of tokens: defaults, and the user's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from ...errors import MoeCollabError

__all__ = ["ANY", "VARIABLE", "Config", "Configs", "batches", "choose", "kinds_of", "mix_of", "read", "using"]

VARIABLE = "MOE_COLLAB_TRITON_CONFIGS"
"""Environment variable: a file like configs.json that goes before it."""
ANY = "any"
"""The bits of configs for layers whose own bits have none."""
_tried: ContextVar[Mapping[str, Config]] = ContextVar("tried", default={})  # noqa: B039  (never changed)


class Config(BaseModel):
    """A program's tile of `rows` x `tokens`, powers of two, and Triton's options, for batches of `up_to` tokens."""

    model_config = ConfigDict(extra="forbid")

    up_to: int | None = None
    rows: Literal[16, 32, 64, 128, 256]
    tokens: Literal[1, 2, 4, 8, 16, 32, 64, 128, 256]
    split: int = Field(1, ge=1, le=64)
    """Shares of the columns, of down alone."""
    num_warps: Literal[1, 2, 4, 8, 16]
    num_stages: int = Field(ge=1, le=16)


class Configs(RootModel[dict[str, dict[str, dict[str, list[Config]]]]]):
    """Device name, architecture (`sm_90`, `gfx942`), `cuda` or `hip` -> bits that occur, as `2,4`, or `any` ->
    kernel -> configs, fewest tokens first.
    """

    def candidates(self, devices: Sequence[str], mix: str, kernel: str) -> Iterator[Config]:
        """Of the first device first, and for the very bits before others."""
        for device, bits in product(devices, (mix, ANY)):
            yield from self.root.get(device, {}).get(bits, {}).get(kernel, [])


def kinds_of(bits: Iterable[int]) -> int:
    """Bit b set if weights of b bits occur."""
    return sum(1 << b for b in set(bits) - {0})


def mix_of(kinds: int) -> str:
    """The bits that occur, as `2,4`."""
    return ",".join(str(b) for b in range(17) if kinds >> b & 1)


@contextmanager
def using(configs: Mapping[str, Config]) -> Iterator[None]:
    """In this thread, `configs` by kernel go before all files."""
    token = _tried.set({**_tried.get(), **configs})
    try:
        yield
    finally:
        _tried.reset(token)


def choose(devices: tuple[str, ...], kinds: int, kernel: str, tokens: int) -> Config:
    """The config of a kernel (`gate_up`, `down`, `linear`) for a batch; `devices`: see `ops.device_names`.

    Raises `MoeCollabError` for a file that cannot be read.
    """
    return _tried.get().get(kernel) or _choose(devices, kinds, kernel, tokens)


@cache
def _choose(devices: tuple[str, ...], kinds: int, kernel: str, tokens: int) -> Config:
    for configs in _files():
        for config in configs.candidates(devices, mix_of(kinds), kernel):
            if config.up_to is None or tokens <= config.up_to:
                return config
    raise AssertionError(f"configs.json has no default for {kernel}")


def batches(devices: tuple[str, ...], kinds: int, kernels: Iterable[str]) -> set[int]:
    """Numbers of tokens from which on other configs may be chosen, 1 among them."""
    found = (c for file in _files() for kernel in kernels for c in file.candidates(devices, mix_of(kinds), kernel))
    return {1, *(config.up_to + 1 for config in found if config.up_to)}


@cache
def _files() -> tuple[Configs, ...]:
    own = os.environ.get(VARIABLE)
    paths = [Path(own)] if own else []
    return tuple(read(path) for path in [*paths, Path(__file__).with_name("configs.json")])


def read(path: Path) -> Configs:
    """Raises `MoeCollabError` for a file that cannot be read."""
    try:
        return Configs.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        raise MoeCollabError(
            f"{path}: cannot be read as tile configurations ({error}). Mend it after the pattern of "
            f"{Path(__file__).with_name('configs.json')}, or unset {VARIABLE}."
        ) from error
