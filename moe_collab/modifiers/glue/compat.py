"""Works around defects of the pinned transformers and llm-compressor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib.util import find_spec
from typing import Any

from torch import fx, nn

__all__ = ["keep_attention_causal", "survive_missing_torchvision"]

_MARK = "_moe_collab_in_one_piece"


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


def keep_attention_causal(model: nn.Module) -> None:
    """Let llm-compressor's layer-by-layer calibration of `model` see a causal mask.

    It traces with a mask-making function in one piece where the model calls it by its own name. Qwen3-MoE, Mixtral and
    PhiMoE call it by a local one: then it is traced through, the mask is lost, and every token sees those behind it.
    """
    module = sys.modules[type(model).__module__]
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        function = getattr(module, name, None)
        if function is not None and not hasattr(function, _MARK):
            setattr(module, name, _in_one_piece(function))


def _in_one_piece(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a single call in whatever graph it is traced into."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxies = [value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)]
        if not proxies:
            return function(*args, **kwargs)
        # A graph cannot hold a config as an argument.
        bound = wraps(function)(partial(function, config=kwargs.pop("config")))
        return proxies[0].tracer.create_proxy("call_function", bound, args, kwargs)

    setattr(call, _MARK, True)
    return call
