"""The vLLM side: a quantization method for checkpoints whose experts have different bit-widths."""

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
    _registered = True
