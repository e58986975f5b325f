"""What the original model's blocks put out, and what errors there cost, so that a changed model can learn from it block
by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import MoeCollabError
from ..moe_model import MoELayer, MoEModel
from .at_hand import compute_device
from .experts import ExpertWeights
from .fisher import FisherPass
from .head import KL, Head
from .micro_batches import MicroBatches, held_out
from .routing import Routing
from .samples import evenly
from .stream import Stream, Weights, WeightsOf
from .workspace import Workspace

__all__ = ["BlockError", "BlockLessons", "Sample"]

_TOKENS = 1 << 15
"""About how many tokens are learned from; an eighth of that are held out to judge by."""


class BlockError(NamedTuple):
    """What errors at the output of one block cost."""

    outputs: torch.Tensor
    """Of the original block, [tokens, H]."""
    information: torch.Tensor
    """Second moments E[g g^T] of the gradients by the block's output, over tokens and draws, float32 [H, H]."""
    valid: torch.Tensor
    """Which tokens are no padding, bool [tokens]."""

    def of(self, found: torch.Tensor, tokens: torch.Tensor | slice) -> torch.Tensor:
        """d^T E[g g^T] d / 2 [n] for errors d of `found` [n, H] at `tokens`; 0 for padding."""
        error = found - self.outputs[tokens].to(found)
        return ((error @ self.information.to(error)) * error).sum(-1) * self.valid[tokens].to(found) / 2


class Sample(NamedTuple):
    """Some of the calibration tokens: whole batches, evenly taken, so that time and room do not grow with the data."""

    learn: MicroBatches
    judge: MicroBatches

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, torch.Tensor]]) -> Sample:
        """A sample of `batches`. Raises `MoeCollabError` for a single one."""
        if len(batches) < 2:
            raise MoeCollabError("learning needs two batches of calibration data, one of them to judge the other.")
        longest = max(batch["input_ids"].numel() for batch in batches)
        learn, judge = held_out(batches)
        most = max(1, _TOKENS // longest), max(1, _TOKENS // 8 // longest)
        chosen = (evenly(len(own), limit).tolist() for own, limit in zip((learn, judge), most, strict=True))
        learn_numbers, judge_numbers = chosen
        return cls(MicroBatches(learn[i] for i in learn_numbers), MicroBatches(judge[i] for i in judge_numbers))


class BlockLessons:
    """What the blocks of `model` put out for the tokens of `sample`, and what errors there cost.

    An error d of a block's output costs KL = E[(g . d)^2] / 2 (see `samples`). Of each token there are only `DRAWS`
    gradients g, and to learn from those is to learn their noise. So second moments are taken over all tokens, as K-FAC
    does (Martens and Grosse, arXiv 1503.05671), and the cost is d^T E[g g^T] d / 2. On the Qwen3-MoE fixture at 2.25
    bits per weight, 50 steps of tuning take KL on tokens that neither learn nor judge from .0686 to .0571 so; to .0703
    with (g . d)^2 of each token, to .0621 with its diagonal, to .0609 with |g|^2 |d|^2, and to .0581 with
    |d|^2 / |output|^2; 200 steps take it to .0533 so, and to .0573 with the last.

    All is kept in `workspace`: 2 H bytes for a block and token, and 4 H^2 for a block.
    """

    def __init__(self, model: Any, moe: MoEModel, sample: Sample, workspace: Workspace) -> None:
        self.sample, self._moe = sample, moe
        self.data = MicroBatches([*sample.learn.batches, *sample.judge.batches])
        """The tokens to learn from, and after them those to judge by."""
        self._workspace = workspace
        self.scratch, self.results = workspace.scratch, workspace.results
        self._errors: dict[str, BlockError] = {}
        stream = Stream(model, moe, self.data, self.scratch)
        width = stream.decoder.embedding.embedding_dim
        size = len(stream.decoder.names) * width * (self.data.num_tokens * stream.dtype.itemsize + 4 * width)
        self.scratch.check_room(size, f"learning from {self.data.num_tokens} tokens")
        self._head = Head.of(model, stream.device)
        FisherPass(stream, [], {}, look=self._count, see=self._see)
        for block in stream.decoder.names:
            if block not in self._errors:  # an earlier process has seen it
                output, information = (self.scratch.found(f"{block}.{what}") for what in ("output", "information"))
                self._errors[block] = BlockError(output, information, self.data.valid)

    @property
    def known(self) -> range:
        """The micro-batches of `data` to learn from."""
        return range(len(self.sample.learn))

    @property
    def unseen(self) -> range:
        """The micro-batches of `data` to judge by."""
        return range(len(self.sample.learn), len(self.data))

    @property
    def routed_tokens(self) -> dict[str, list[int]]:
        """MoE layer name -> how many of the tokens to learn from the router sent to each expert."""
        return {layer.name: self.results.noted(f"routed.{layer.name}") for layer in self._moe.layers}

    def error(self, block: str) -> BlockError:
        """What errors at the output of `block` cost."""
        return self._errors[block]

    @torch.no_grad()
    def kl(self, stream: Stream, head: Head, last: torch.Tensor) -> float:
        """KL(original || changed) on the tokens that judge, nats each.

        `last` [tokens, H] is what the last block of the changed model puts out for these, or for all of `data`;
        `stream` is one of the changed model, and `head` its lm_head.
        """
        judging = Stream(stream.model, stream.moe, self.sample.judge, self.scratch)
        count, base = self.sample.judge.num_tokens, self._errors[stream.decoder.names[-1]].outputs
        with judging.running():
            return KL(judging, self._head, head).mean(base[-count:], last[-count:])

    def kl_of(
        self,
        model: Any,
        moe: MoEModel,
        head: Head | None = None,
        rounded: Weights | None = None,
        weights_of: WeightsOf = ExpertWeights.of,
    ) -> float:
        """KL(original || `model`) on the tokens that judge, nats each, with other weights as in `Stream.last`."""
        stream = Stream(model, moe, self.sample.judge, self.scratch)
        with stream.running():
            last = stream.last("judged", None, rounded, weights_of)
        found = self.kl(stream, head or Head.of(model, stream.device), last)
        stream.forget("judged")
        return found

    def close(self) -> None:
        """Delete all files, but for results that are durable."""
        self._errors.clear()
        self._workspace.close()

    def _count(self, layer: MoELayer, routing: Routing) -> None:
        """Note how many of the tokens to learn from the router sent to each expert, as `routed.` and the layer."""
        chosen = routing.indices[: self.sample.learn.num_tokens].flatten().long()
        counts = torch.bincount(chosen[chosen >= 0], minlength=layer.num_experts)
        self.results.note(f"routed.{layer.name}", counts.tolist())

    @torch.no_grad()
    def _see(self, block: str, output: torch.Tensor, gradient: torch.Tensor) -> None:
        """Keep what is needed of `output` [tokens, H] and `gradient` [draws, tokens, H]."""
        moments = torch.zeros(output.shape[1], output.shape[1])
        for index in range(len(self.data)):
            part = gradient[:, self.data.span(index)].flatten(0, 1).to(compute_device())
            moments += (part.T @ part).cpu()
        moments /= len(gradient) * int(self.data.valid.sum())
        keep = self.scratch.keep
        information, kept = keep(f"{block}.information", moments), keep(f"{block}.output", output)
        self._errors[block] = BlockError(kept, information, self.data.valid)
