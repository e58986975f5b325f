"""The tensors of a live model as they stand in its checkpoint: listed without reading any, made one module at a time.

The live model is only read. One that is offloaded is larger than memory, so whatever is read is let go again.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from transformers.core_model_loading import revert_weight_conversion

from ...checkpoint.sizes import TensorEntry, quantized_entries
from ...checkpoint.verify import Digest, tensor_digest, weight_digest
from ...errors import MoeCollabError
from ...formats import TERNARY, TERNARY_PACKED, pack, pack_ternary
from ...rounding import PackedGrid
from .naming import checkpoint_names, dtype_name, saved_shapes
from .packed_weights import is_packed
from .schemes import codes_of, is_sound, is_ternary

__all__ = ["LiveTensors"]

_NOT_FINITE = "not finite; the weight or its scales hold NaN or infinity"
_NOT_ON_GRID = "not on the grid of its scales, or all zero; was it quantized?"


class LiveTensors:
    """What `model` is saved as. `compressed` False: quantized modules too are saved as they are, scales beside weights.

    Raises `MoeCollabError` for a quantized module that cannot be stored as what it is.
    """

    def __init__(self, model: Any, compressed: bool = True) -> None:
        self._model = model
        self.schemes: dict[str, dict[str, Any]] = {}
        """Scheme of each packed module by its name in the checkpoint, as in config.json, without its targets."""
        self.unquantized: list[str] = []
        """Names in the checkpoint of the linear layers that are not packed."""
        self.entries: list[TensorEntry] = []
        """All tensors in the order in which they are saved."""
        self.digests: dict[str, Digest] = {}
        """Digest of the codes, scales and zero points of each packed module that was made and is sound."""
        self.unsound: dict[str, str] = {}
        """What is wrong with those weights that were made but are not what a quantizer makes, by tensor name."""
        self._makers: dict[str, partial[dict[str, torch.Tensor]]] = {}
        self._of_packed: set[str] = set()
        packed = _quantized_modules(model) if compressed else {}
        self._list_modules(packed)
        self._list_tensors(packed)
        self.ties_head = self._leave_out_equal_head()
        """Whether an lm_head equal to the embeddings is left out, so that config.json must say that they are tied."""

    @torch.no_grad()
    def make(self, name: str) -> dict[str, torch.Tensor]:
        """Tensor `name` of the checkpoint, and others that come of the same work, by name."""
        return self._makers[name]()

    def plain(self, digests: Mapping[str, Digest]) -> dict[str, Digest]:
        """Those of `digests` (by tensor) that are of no packed weight."""
        return {name: digest for name, digest in digests.items() if name not in self._of_packed}

    def _list_modules(self, packed: Mapping[str, Any]) -> None:
        linears = [name for name, module in self._model.named_modules() if isinstance(module, torch.nn.Linear)]
        for live_name, name in checkpoint_names(self._model, linears).items():
            if live_name in packed:
                self.schemes[name] = _described(packed[live_name].quantization_scheme)
            else:
                self.unquantized.append(name)

    def _list_tensors(self, packed: Mapping[str, Any]) -> None:
        """Fill `entries` and `_makers` from names, types and shapes.

        transformers hands back the same object when it only renames; what it splits, joins or turns is another. No
        family known to us needs a conversion, because llm-compressor takes experts apart itself.
        """
        shapes = saved_shapes(self._model)
        if lost := [name for name in packed if not {f"{name}.weight", f"{name}.weight_scale"} <= shapes.keys()]:
            raise MoeCollabError(f"{lost[0]}: it has a scheme but no weight, or no scales. Quantize it, then save.")
        scales = {name: shapes.pop(f"{name}.weight_scale") for name in packed}
        for name in packed:
            shapes.pop(f"{name}.weight_zero_point", None)
        own_name = {id(tensor): name for name, tensor in shapes.items()}
        saved = revert_weight_conversion(self._model, dict(shapes))
        renamed = {own_name[id(tensor)] for tensor in saved.values() if id(tensor) in own_name}
        together = self._converted_together(shapes, renamed)
        for saved_as, tensor in saved.items():
            live_name = own_name.get(id(tensor), "")
            module = live_name.removesuffix(".weight")
            entries = [TensorEntry(saved_as, dtype_name(tensor.dtype), tuple(tensor.shape))]
            if not live_name:
                maker = partial(self._make_converted, together[saved_as])
            elif module in packed and live_name == f"{module}.weight":
                maker = partial(self._make_packed, module, saved_as.removesuffix(".weight"))
                entries = _packed_entries(entries[0], packed[module], scales[module])
                self._of_packed.update(entry.name for entry in entries)
            else:
                maker = partial(self._make_plain, live_name, saved_as)
            self.entries += entries
            self._makers |= dict.fromkeys((entry.name for entry in entries), maker)
        if lost := [name for name in packed if f"{name}.weight" not in renamed]:
            raise MoeCollabError(f"{lost[0]}: its weight is joined with others to be saved, so it cannot be packed.")

    def _converted_together(self, shapes: dict[str, torch.Tensor], renamed: set[str]) -> dict[str, list[str]]:
        """Name in the checkpoint -> live names of the tensors that it is made of, and all others of their layer."""
        by_layer: dict[str, list[str]] = defaultdict(list)
        for name in shapes.keys() - renamed:
            layer = re.match(r".*?layers\.\d+\.", name)
            by_layer[layer[0] if layer else ""].append(name)
        found: dict[str, list[str]] = {}
        for names in by_layer.values():
            converted = revert_weight_conversion(self._model, {name: shapes[name] for name in names})
            found |= dict.fromkeys(converted, names)
        return found

    def _make_plain(self, live_name: str, saved_as: str) -> dict[str, torch.Tensor]:
        return {saved_as: _read(self._model, live_name)}

    def _make_converted(self, live_names: list[str]) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(self._model, {name: _read(self._model, name) for name in live_names})

    def _make_packed(self, live_name: str, name: str) -> dict[str, torch.Tensor]:
        module = self._model.get_submodule(live_name)
        # Codes of 7 and 8 bits divide out one step off in bfloat16, and a model in memory has no others.
        if is_packed(module) and module.quantization_scheme.weights.num_bits < 7:
            rounded: PackedGrid = module._parameters.rounded
            codes, scale, zero_point, words = rounded.codes(), rounded.scales, rounded.zeros, rounded.words
            if complaint := _complaint_of_codes(codes, scale, zero_point):
                self.unsound[f"{name}.weight"] = complaint
        else:
            if complaint := _complaint(module):  # before the codes, which there may not be
                self.unsound[f"{name}.weight"] = complaint
            codes, scale, zero_point = codes_of(module)
            words = _packed(codes, scale, module.quantization_scheme)
        if not complaint:
            self.digests[name] = weight_digest(codes, scale, zero_point)
        tensors = {"weight_packed": words, "weight_scale": scale}
        tensors["weight_shape"] = torch.tensor(codes.shape)
        if zero_point is not None:
            bits = module.quantization_scheme.weights.num_bits
            tensors["weight_zero_point"] = pack(zero_point.to(torch.int8), bits, packed_dim=0)
        return {f"{name}.{own}": tensor for own, tensor in tensors.items()}

    def _leave_out_equal_head(self) -> bool:
        """Store an lm_head equal to the embeddings once.

        Offloading makes two parameters of one tied weight, so transformers does not see that they are one.
        """
        modules = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        names = [next((n for n, m in self._model.named_modules() if m is module), None) for module in modules]
        if None in names or names[0] == names[1]:
            return False
        embeddings, head = (f"{n}.weight" for n in checkpoint_names(self._model, [str(n) for n in names]).values())
        listed = {entry.name: entry for entry in self.entries}
        biased = head.removesuffix("weight") + "bias" in listed
        if biased or not {embeddings, head} <= listed.keys() or listed[embeddings].shape != listed[head].shape:
            return False
        if tensor_digest(self.make(embeddings)[embeddings]) != tensor_digest(self.make(head)[head]):
            return False
        self.entries.remove(listed[head])
        return True


def _quantized_modules(model: Any) -> dict[str, Any]:
    """Live name -> module, for each that has a scheme for its weights."""
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        weights, layout = scheme.weights, str(getattr(scheme.format, "value", scheme.format or "pack-quantized"))
        kind, strategy = (str(getattr(it, "value", it)) for it in (weights.type, weights.strategy))
        ours = kind == "int" and strategy in ("group", "channel") and 2 <= weights.num_bits <= 8
        if not (ours and layout in ("pack-quantized", TERNARY_PACKED) and isinstance(module, torch.nn.Linear)):
            raise MoeCollabError(
                f"{name}: {weights.num_bits}-bit {kind} by {strategy} in a {type(module).__name__}, format {layout}, "
                "cannot be saved. What can: linear layers, integers of 2 to 8 bits by group or channel, formats "
                f"pack-quantized and {TERNARY_PACKED}. Nothing was saved."
            )
        found[name] = module
    return found


def _read(model: Any, name: str) -> torch.Tensor:
    """One parameter or buffer, read from where it is offloaded."""
    module, _, own = name.rpartition(".")
    return getattr(model.get_submodule(module), own)


def _described(scheme: QuantizationScheme) -> dict[str, Any]:
    described = scheme.model_dump(mode="json", exclude={"targets"})
    described["format"] = described.get("format") or "pack-quantized"
    return described


def _packed_entries(weight: TensorEntry, module: Any, scale: torch.Tensor) -> list[TensorEntry]:
    """What a quantized weight is stored as; `weight` and `scale` tell its name, shapes and types."""
    scheme = module.quantization_scheme
    arguments, (rows, columns) = scheme.weights, weight.shape
    return quantized_entries(
        weight.name.removesuffix(".weight"),
        (rows, columns),
        TERNARY if is_ternary(scheme) else arguments.num_bits,
        arguments.group_size,
        arguments.symmetric,
        dtype_name(scale.dtype),
    )


def _packed(codes: torch.Tensor, scale: torch.Tensor, scheme: QuantizationScheme) -> torch.Tensor:
    """Codes [rows, columns] in the bit layout of `scheme`."""
    arguments: Any = scheme.weights
    if is_ternary(scheme):
        return pack_ternary(codes.cpu(), codes.shape[1] // scale.shape[1])
    return pack(codes.cpu(), arguments.num_bits)


def _complaint_of_codes(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> str | None:
    """As `_complaint`, of a weight that is on its grid."""
    if not _is_finite(scale):
        return _NOT_FINITE
    grouped = codes.view(*scale.shape, -1)
    empty = not (grouped if zero_point is None else grouped != zero_point[..., None]).any()
    return _NOT_ON_GRID if empty or not scale.all() else None


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _complaint(module: Any) -> str | None:
    """Why the weight is not one that a quantizer rounded, None if it is."""
    if is_sound(module):
        return None
    if not (_is_finite(module.weight) and _is_finite(module.weight_scale)):
        return _NOT_FINITE
    return _NOT_ON_GRID
