"""Trials of other numbers of activated experts: how outputs must be scaled for them, what they cost, what they save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from torch import nn
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...allocation import format_bytes
from ...calibration import log_probabilities, mean_kl
from ...distributed import everyones
from ...moe_model import MoELayer, MoEModel
from ...pruning.surgery import activating
from ...statistics import routed_weights

__all__ = [
    "Factors",
    "OutputMatch",
    "bytes_per_token",
    "everyones_factors",
    "kl_by_top_k",
    "output_at",
    "report_top_k",
]

Factors = Mapping[int, Mapping[str, float]]
"""Number of activated experts -> layer name -> what to multiply the routed experts' output by."""


@dataclass
class OutputMatch:
    """Compares a layer's routed outputs y, at its own number of activated experts, with those at another number, z."""

    cross: float = 0.0
    """<y, z>, summed over all tokens."""
    square: float = 0.0
    """<z, z>, summed over all tokens."""

    def add(self, own: torch.Tensor, other: torch.Tensor) -> None:
        """Add the outputs `own` (y) and `other` (z), [tokens, hidden], to the sums."""
        own, other = own.float(), other.float()
        self.cross += float((own * other).sum())
        self.square += float(other.square().sum())

    def __iadd__(self, other: OutputMatch) -> OutputMatch:
        self.cross += other.cross
        self.square += other.square
        return self

    @property
    def factor(self) -> float:
        """The number c for which |y - c z|^2 is smallest, <y, z> / <z, z>; 1 if nothing was seen.

        Experts partly cancel, so fewer of them, their weights renormalised, put out too much: c < 1. Where weights are
        not renormalised their sum shrinks too, and c is near 1; making up for the whole sum would raise KL.
        """
        return self.cross / self.square if self.square else 1.0


@torch.no_grad()
def output_at(moe: MoEModel, layer: MoELayer, hidden: torch.Tensor, top_k: int) -> torch.Tensor:
    """The routed experts' output for `hidden` [tokens, hidden] with `top_k` experts per token, float32."""
    output = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    with activating(replace(moe, layers=(layer,)), top_k), HooksMixin.disable_hooks():
        weights, indices = layer.routing(layer.router(hidden))
        for index in layer.live_experts:
            tokens, shares = routed_weights(indices, weights, index)
            if len(tokens):
                output.index_add_(0, tokens, (layer.expert(index)(hidden[tokens]) * shares[:, None]).float())
    return output


@contextmanager
def _on_trial(moe: MoEModel, top_k: int, factors: Mapping[str, float]) -> Iterator[None]:
    """Activate `top_k` experts per token, routed outputs multiplied by each layer's factor, within the block."""

    def scaled(factor: float, _module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * factor

    with activating(moe, top_k), ExitStack() as stack:
        for layer in moe.layers:
            handle = layer.experts.register_forward_hook(partial(scaled, factors[layer.name]))
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def kl_by_top_k(
    model: Any,
    moe: MoEModel,
    factors: Mapping[int, Mapping[str, float]],
    batches: Sequence[Mapping[str, torch.Tensor]],
) -> dict[int, float]:
    """KL(model || model with k experts per token) in nats per token, for every k of `factors`: k -> layer -> factor."""
    total, count = dict.fromkeys(factors, 0.0), 0
    for batch in batches:
        base = log_probabilities(model, batch)
        tokens = int(batch["attention_mask"][:, 1:].sum()) if "attention_mask" in batch else base[..., 0].numel()
        count += tokens
        for top_k, by_layer in factors.items():
            with _on_trial(moe, top_k, by_layer):
                total[top_k] += tokens * mean_kl(model, [batch], [base])
    return {top_k: kl / max(count, 1) for top_k, kl in total.items()}


def bytes_per_token(model: Any, moe: MoEModel, top_k: int) -> float:
    """Bytes of weights that decoding one token reads: no embeddings, only `top_k` routed experts a layer, all the rest.

    Decoding is bound by bandwidth, so the ratio of two such sums estimates a speed-up: for one request at a time, of
    weights as they are stored now, without the KV cache.
    """
    with disable_onloading():
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    if not getattr(model.config, "tie_word_embeddings", False):
        embeddings = model.get_input_embeddings()
        sizes |= {f"{name}.weight": 0 for name, module in model.named_modules() if module is embeddings}
    total = float(sum(sizes.values()))
    for layer in moe.layers:
        experts = sum(size for name, size in sizes.items() if name.startswith(f"{layer.experts_name}."))
        total -= experts * (1 - min(1, top_k / len(layer.live_experts)))
    return total


def everyones_factors(seen: Mapping[int, Mapping[str, OutputMatch]]) -> Factors:
    """The factors that follow from what all processes saw; `seen` is this process's part of it."""
    total = {top_k: {name: OutputMatch() for name in by_layer} for top_k, by_layer in seen.items()}
    for part in everyones([seen]):
        for top_k, by_layer in part.items():
            for name, match in by_layer.items():
                total[top_k][name] += match
    return {top_k: {name: match.factor for name, match in by_layer.items()} for top_k, by_layer in total.items()}


def report_top_k(model: torch.nn.Module, moe: MoEModel, top_k: int, factors: Mapping[str, float]) -> None:
    """Log the new number of activated experts, and about how much faster a request should decode."""
    before, after = (bytes_per_token(model, moe, number) for number in (moe.top_k, top_k))
    logger.info(
        "ActivationSmoothModifier: {} -> {} experts activated per token, their outputs multiplied by {:.3f} to {:.3f}. "
        "A token reads {} of weights instead of {}: one request should decode about {:.2f} times as fast (an estimate "
        "by bandwidth, before quantization)",
        moe.top_k,
        top_k,
        min(factors.values()),
        max(factors.values()),
        format_bytes(round(after)),
        format_bytes(round(before)),
        before / after,
    )
