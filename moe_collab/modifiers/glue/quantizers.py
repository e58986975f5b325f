"""Checks of the quantizers that round what `MixedBitAllocModifier` has allocated, before anything is calibrated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin

from ...errors import MoeCollabError
from .recipe import modifiers_of_this_pass

__all__ = ["check_followers", "check_formats", "check_own_pass", "check_rounded"]


def check_followers(followers: list[Any], ternary: bool, faithful: bool) -> None:
    """Raise `MoeCollabError` if no quantizer follows, or one that would override or cannot carry out the allocation.

    `ternary` says whether ternary weights are offered, `faithful` whether `FisherGPTQModifier` is among `followers`.
    """
    if ternary and not faithful:
        raise MoeCollabError(
            "MixedBitAllocModifier.bits: only FisherGPTQModifier rounds to ternary. Put it after "
            "MixedBitAllocModifier, or take `ternary` out."
        )
    if not followers:
        raise MoeCollabError(
            "MixedBitAllocModifier: no quantizer comes after it in the recipe, so nothing would be rounded. "
            "Add `GPTQModifier: {ignore: [lm_head]}` after it."
        )
    for quantizer in followers:
        who = type(quantizer).__name__
        if quantizer.scheme is not None or quantizer.config_groups is not None:
            raise MoeCollabError(
                f"{who}: its `scheme` or `config_groups` would override the allocated bits. Remove them; name "
                "the bits of other tensors in MixedBitAllocModifier.fixed."
            )
        if str(getattr(quantizer, "actorder", None)) in ("group", "ActivationOrdering.GROUP"):
            raise MoeCollabError(
                f"{who}.actorder: `group` stores weight_g_idx, which no mixed-bit kernel serves. Use `static`."
            )


def check_formats() -> None:
    """Raise `MoeCollabError` if a quantizer of the recipe asks for what our saving cannot read back and verify."""
    for modifier in modifiers_of_this_pass():
        if not isinstance(modifier, QuantizationMixin) or not modifier.has_config():
            continue
        for scheme in modifier.resolved_config.config_groups.values():
            weights = scheme.weights
            kind = None if weights is None else str(getattr(weights.type, "value", weights.type))
            if scheme.input_activations is not None or kind not in (None, "int"):
                raise MoeCollabError(
                    f"{type(modifier).__name__}: beside our modifiers a checkpoint holds weight-only integers "
                    f"of 2 to 8 bits, but its scheme asks for {kind} weights"
                    f"{' and for quantized activations' if scheme.input_activations is not None else ''}. Use a scheme "
                    "such as W4A16 or W8A16."
                )


def check_own_pass() -> None:
    """Raise `MoeCollabError` if `MixedBitAllocModifier` shares its calibration pass with a quantizer."""
    modifiers = modifiers_of_this_pass()
    if any(isinstance(modifier, QuantizationMixin) for modifier in modifiers):
        others = [name for name in (type(m).__name__ for m in modifiers) if name != "MixedBitAllocModifier"]
        raise MoeCollabError(
            f"MixedBitAllocModifier shares its calibration pass with {others}, but it decides about all layers at "
            "once, before any is rounded. Use oneshot(pipeline='independent'), the default."
        )


def check_rounded(model: Any, packed: Iterable[str], followers: list[Any]) -> None:
    """Raise `MoeCollabError` if among the modules `packed`, which may get fewer bits, none of `followers` rounds one.

    Stock quantizers round only what their `targets` and `ignore` leave them; `FisherGPTQModifier` rounds whatever has
    a scheme.
    """
    rounded = {
        name for quantizer in followers for name, _ in match_named_modules(model, quantizer.targets, quantizer.ignore)
    }
    if left := [name for name in packed if name not in rounded]:
        who = " and ".join(dict.fromkeys(type(quantizer).__name__ for quantizer in followers))
        raise MoeCollabError(
            f"MixedBitAllocModifier: {left[0]} ({len(left)} such modules) may get fewer bits, but {who} would not "
            f"round it. Take it out of `ignore` there, or name it in MixedBitAllocModifier.ignore."
        )
