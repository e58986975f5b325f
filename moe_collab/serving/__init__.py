"""The vLLM side: a quantization method for checkpoints whose experts have different bit-widths."""

from __future__ import annotations

import os
from functools import cache
from hashlib import sha256
from pathlib import Path

__all__ = ["register"]

_registered = False


def register() -> None:
    """Entry point `vllm.general_plugins`: called in every vLLM process, possibly more than once."""
    global _registered
    if _registered:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from ..checkpoint import ternary_packed
    from .config import NAME, MoeCollabConfig

    ternary_packed.register()
    register_quantization_config(NAME)(MoeCollabConfig)
    _key_compiled_code()
    _registered = True


def _key_compiled_code() -> None:
    """Let vLLM's cache of compiled models tell ours apart.

    What it compiles names our ops and holds what they were called with, and is used at the next start without being
    looked at. Its key is made of the variables that vLLM knows (vLLM 0.32, `aot_compile_hash_factors`).
    """
    from vllm import envs

    for name in ("MOE_COLLAB_BACKEND", "MOE_COLLAB_ACTIVATION_BITS"):
        envs.environment_variables[name] = lambda name=name: os.environ.get(name)
    envs.environment_variables["MOE_COLLAB_FILES"] = _digest


@cache
def _digest() -> str:
    """Of this package's files: another version may have ops of the same names that mean another thing."""
    folder = Path(__file__).parents[1]
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".so"))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
