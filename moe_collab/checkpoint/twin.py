"""A checkpoint's dense twin, tensor by tensor: the same model unquantized, as its family's own checkpoints store it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch

from ..architectures import PROJECTIONS, StackedExperts, find_family
from ..errors import MoeCollabError
from .experts import absent_experts, check_experts
from .reader import Checkpoint

__all__ = ["LazyTensor", "dense_twin", "stacked"]

_EXPERT = re.compile(r"(?P<block>.*)\.experts\.(?P<index>\d+)\.(?P<projection>\w+)\.(?P<kind>weight|bias)$")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read, and dequantized, when it is sliced: as transformers slices what it loads."""

    like: torch.Tensor
    """Its shape and type, on the meta device."""
    read: Callable[[], torch.Tensor]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.like.dtype

    def is_floating_point(self) -> bool:
        """As of a tensor; transformers asks where config.json names no type."""
        return self.like.is_floating_point()


def dense_twin(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, LazyTensor]:
    """The tensors of the twin by name; nothing but headers and tiny tensors is read before one of them is.

    Quantized weights come in `dtype`, or else in the type of their scales; other tensors stay as they are. Absent
    experts that the router's selection bias masks are zeros: loaders want them, routers never select them. Raises
    `MoeCollabError` for an expert that is absent but not masked, and for a quantization we cannot read.
    """
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise MoeCollabError(
            f"{checkpoint.path}: quantized by {method}, which cannot be read here; unquantized checkpoints and those "
            "of compressed-tensors can."
        )
    check_experts(checkpoint)
    tensors = {
        name: LazyTensor(checkpoint.dense_like(name, dtype), partial(checkpoint.dense_tensor, name, dtype))
        for name in checkpoint.dense_names()
    }
    for name, stored in absent_experts(checkpoint).items():
        like = tensors[stored].like
        tensors[name] = LazyTensor(like, partial(torch.zeros, like.shape, dtype=like.dtype))
    _check_shapes(checkpoint, tensors)
    family = find_family(checkpoint.config.get("model_type"))
    return _stack_experts(tensors, family.stacked) if family and family.stacked else tensors


def _check_shapes(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> None:
    """Raise `MoeCollabError` unless each projection has one shape in all experts of a layer."""
    shapes: dict[tuple[str, ...], torch.Size] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.match(name):
            expected = shapes.setdefault(match.group("block", "projection", "kind"), tensor.like.shape)
            if tensor.like.shape != expected:
                raise MoeCollabError(
                    f"{checkpoint.path}: {name} is {list(tensor.like.shape)}, and others of its layer "
                    f"{list(expected)}. Copy or make the checkpoint again."
                )


def _stack_experts(tensors: Mapping[str, LazyTensor], layout: StackedExperts) -> dict[str, LazyTensor]:
    """`tensors` with each layer's experts stacked; such a tensor is filled expert by expert when it is read."""
    found: dict[str, LazyTensor] = {}
    single: dict[tuple[str, str], dict[str, dict[int, LazyTensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        if match := _EXPERT.match(name):
            single[match["block"], match["kind"]][match["projection"]][int(match["index"])] = tensor
        else:
            found[name] = tensor
    for (block, kind), experts in single.items():
        gate, up, down = ([tensor for _, tensor in sorted(experts[name].items())] for name in PROJECTIONS)
        transposed = layout.transposed and kind == "weight"
        for name, parts in ((layout.gate_up, [gate, up]), (layout.down, [down])):
            full = f"{block}.{name}" if kind == "weight" else f"{block}.{name}_bias"
            found[full] = stacked(full, parts, interleaved=layout.interleaved, transposed=transposed)
    return found


def stacked(
    name: str,
    parts: Sequence[Sequence[LazyTensor]],
    dtype: torch.dtype | None = None,
    *,
    interleaved: bool = False,
    transposed: bool = False,
) -> LazyTensor:
    """A layer's experts as one tensor, which is filled expert by expert when it is read.

    `parts`: the same matrix, or bias, of every expert, for each of one or two of them. [experts, rows of all parts,
    columns] with an expert's parts one below the other or, `interleaved`, row by row in turns; if `transposed`,
    [experts, columns, rows]. `dtype` None: the widest of theirs. Raises `MoeCollabError` with the stacked tensor's
    `name` if they do not fit together.
    """
    likes = [tensor.like for part in parts for tensor in part]
    if len({len(part) for part in parts}) != 1 or len({like.shape for like in likes}) != 1:
        raise MoeCollabError(f"{name}: the experts to be stacked are not all there, or not all of one shape.")
    rows, *columns = likes[0].shape
    rows *= len(parts)
    shape = (len(parts[0]), *columns, rows) if transposed else (len(parts[0]), rows, *columns)
    dtype = dtype or reduce(torch.promote_types, (like.dtype for like in likes))

    def read() -> torch.Tensor:
        whole = torch.empty(shape, dtype=dtype)
        for expert, matrices in zip(whole.mT if transposed else whole, zip(*parts, strict=True), strict=True):
            for place, matrix in zip(_places(rows, len(parts), interleaved), matrices, strict=True):
                expert[place] = matrix.read()
        return whole

    return LazyTensor(torch.empty(shape, dtype=dtype, device="meta"), read)


def _places(rows: int, parts: int, interleaved: bool) -> list[slice]:
    """Which of an expert's rows belong to each of its parts."""
    if interleaved:
        return [slice(part, None, parts) for part in range(parts)]
    return [slice(part * rows // parts, (part + 1) * rows // parts) for part in range(parts)]
