"""Works around one defect of the pinned transformers."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["survive_missing_torchvision"]


def survive_missing_torchvision() -> None:
    """Let llm-compressor's `load_context()` work where torchvision is not installed.

    transformers 5.17 keeps aliases of moved modules whose `__dir__` imports the target; patching experts calls
    `dir()` on every loaded module, and the aliases of image processors then ask for torchvision.
    """
    if find_spec("torchvision") is not None:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and "__dir__" in getattr(module, "__dict__", {}):
            module.__dir__ = list  # type: ignore[method-assign]
