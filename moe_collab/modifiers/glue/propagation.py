"""What an error at one layer's experts does to the model's predictions, by which costs of layers can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from compressed_tensors import align_module_device
from llmcompressor.utils.helpers import eval_context
from loguru import logger

from ...architectures import logits_scaling
from ...decoder import decoder_of
from ...errors import MoeCollabError
from ...moe_model import MoELayer, MoEModel

__all__ = ["Propagation", "propagation"]

RELATIVE_NOISE = 0.1
"""Size of the noise, as a share of the experts' output: small enough for KL to grow with its square, large enough to
show above rounding."""

MAX_BATCHES = 4
"""Batches that the noise is tried on."""


class Propagation(NamedTuple):
    """KL divergence per token, nats, that errors cause."""

    per_squared_error: dict[str, float]
    """Layer name -> KL for a squared error of 1 per token at the output of the layer's experts."""
    per_relative_error: float
    """KL for an error at one layer's experts that is as large as their output, mean over all layers."""


@torch.no_grad()
def propagation(model: torch.nn.Module, moe: MoEModel, data: Iterable[Mapping[str, Any]]) -> Propagation:
    """What errors at the experts of each layer do to the model's predictions.

    One forward pass per layer over the first batches, with Gaussian noise of a tenth of the output's norm added to that
    layer's experts. Raises `MoeCollabError` if the model's predictions are not finite.
    """
    device = next(model.parameters()).device
    batches = [_inputs(batch, device) for batch in islice(data, MAX_BATCHES)]
    factors, relative = {}, []
    with eval_context(model):
        base = [_log_probabilities(model, batch) for batch in batches]
        if not all(torch.isfinite(logp).all() for logp in base):
            raise MoeCollabError(
                "the model's predictions on the calibration data are NaN or infinite; nothing was changed."
            )
        for layer in moe.layers:
            noise = _Noise(layer)
            try:
                noisy = [_log_probabilities(model, batch) for batch in batches]
            finally:
                noise.remove()
            divergence = sum(float((b.exp() * (b - n)).sum()) for b, n in zip(base, noisy, strict=True))
            factors[layer.name] = max(divergence, 1e-12) / max(noise.energy, 1e-30)
            relative.append(divergence / sum(b[..., 0].numel() for b in base) / RELATIVE_NOISE**2)
    logger.debug("KL per squared error by layer: {}", factors)
    return Propagation(factors, sum(relative) / len(relative))


class _Noise:
    """A hook that adds noise to a layer's experts and adds up its squared norm."""

    def __init__(self, layer: MoELayer) -> None:
        self.energy = 0.0
        self._generator = torch.Generator().manual_seed(0)
        self._handle = layer.experts.register_forward_hook(self._add)

    def _add(self, _module: torch.nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        direction = torch.randn(output.shape, generator=self._generator).to(output.device)
        size = output.float().norm(dim=-1, keepdim=True) / output.shape[-1] ** 0.5
        noise = (RELATIVE_NOISE * size * direction).to(output.dtype)
        self.energy += float(noise.float().square().sum())
        return output + noise

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()


def _inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask")
    return {name: torch.as_tensor(batch[name]).to(device) for name in names if name in batch}


def _log_probabilities(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    # During calibration llm-compressor replaces the forward of lm_head, so its matrix is applied here.
    hidden = decoder_of(model)(**batch, use_cache=False).last_hidden_state / logits_scaling(model.config)
    head = model.get_output_embeddings()
    with align_module_device(head):
        return torch.nn.functional.linear(hidden, head.weight, head.bias).float().log_softmax(-1)
