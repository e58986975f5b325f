"""Collaborative compression of Mixture-of-Experts models (arXiv 2509.25689) for llm-compressor and vLLM.

Importing this package registers its modifiers with llm-compressor where that is installed, and nothing
heavier than the standard library where it is not.
"""

from importlib.util import find_spec as _find_spec
from typing import Any

from .errors import MoeCollabError

__all__ = ["MoeCollabError", "__version__", "load", "load_linearized", "oneshot"]
__version__ = "0.1.0"

if _find_spec("llmcompressor") is not None:
    from . import modifiers as _modifiers  # noqa: F401  (registers them)


def __getattr__(name: str) -> Any:
    # `load` needs torch and transformers, which a vLLM server should not pay for on import.
    if name == "load":
        from .checkpoint.load import load

        return load
    if name == "load_linearized" and _find_spec("llmcompressor") is not None:
        from .modifiers.glue.linearized import load_linearized

        return load_linearized
    if name == "oneshot" and _find_spec("llmcompressor") is not None:
        from .modifiers.glue.work import oneshot

        return oneshot
    raise AttributeError(f"module 'moe_collab' has no attribute {name!r}")
