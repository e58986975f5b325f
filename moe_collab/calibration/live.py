"""Changes to a live model on trial, undone afterwards (float32, other weights, masked experts), and its predictions."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from loguru import logger
from torch import nn
from torch.overrides import TorchFunctionMode

from ..architectures import MASKED_BIAS, logits_scaling
from ..decoder import decoder_of, replaced_forward
from ..kernels.memory import available_memory
from ..moe_model import MoELayer, MoEModel

__all__ = [
    "float32_weights",
    "held_out",
    "inputs_of",
    "log_probabilities",
    "masked_routers",
    "mean_kl",
    "predict",
    "predicted",
    "replaced_weights",
]

T = TypeVar("T")


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """Hold the model's weights in float32 within the block; afterwards their own type and values are back.

    CPUs without bfloat16 units compute several times faster in float32, and small differences in KL are not rounded
    away. Where the copies would take more than half of the available memory, the model computes in its own type.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    narrow = {id(t): (t, t.data) for t in tensors if t.dtype in (torch.bfloat16, torch.float16)}
    needed, free = 4 * sum(t.numel() for t, _ in narrow.values()), available_memory()
    if 0 < free < 2 * needed:
        logger.info("computing in the model's own type; float32 takes {:.1f} GB of {:.1f}", needed / 1e9, free / 1e9)
        narrow = {}
    try:
        for tensor, data in narrow.values():
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in narrow.values():
            tensor.data = data


@contextmanager
def replaced_weights(weights: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Give parameters other values of the same shape within the block."""
    before = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, value in weights.items():
            parameter.data = value.to(parameter.dtype)
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


@contextmanager
def masked_routers(moe: MoEModel, kept: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the routers of the named layers choose only experts that `kept` [num_experts, bool] marks."""
    with ExitStack() as stack:
        for layer in moe.layers:
            if layer.name in kept and not bool(kept[layer.name].all()):
                stack.enter_context(replaced_forward(layer.router, masked_router(layer, kept[layer.name])))
        yield


def masked_router(layer: MoELayer, kept: torch.Tensor) -> Any:
    """A forward for the layer's router that chooses only among `kept` experts [num_experts, bool].

    It returns what the router's own forward returns. The other experts get a selection bias with which they are never
    chosen, or, in routers without one, a logit of minus infinity, as if the router had no rows for them.
    """
    router: Any = layer.router
    holder: Any = layer.bias_holder
    stock = type(router).forward
    if holder is None:
        return partial(_without, stock, router, ~kept)
    bias = torch.where(kept, holder.e_score_correction_bias, MASKED_BIAS).to(holder.e_score_correction_bias.dtype)
    if holder is not router:
        return lambda hidden_states, *_: stock(router, hidden_states, bias)
    router = copy.deepcopy(router)
    router.e_score_correction_bias.data = bias
    return stock.__get__(router)


def _without(forward: Any, router: nn.Module, gone: torch.Tensor, *args: Any) -> Any:
    with _LogitsWithout(gone):
        return forward(router, *args)


class _LogitsWithout(TorchFunctionMode):
    """Sets the logits of the experts `gone` to minus infinity while a router's forward runs.

    The logits [..., experts] are the result of the one matrix product that a router computes.
    """

    def __init__(self, gone: torch.Tensor) -> None:
        super().__init__()
        self._gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.masked_fill(self._gone, -torch.inf) if func is nn.functional.linear else result


def held_out(batches: Sequence[T]) -> tuple[list[T], list[T]]:
    """(batches to learn from, batches to judge by).

    Every eighth batch, or the last of fewer than eight, is held out to judge by. These are spread over the whole set,
    because calibration text comes sorted, say by source. A single batch serves for both.
    """
    step = min(8, len(batches))
    rest = [batch for position, batch in enumerate(batches) if position % step != step - 1]
    return rest or list(batches), list(batches[step - 1 :: step])


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The `input_ids` and `attention_mask` (if any) of one batch of oneshot()'s data, as tensors on `device`."""
    names = ("input_ids", "attention_mask")
    return {name: torch.as_tensor(batch[name]).to(device) for name in names if name in batch}


def predict(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input of lm_head, logits) of every position but the last, [rows, length - 1, ...].

    During calibration llm-compressor replaces the forward of lm_head, so its matrix is applied here. If the model
    divides its logits by a constant, the input of lm_head is divided by it instead.
    """
    hidden = decoder_of(model)(**batch, use_cache=False).last_hidden_state[:, :-1] / logits_scaling(model.config)
    head = model.get_output_embeddings()
    return hidden, nn.functional.linear(hidden, head.weight, head.bias)


def log_probabilities(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Next-token log-probabilities of every position but the last, float32 [rows, length - 1, vocabulary]."""
    return predict(model, batch)[1].float().log_softmax(-1)


def predicted(batch: Mapping[str, torch.Tensor]) -> Any:
    """An index that picks, of all positions but the last [rows, length - 1], those whose next token is no padding."""
    return batch["attention_mask"][:, 1:].bool() if "attention_mask" in batch else slice(None)


@torch.no_grad()
def mean_kl(model: Any, batches: Iterable[Mapping[str, torch.Tensor]], base: Iterable[torch.Tensor]) -> float:
    """KL(base || model) in nats per token; `base` holds the log-probabilities to compare with, for each batch."""
    total, count = 0.0, 0
    for batch, reference in zip(batches, base, strict=True):
        found = log_probabilities(model, batch)
        divergence = (reference.float().exp() * (reference.float() - found)).sum(-1)[predicted(batch)]
        total, count = total + float(divergence.sum()), count + divergence.numel()
    return total / max(count, 1)
