"""A compressed-tensors checkpoint, opened lazily, with errors that name the file and the tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import MoeCollabError
from ..formats import TERNARY_PACKED, dequantize, unpack, unpack_ternary
from .atomic import was_cut_off
from .sizes import TORCH_TYPES
from .targets import Targets

__all__ = ["SUFFIXES", "Checkpoint", "Quantized"]

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True)
class Quantized:
    """One quantized weight: codes int8 [rows, columns], scale and zero point [rows, groups]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    g_idx: torch.Tensor | None

    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [rows, columns], in `dtype` or else the scale's."""
        return dequantize(self.codes, self.scale, self.zero_point, self.g_idx, dtype)


def check_scales(scale: torch.Tensor, rows: int, columns: int, weights: dict[str, Any]) -> None:
    """Raise `MoeCollabError` unless `scale` is finite, [rows, groups], and of a floating-point type.

    `weights` is the scheme's entry of that name in config.json; `rows` and `columns` are those of the weight.
    """
    size = weights.get("group_size")
    groups = columns // size if size and size > 0 else 1
    if tuple(scale.shape) != (rows, groups) or not scale.is_floating_point():
        raise MoeCollabError(
            f"weight_scale is {scale.dtype} {list(scale.shape)}, its scheme in config.json needs a floating-point "
            f"[{rows}, {groups}]."
        )
    if not torch.isfinite(scale.float()).all():
        raise MoeCollabError("weight_scale holds NaN or infinity, so the weight would be garbage. Quantize it again.")


def _json_object(file: Path) -> dict[str, Any]:
    """What is in a JSON file. Raises `OSError`, `ValueError` or `RecursionError`."""
    found = json.loads(file.read_text())
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _has_nan(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any type holds NaN; types of 8 bits are widened, as torch does not test all of them."""
    if not tensor.is_floating_point():
        return False
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    return not wide.sum().isfinite() and bool(torch.isnan(wide).any())  # a sum takes a tenth of the time


class Checkpoint:
    """Names, schemes and tensors of the checkpoint in a directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.config = _json_object(self.path / "config.json")
        except (OSError, ValueError, RecursionError) as error:
            hint = "Is this a checkpoint?"
            if any(self.path.glob("*.gguf")):
                hint = "GGUF files cannot be read. Get the model as *.safetensors."
            if was_cut_off(self.path):
                hint = "A save was cut off while its files moved in here; the next save into this directory ends it."
            raise MoeCollabError(f"{self.path}/config.json: cannot be read ({error}). {hint}") from error
        self._files: dict[str, Any] = {}
        self._where: dict[str, Path] = {}
        expected = self._index()
        for file in self._weight_files(expected):
            self._open(file)
        self._check_complete(expected)
        quantization = self.config.get("quantization_config") or {}
        if not isinstance(quantization, dict):
            raise MoeCollabError(f"{self.path}/config.json: quantization_config is no JSON object.")
        self._targets = Targets(self.path / "config.json", quantization)

    def _weight_files(self, expected: dict[str, str]) -> list[Path]:
        """The files that hold this checkpoint; others may lie there too, such as an adapter or consolidated weights."""
        if expected:
            return sorted({self.path / file for file in expected.values()})
        single = self.path / "model.safetensors"
        return [single] if single.exists() else sorted(self.path.glob("*.safetensors"))

    def _open(self, file: Path) -> None:
        try:
            handle = safe_open(file, "pt", backend="pread")  # mapped files would count as memory once they are read
        except (SafetensorError, OSError) as error:
            raise MoeCollabError(
                f"{file}: truncated or no safetensors file ({error}). Copy or make it again."
            ) from error
        self._files[file.name] = handle
        self._where.update(dict.fromkeys(handle.keys(), file))

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name, empty for a checkpoint of one file."""
        index = self.path / "model.safetensors.index.json"
        try:
            found = dict(_json_object(index)["weight_map"]) if index.exists() else {}
            if outside := [file for file in found.values() if Path(file).name != file]:
                raise ValueError(f"{outside[0]} is no file beside it")
            return found
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise MoeCollabError(f"{index}: cannot be read ({error!r}). Copy or make the checkpoint again.") from error

    def _check_complete(self, expected: dict[str, str]) -> None:
        missing = sorted(n for n, f in expected.items() if n not in self._where or self._where[n].name != f)
        if missing or not self._where:
            what = f"tensors {missing[:5]}, named in the index," if missing else "*.safetensors files"
            raise MoeCollabError(f"{self.path}: {what} are missing. Copy or make the checkpoint again.")

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def tensor(self, name: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or what lies at one index of its first dimension.

        Raises `MoeCollabError` if it is missing or its file is broken.
        """
        try:
            file = self._file_of(name)
            if index is None:
                return file.get_tensor(name)
            with safe_open(self._where[name], "pt") as mapped:  # of a file that is not mapped all of a tensor is read
                return mapped.get_slice(name)[index].clone()
        except (SafetensorError, OSError) as error:
            raise MoeCollabError(f"{self._where[name]}: tensor {name} cannot be read ({error}).") from error

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name]

    @property
    def quant_method(self) -> str | None:
        """Who quantized the weights, as config.json says; None if nobody did."""
        if described := self.config.get("quantization_config"):
            return str(described.get("quant_method", "compressed-tensors"))
        return "modelopt" if (self.path / "hf_quant_config.json").exists() else None

    def _file_of(self, name: str) -> Any:
        """The open file that holds a tensor. Raises `MoeCollabError` if none does."""
        if name not in self._where:
            raise MoeCollabError(f"{self.path}: tensor {name} is missing. Copy or make the checkpoint again.")
        return self._files[self._where[name].name]

    def stored_like(self, name: str) -> torch.Tensor:
        """A tensor's shape and type, on the meta device. Raises `MoeCollabError` if it is missing."""
        stored = self._file_of(name).get_slice(name)
        dtype = TORCH_TYPES.get(stored.get_dtype())
        if dtype is None:
            raise MoeCollabError(
                f"{self._where[name]}: tensor {name} has type {stored.get_dtype()}, which cannot be read here."
            )
        return torch.empty(stored.get_shape(), dtype=dtype, device="meta")

    def plain_tensor(self, name: str, index: int | None = None) -> torch.Tensor:
        """As `tensor`, of one that is stored as the model computes with it. Raises `MoeCollabError` also for NaN."""
        tensor = self.tensor(name, index)
        if _has_nan(tensor):
            raise MoeCollabError(
                f"{self._where[name]}: tensor {name} holds NaN, so the model would answer with garbage. Make the "
                "checkpoint again from weights that are finite."
            )
        return tensor

    def quantized_modules(self) -> list[str]:
        """Names of the modules stored packed."""
        return [n.removesuffix(".weight_packed") for n in self._where if n.endswith(".weight_packed")]

    def scheme(self, module: str) -> dict[str, Any] | None:
        """The config group that targets `module`, None if it is not quantized."""
        quantized = f"{module}.weight_packed" in self or f"{module}.weight_scale" in self
        return self._targets.find(module) or (self._targets.of_linears if quantized else None)

    def packed_shape(self, module: str) -> tuple[int, int]:
        """(rows, columns) of a packed weight. Raises `MoeCollabError` for what no packed weight has."""
        name, packed = f"{module}.weight_shape", self.stored_like(f"{module}.weight_packed").shape
        shape = self.tensor(name)
        rows, columns = shape.tolist() if shape.dtype == torch.int64 and shape.shape == (2,) else (0, 0)
        # No format has more columns in a word of 32 bits, whatever it stores words in.
        if not (rows > 0 and 0 < columns <= 32 * packed[-1:].numel()) or packed[:1] != (rows,):
            raise MoeCollabError(
                f"{self.file_of(name)}: {name} is {shape.dtype} {shape.tolist()[:4] if shape.ndim else shape.item()}, "
                f"and weight_packed {list(packed)}: they cannot be of one weight. Copy or make the checkpoint again."
            )
        return rows, columns

    def quantized(self, module: str) -> Quantized:
        """Codes and scales of a packed module. Raises `MoeCollabError` for formats we cannot read."""
        group = self.scheme(module)
        if group is None or group.get("weights") is None:
            raise MoeCollabError(f"{module}.weight_packed: no config group in config.json with weights targets it.")
        layout = group.get("format") or self.config["quantization_config"].get("format")
        weights = group["weights"]
        bits, kind = weights["num_bits"], weights.get("type", "int")
        ternary = layout == TERNARY_PACKED and bits == 2 and bool(weights.get("symmetric", True))
        if not (ternary or layout == "pack-quantized") or kind != "int" or not 2 <= bits <= 8:
            raise MoeCollabError(
                f"{module}.weight_packed: format {layout} of {bits}-bit {kind} is not one we can read. "
                f"We read pack-quantized integers of 2 to 8 bits and {TERNARY_PACKED}."
            )
        scale = self.tensor(f"{module}.weight_scale")
        rows, columns = self.packed_shape(module)
        optional = {s: self.tensor(f"{module}.{s}") for s in SUFFIXES[3:] if f"{module}.{s}" in self._where}
        zero_point = optional.get("weight_zero_point")
        if (zero_point is None) != bool(weights.get("symmetric", True)):
            raise MoeCollabError(f"{module}.weight_zero_point: contradicts `symmetric` in config.json.")
        try:
            check_scales(scale, rows, columns, weights)
            if zero_point is not None:
                zero_point = unpack(zero_point, bits, (scale.shape[0], scale.shape[1]), packed_dim=0)
            packed = self.tensor(f"{module}.weight_packed")
            if ternary:
                codes = unpack_ternary(packed, (rows, columns), columns // scale.shape[1])
            else:
                codes = unpack(packed, bits, (rows, columns))
        except MoeCollabError as error:
            raise MoeCollabError(f"{self._where[f'{module}.weight_packed']}: {module}: {error}") from error
        groups, known = optional.get("weight_g_idx"), torch.arange(scale.shape[1])
        if groups is not None and not (groups.shape == (columns,) and torch.isin(groups, known).all()):
            raise MoeCollabError(
                f"{self._where[f'{module}.weight_g_idx']}: {module}.weight_g_idx does not name one of {len(known)} "
                "groups for each column."
            )
        return Quantized(codes, scale, zero_point, groups)
