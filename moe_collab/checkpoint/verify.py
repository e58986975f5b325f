"""After saving: is what lies on disk what the quantizer produced?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import MoeCollabError
from .atomic import Rejected
from .experts import check_experts
from .reader import SUFFIXES, Checkpoint

__all__ = ["Digest", "differing_tensors", "tensor_digest", "verify", "weight_digest"]

Digest = str
"""A short digest of a module's codes, scales and zero points, or of an unquantized tensor."""


def tensor_digest(tensor: torch.Tensor) -> Digest:
    """Digest of a tensor's dtype, shape and bytes."""
    digest = hashlib.blake2b(f"{tensor.dtype}{list(tensor.shape)}".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_digest(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> Digest:
    """Digest of a quantized weight; `zero_point` None for symmetric schemes."""
    parts = [codes, scale] + ([] if zero_point is None else [zero_point.to(torch.int8)])
    return ".".join(tensor_digest(part) for part in parts)


def differing_tensors(path: Path, digests: Mapping[str, Digest]) -> list[str]:
    """Read the file at `path` back: what is wrong with it, by tensor, where it should hold those of `digests`."""
    try:
        with safe_open(path, "pt") as file:
            if stray := set(file.keys()) ^ digests.keys():
                return [f"{path}: its header does not list the tensors that were written, such as {min(stray)}"]
            differing = [name for name, digest in digests.items() if tensor_digest(file.get_tensor(name)) != digest]
    except (SafetensorError, OSError) as error:
        return [f"{path}: cannot be read back ({error})"]
    return [f"{path}: tensor {name} differs from what was written" for name in differing]


def verify(directory: Path, expected: Mapping[str, Digest], plain: Mapping[str, Digest]) -> None:
    """Reopen the checkpoint and compare it with what was to be saved.

    `expected`: packed module, a sound one -> digest; `plain`: unquantized tensor -> digest. Raises `Rejected`, which
    keeps the files out of the way, with the first mismatches by tensor.
    """
    try:
        checkpoint = Checkpoint(directory)
    except MoeCollabError as error:
        raise Rejected(str(error)) from error
    problems: list[str] = []
    stored = set(checkpoint.quantized_modules())
    problems += [f"{name}: was quantized but is not stored packed" for name in sorted(expected.keys() - stored)]
    problems += [f"{name}: is stored packed but was not quantized" for name in sorted(stored - expected.keys())]
    for name in sorted(expected.keys() & stored):
        try:
            weight = checkpoint.quantized(name)
        except MoeCollabError as error:
            problems.append(str(error))
            continue
        if weight_digest(weight.codes, weight.scale, weight.zero_point) != expected[name]:
            problems.append(f"{name}: differs from what the quantizer produced")
    try:
        check_experts(checkpoint)
    except MoeCollabError as error:
        problems.append(str(error))
    names = set(checkpoint.names())
    problems += _orphans(names, stored) + _unpacked(checkpoint, names, stored)
    problems += _differing(checkpoint, plain)
    if problems:
        listed = "\n  ".join(problems[:10])
        raise Rejected(
            f"the written checkpoint is wrong in {len(problems)} places, so it must not be served. Save "
            f"again; if that fails too, report it.\n  {listed}"
        )


def _differing(checkpoint: Checkpoint, plain: Mapping[str, Digest]) -> list[str]:
    """What is wrong with the unquantized tensors: missing, not a number, or not what the model has."""
    problems, names = [], set(checkpoint.names())
    for name, digest in plain.items():
        if name not in names:
            problems.append(f"{name}: is missing")
            continue
        try:
            if tensor_digest(checkpoint.plain_tensor(name)) != digest:
                problems.append(f"{name}: differs from the model's")
        except MoeCollabError as error:
            problems.append(str(error))
    return problems


def _orphans(names: set[str], packed: set[str]) -> list[str]:
    """Tensors of a packed weight whose weight is not there, and dense weights beside packed ones."""
    split = [(name, *name.rpartition(".")[::2]) for name in sorted(names)]
    lost = [n for n, module, suffix in split if suffix in SUFFIXES and module not in packed]
    twice = [n for n, module, suffix in split if suffix == "weight" and module in packed]
    return [f"{n}: belongs to no weight_packed" for n in lost] + [f"{n}: is stored packed too" for n in twice]


def _unpacked(checkpoint: Checkpoint, names: set[str], packed: set[str]) -> list[str]:
    """Weights that config.json calls quantized but that are stored dense."""
    dense = sorted({n.removesuffix(".weight") for n in names if n.endswith(".weight")} - packed)
    return [f"{n}.weight: is stored dense but config.json says quantized" for n in dense if checkpoint.scheme(n)]
