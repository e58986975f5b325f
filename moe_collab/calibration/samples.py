"""Samples of what a layer's experts, or a Linear, saw of the calibration tokens, and what errors there cost.

The loss is the likelihood of tokens drawn from the model's own predictions, so that the expected squared gradient is
the Fisher information, and KL(model || model with error d at the layer's output) = E[(g . d)^2] / 2 to second order
(Martens, "New insights and perspectives on the natural gradient method", section 9). What an error does by making
later routers choose otherwise is not seen: on the fixture, rounding all experts costs 1.5 to 1.8 times the prediction.

Samples are bounded, so that they do not grow with the calibration set: of each expert's tokens `EXPERT_TOKENS` evenly
taken ones are kept, and `LAYER_TOKENS` of all tokens of a layer, which are for what looks at whole tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ..distributed import everyones, is_source_process
from ..errors import MoeCollabError
from ..formats import Scheme
from ..rounding import Grid, Rounder
from .at_hand import compute_device, float32_copy
from .micro_batches import MicroBatches
from .moments import second_moment
from .routing import Routing
from .scratch import Scratch

__all__ = [
    "DRAWS",
    "EXPERT_TOKENS",
    "LAYER_TOKENS",
    "LINEAR_TOKENS",
    "LayerSamples",
    "LinearRecorder",
    "LinearSamples",
    "Sampler",
    "chosen_pairs",
    "evenly",
    "sampled",
]

EXPERT_TOKENS = 8192
"""Most routed tokens that are kept for each expert."""
LAYER_TOKENS = 16384
"""Most tokens that are kept of a layer, whichever experts they go to."""
DRAWS = 2
"""How many tokens are drawn for each prediction; the noise of a single one costs 2 % of KL on the fixture."""
LINEAR_TOKENS = 8192
"""Most tokens that are kept for each Linear."""
_LINEAR_GRADIENTS = 1 << 28
"""Most gradients that are kept for each Linear; lm_head has one for every word of the vocabulary."""


@dataclass(frozen=True)
class LayerSamples:
    """A sample of the tokens that one MoE layer saw. Its tensors may be mapped files, those of [n, H] in bfloat16."""

    hidden: torch.Tensor
    """Input of the experts, [n, H]."""
    indices: torch.Tensor
    """Experts chosen by the router, [n, top_k]."""
    weights: torch.Tensor
    """The router's weights, float32 [n, top_k]."""
    gradient: torch.Tensor
    """d loss / d (output of the routed experts), of several losses (see `fisher`), [draws, n, H]."""
    in_sample: torch.Tensor
    """Whether a token is in the sample of the expert that stands there, bool [n, top_k]."""
    layer_tokens: torch.Tensor
    """Numbers of the rows that are an even sample of the layer's tokens."""
    counts: torch.Tensor
    """Calibration tokens routed to each expert, sampled or not, [num_experts]."""
    num_tokens: int
    """All calibration tokens, sampled or not."""

    @classmethod
    def find(cls, scratch: Scratch, name: str) -> LayerSamples | None:
        """What `sampled` has kept in durable scratch."""
        found: dict[str, Any] = {field.name: scratch.find(f"{name}.{field.name}") for field in fields(cls)}
        if any(tensor is None for tensor in found.values()):
            return None
        return cls(**found | {"num_tokens": int(found["num_tokens"])})

    def routed(self, expert: int, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, router weights) of the sampled tokens of `expert`, evenly thinned to at most `limit`."""
        rows, slots = torch.where((self.indices == expert) & self.in_sample)
        if limit is not None and len(rows) > limit:
            chosen = evenly(len(rows), limit)
            rows, slots = rows[chosen], slots[chosen]
        return rows, self.weights[rows, slots]


def sampled(
    name: str, routing: Routing, gradient: torch.Tensor, valid: torch.Tensor, num_experts: int, sampler: Sampler
) -> LayerSamples:
    """A sample of what a layer saw, kept as `name`; `gradient` [draws, tokens, H]; `valid` [tokens] is false for
    padding.
    """
    tokens = valid.nonzero().flatten()
    indices = routing.indices[tokens]
    in_sample, counts = chosen_pairs(indices, num_experts, sampler.expert_tokens)
    in_layer = torch.zeros(len(tokens), dtype=torch.bool)
    in_layer[evenly(len(tokens), sampler.layer_tokens)] = True
    rows = (in_sample.any(1) | in_layer).nonzero().flatten()
    chosen, keep = tokens[rows], sampler.scratch.keep
    keep(f"{name}.num_tokens", torch.tensor(len(tokens)))
    return LayerSamples(
        hidden=sampler.rows(f"{name}.hidden", routing.hidden, chosen, sampler.dtype),
        indices=keep(f"{name}.indices", indices[rows]),
        weights=keep(f"{name}.weights", routing.weights[chosen]),
        gradient=sampler.rows(f"{name}.gradient", gradient, chosen, sampler.gradient_dtype),
        in_sample=keep(f"{name}.in_sample", in_sample[rows]),
        layer_tokens=keep(f"{name}.layer_tokens", in_layer[rows].nonzero().flatten()),
        counts=keep(f"{name}.counts", counts),
        num_tokens=len(tokens),
    )


def chosen_pairs(indices: torch.Tensor, num_experts: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether a token is in the sample of the expert that stands there, [n, top_k]; tokens of each expert).

    Of the tokens that `indices` [n, top_k] send to an expert, -1 for none, at most `limit` are taken, evenly.
    """
    flat, in_sample = indices.flatten().long(), torch.zeros_like(indices, dtype=torch.bool)
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)
    for pairs in flat.argsort(stable=True).split(counts.tolist())[1:]:
        in_sample.view(-1)[pairs[evenly(len(pairs), limit)]] = True
    return in_sample, counts[1:]


@dataclass(frozen=True)
class Sampler:
    """How many tokens are kept, and where: in `scratch`, inputs as `dtype`, gradients in its range."""

    scratch: Scratch
    dtype: torch.dtype
    expert_tokens: int = EXPERT_TOKENS
    layer_tokens: int = LAYER_TOKENS

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of gradients, which float16 has no range for."""
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16

    def narrowed(self, inputs: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as they are kept, on the CPU."""
        return inputs.to("cpu", self.dtype), gradient.to("cpu", self.gradient_dtype)

    def rows(self, name: str, tensor: torch.Tensor, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The `chosen` rows of `tensor` [..., tokens, H] as `dtype`, copied in bounded steps."""
        kept = self.scratch.zeros(name, (*tensor.shape[:-2], len(chosen), tensor.shape[-1]), dtype)
        for start in range(0, len(chosen) if is_source_process() else 0, 4096):
            part = slice(start, start + 4096)
            kept[..., part, :] = tensor[..., chosen[part], :].to(dtype)
        self.scratch.finish(name)
        return kept


@dataclass(frozen=True)
class LinearSamples:
    """Tokens that one Linear saw, and the gradients of the loss by its output."""

    module: nn.Linear
    inputs: torch.Tensor
    """[tokens, columns]."""
    gradient: torch.Tensor
    """[draws, tokens, rows]."""

    def rounded(self, rounder: Rounder, scheme: Scheme) -> Grid:
        """The weight rounded to `scheme`, as a grid that is a batch of one."""
        weight, inputs, gradient = self._at_hand()
        return rounder(weight[None], second_moment(inputs, gradient)[None], scheme)

    def _at_hand(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = compute_device()
        weight = float32_copy(self.module.weight, device)
        return weight, float32_copy(self.inputs, device), float32_copy(self.gradient, device)


class LinearRecorder:
    """Collects samples of the Linears `modules`, by name; `finished` holds those that are complete.

    They are kept in scratch with `prefix` before their names; those that an earlier process has kept there are found.
    """

    def __init__(self, modules: Mapping[str, nn.Linear], data: MicroBatches, sampler: Sampler, prefix: str) -> None:
        self.modules, self._data, self._sampler, self._prefix = modules, data, sampler, prefix
        self._parts: list[tuple[str, int, torch.Tensor, torch.Tensor]] = []
        self.finished: dict[str, LinearSamples] = {}
        for name, module in modules.items():
            inputs, gradient = (sampler.scratch.find(place) for place in self._places(name))
            if inputs is not None and gradient is not None:
                self.finished[name] = LinearSamples(module, inputs, gradient)

    def _places(self, name: str) -> tuple[str, str]:
        return f"{self._prefix}.{name}.inputs", f"{self._prefix}.{name}.gradients"

    def limit(self, rows: int) -> int:
        """Tokens of a micro-batch that are kept of a Linear with so many rows."""
        return max(1, min(LINEAR_TOKENS, _LINEAR_GRADIENTS // rows) // len(self._data))

    def most_bytes(self, module: nn.Linear) -> int:
        """That the samples of `module` may take."""
        widths = module.in_features * self._sampler.dtype.itemsize
        widths += DRAWS * module.out_features * self._sampler.gradient_dtype.itemsize
        return min(self._data.num_tokens, self.limit(module.out_features) * len(self._data)) * widths

    def see(self, name: str, index: int, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a sample of micro-batch `index`: inputs [..., columns] and gradients [draws, ..., rows] of all tokens.

        Raises `MoeCollabError` naming the Linear if any is NaN or infinite.
        """
        valid = self._data.valid[self._data.span(index)].to(inputs.device)
        chosen = valid.nonzero().flatten() if inputs.shape[:-1].numel() == len(valid) else slice(None)
        inputs, gradient = inputs.flatten(0, -2)[chosen], gradient.flatten(1, -2)[:, chosen]
        if not (torch.isfinite(inputs).all() and torch.isfinite(gradient).all()):
            row = self._data.row_of(self._data.span(index).start)
            raise MoeCollabError(
                f"{name}: its inputs or gradients on calibration sequences from {row} on are NaN or infinite. Check "
                "the model and the data; nothing was changed."
            )
        taken = evenly(len(inputs), self.limit(gradient.shape[-1])).to(inputs.device)
        self.add(name, index, inputs[taken], gradient[:, taken])

    def add(self, name: str, index: int, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add inputs [n, columns] and gradients [draws, n, rows] of micro-batch `index`."""
        self._parts.append((name, index, *self._sampler.narrowed(inputs, gradient)))

    def keep(self) -> None:
        """Put the samples that were added since the last time, by all processes, into scratch; they are complete."""
        parts, self._parts = everyones(self._parts), []
        for name in sorted({name for name, *_ in parts}):
            own = sorted(((index, pair) for other, index, *pair in parts if other == name), key=itemgetter(0))
            inputs, gradient = zip(*(pair for _, pair in own), strict=True)
            keep, (of_inputs, of_gradients) = self._sampler.scratch.keep, self._places(name)
            self.finished[name] = LinearSamples(
                self.modules[name], keep(of_inputs, torch.cat(inputs)), keep(of_gradients, torch.cat(gradient, 1))
            )


def evenly(count: int, limit: int) -> torch.Tensor:
    """`limit` numbers below `count`, or all if there are fewer, evenly spread."""
    taken = min(limit, count)
    return torch.arange(taken) * count // max(taken, 1)
