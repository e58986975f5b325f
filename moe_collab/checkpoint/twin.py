"""A checkpoint's dense twin, tensor by tensor: the same model unquantized, as its family's own checkpoints store it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce

import torch

from ..architectures import PROJECTIONS, StackedExperts, find_family
from ..errors import MoeCollabError
from .dense import dense_tensors
from .experts import absent_experts, check_experts
from .lazy import LazyTensor
from .reader import Checkpoint

__all__ = ["complete_tensors", "dense_twin", "separate_experts", "stacked", "stacked_experts"]

_EXPERT = re.compile(r"(?P<block>.*)\.experts\.(?P<index>\d+)\.(?P<projection>\w+)\.(?P<kind>weight|bias)$")


def dense_twin(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, LazyTensor]:
    """The tensors of the twin by name; nothing but headers and tiny tensors is read before one of them is.

    As `complete_tensors`, experts stacked as the family's own checkpoints have them.
    """
    return stacked_experts(checkpoint, complete_tensors(checkpoint, dtype))


def complete_tensors(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, LazyTensor]:
    """As `dense_tensors`, and all experts are there.

    Absent experts that the router's selection bias masks are zeros: loaders want them, routers never select them.
    Raises `MoeCollabError` for an expert that is absent but not masked, and for a quantization we cannot read.
    """
    tensors = dense_tensors(checkpoint, dtype)
    check_experts(checkpoint)
    for name, stored in absent_experts(checkpoint).items():
        like = tensors[stored].like
        tensors[name] = LazyTensor(like, partial(torch.zeros, like.shape, dtype=like.dtype))
    _check_shapes(checkpoint, tensors)
    return tensors


def stacked_experts(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` with each layer's experts stacked, if the family's own checkpoints have them so."""
    family = find_family(checkpoint.config.get("model_type"))
    return _stack_experts(tensors, family.stacked) if family and family.stacked else dict(tensors)


def separate_experts(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` with each expert's matrices by themselves, of which a stack is read no further than one expert."""
    family = find_family(checkpoint.config.get("model_type"))
    if family is None or family.stacked is None:
        return dict(tensors)
    layout = family.stacked
    found: dict[str, LazyTensor] = {}
    stacks = {layout.gate_up: PROJECTIONS[:2], layout.down: PROJECTIONS[2:]}
    stacks |= {f"{own}_bias": projections for own, projections in stacks.items()}
    for name, tensor in tensors.items():
        own = next((own for own in stacks if name.endswith(f".{own}")), None)
        if own is None:
            found[name] = tensor
        else:
            block = name.removesuffix(f".{own}")
            gate_up, down = (tensors[f"{block}.{stack}"].like.shape for stack in (layout.gate_up, layout.down))
            # Qwen3-VL's own checkpoints lie across, those that transformers writes do not: the model's width tells.
            across = layout.transposed or (gate_up[2] != down[1] and gate_up[1] == down[2])
            found |= _taken_apart(block, tensor, stacks[own], replace(layout, transposed=across))
    return found


def _taken_apart(
    block: str, stack: LazyTensor, projections: Sequence[str], layout: StackedExperts
) -> dict[str, LazyTensor]:
    """The matrices, or biases, of each expert that `stack` is made of, with the names that they have by themselves."""
    kind, shape = ("bias" if stack.like.ndim == 2 else "weight"), stack.like.shape[1:]
    across, interleaved = layout.transposed and kind == "weight", layout.interleaved and len(projections) > 1
    places = _places(shape[1] if across else shape[0], len(projections), interleaved)

    def read(index: int, place: slice) -> torch.Tensor:
        one = stack.one(index)
        return (one.T if across else one)[place].contiguous()

    found = {}
    for projection, place in zip(projections, places, strict=True):
        like = torch.empty(shape, dtype=stack.dtype, device="meta")
        like = (like.T if across else like)[place].contiguous()
        for index in range(len(stack.like)):
            name = f"{block}.experts.{index}.{projection}.{kind}"
            found[name] = LazyTensor(like, partial(read, index, place), stored_as=stack.stored_as, file=stack.file)
    return found


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
