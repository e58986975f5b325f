"""What a live model is before it is saved, as digests by the tensors' names in the checkpoint.

What is read back from disk must have the same digests. Models that are offloaded to disk are larger than memory, so
tensors are read one at a time and let go.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationScheme
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...checkpoint.verify import Digest, tensor_digest, weight_digest
from .naming import checkpoint_names
from .schemes import codes_of, is_sound

__all__ = ["Snapshot", "plain_digests", "snapshot_of"]


_REMEMBERED = "_moe_collab_unsound"


@dataclass(frozen=True)
class Snapshot:
    """The linear layers of a live model, by their names in the checkpoint, and its other tensors."""

    quantized: dict[str, Digest] = field(default_factory=dict)
    """Digest of the codes, scales and zero points of each sound quantized module."""
    schemes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Scheme of each quantized module, as in config.json, without its targets."""
    unquantized: list[str] = field(default_factory=list)
    """Linear layers without a scheme."""
    plain: dict[str, Digest] = field(default_factory=dict)
    """Digest of each tensor that is saved as it is."""
    unsound: dict[str, str] = field(default_factory=dict)
    """What is wrong with each quantized weight that cannot be stored as what it is, by tensor name."""
    unsound_modules: list[tuple[Any, str]] = field(default_factory=list)
    """The live modules of those weights, each with what is wrong."""

    def remember_unsound(self) -> None:
        """Have later snapshots complain too: what is packed, or was, lies on a grid and looks sound.

        A module that is given another scheme is looked at anew.
        """
        for module, complaint in self.unsound_modules:
            setattr(module, _REMEMBERED, (module.quantization_scheme, complaint))


@torch.no_grad()
def snapshot_of(model: Any) -> Snapshot:
    """Digests of all tensors of `model`; nothing is changed, and one module is in memory at a time."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = checkpoint_names(model, list(linears))
    found = Snapshot(plain=plain_digests(model))
    for live_name, module in linears.items():
        name, scheme = names[live_name], getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            found.unquantized.append(name)
            continue
        found.schemes[name] = _described(scheme)
        if complaint := _complaint(module):
            found.unsound[f"{name}.weight"] = complaint
            found.unsound_modules.append((module, complaint))
        else:
            found.quantized[name] = weight_digest(*codes_of(module))
    return found


def _described(scheme: QuantizationScheme) -> dict[str, Any]:
    described = scheme.model_dump(mode="json", exclude={"targets"})
    described["format"] = described.get("format") or "pack-quantized"
    return described


def _complaint(module: Any) -> str | None:
    """Why the weight is not one that a quantizer rounded, None if it is. What is packed was looked at before."""
    scheme, remembered = getattr(module, _REMEMBERED, (None, None))
    if scheme is module.quantization_scheme:
        return remembered
    if hasattr(module, "weight_packed") or is_sound(module):
        return None
    if not (torch.isfinite(module.weight).all() and torch.isfinite(module.weight_scale).all()):
        return "not finite; the weight or its scales hold NaN or infinity"
    return "not on the grid of its scales; was it quantized?"


@torch.no_grad()
def plain_digests(model: Any) -> dict[str, Digest]:
    """Checkpoint name -> digest of every tensor that is saved as it is, each read when its turn comes."""
    digests: dict[str, Digest] = {}
    for group in _saved_together(model, _plain_shapes(model)):
        if isinstance(group, tuple):
            name, saved_as = group
            digests[saved_as] = tensor_digest(_read(model, name))
        else:
            converted = revert_weight_conversion(model, {name: _read(model, name) for name in group})
            digests |= {saved_as: tensor_digest(tensor) for saved_as, tensor in converted.items()}
    return _without_equal_head(model, digests)


def _plain_shapes(model: Any) -> dict[str, torch.Tensor]:
    """Name -> tensor without data, for each that is saved and belongs to no quantized module. None is read."""
    packed = {n for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    with disable_onloading():
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
        return {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in state.items()
            if name.rpartition(".")[0] not in packed
        }


def _saved_together(model: Any, shapes: dict[str, torch.Tensor]) -> Iterator[tuple[str, str] | list[str]]:
    """(name, name in the checkpoint) of tensors that are only renamed; names of those that are converted, by layer.

    transformers hands back the same object when it only renames; what it splits, joins or turns is another. No family
    known to us needs a conversion, because llm-compressor takes experts apart itself.
    """
    own_name = {id(tensor): name for name, tensor in shapes.items()}
    renamed = {
        own_name[id(tensor)]: saved_as
        for saved_as, tensor in revert_weight_conversion(model, dict(shapes)).items()
        if id(tensor) in own_name
    }
    yield from renamed.items()
    by_layer: dict[str, list[str]] = defaultdict(list)
    for name in shapes.keys() - renamed.keys():
        layer = re.match(r".*?layers\.\d+\.", name)
        by_layer[layer[0] if layer else ""].append(name)
    yield from by_layer.values()


def _read(model: Any, name: str) -> torch.Tensor:
    """One parameter or buffer, read from where it is offloaded."""
    module, _, own = name.rpartition(".")
    return getattr(model.get_submodule(module), own)


def _without_equal_head(model: Any, digests: dict[str, Digest]) -> dict[str, Digest]:
    """Leave out an lm_head equal to the embeddings: llm-compressor ties the two before it saves, so it is stored once.

    Offloading makes two parameters of one tied weight, so transformers does not see that they are one.
    """
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [next((n for n, m in model.named_modules() if m is module), None) for module in modules]
    if None in names or names[0] == names[1]:
        return digests
    embeddings, head = (f"{name}.weight" for name in checkpoint_names(model, [str(n) for n in names]).values())
    if head not in digests or digests[head] != digests.get(embeddings):
        return digests
    return {name: digest for name, digest in digests.items() if name != head}
