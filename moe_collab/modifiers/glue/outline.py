"""A live model's outline, made from names and shapes: weights that are offloaded stay where they are."""

from __future__ import annotations

import hashlib
from typing import Any

from compressed_tensors.offload import disable_onloading
from torch import nn

from ...moe_model import MoELayer, MoEModel, describe
from ...outline import LayerOutline, Matrix, ModelOutline
from ...plan import description_digest
from .naming import checkpoint_entries, checkpoint_names, checkpoint_tensors, dtype_name, use_checkpoint_names

__all__ = ["model_fingerprint", "outline_of"]


def outline_of(model: Any, moe: MoEModel) -> ModelOutline:
    """What `model`, whose experts are linearized, is made of, as it would be saved."""
    use_checkpoint_names(model)
    with disable_onloading():
        owners = {name: module for name, module in model.named_modules() if _has_tensors(module)}
        saved = checkpoint_names(model, list(owners))
        places = {
            name: (position, index, projection)
            for position, layer in enumerate(moe.layers)
            for name, index, projection, _ in layer.projections()
        }
        routers = {id(layer.router) for layer in moe.layers}
        matrices = {
            name: _matrix(name, saved[name], module, places.get(name))
            for name, module in owners.items()
            if isinstance(module, nn.Linear) and id(module) not in routers
        }
        return ModelOutline(
            entries=tuple(checkpoint_entries(model)),
            matrices=matrices,
            layers=tuple(_layer(model, moe, layer) for layer in moe.layers),
            limits=moe.limits,
            modules=saved,
            classes=frozenset(type(module).__name__ for module in owners.values()),
            tied_head=_tied_head(model),
        )


def model_fingerprint(model: Any) -> str:
    """Twelve digits that change with the model's tensors (names, shapes) and with its routers' weights."""
    moe = describe(model)
    routers = hashlib.sha256()
    for layer in moe.layers:
        routers.update(layer.router.weight.detach().float().cpu().numpy().tobytes())  # type: ignore[operator]
    with disable_onloading():
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return description_digest({"shapes": shapes, "routers": routers.hexdigest(), "top_k": moe.top_k})


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module._parameters.values(), *module._buffers.values()))


def _matrix(name: str, saved_as: str, module: nn.Linear, place: tuple[int, int, str] | None) -> Matrix:
    rows, columns = module.weight.shape
    dtype = dtype_name(module.weight.dtype)
    return Matrix(name, saved_as, (rows, columns), dtype, *(place or ()))


def _layer(model: Any, moe: MoEModel, layer: MoELayer) -> LayerOutline:
    return LayerOutline(
        name=layer.name,
        experts_name=layer.experts_name,
        live_experts=tuple(layer.live_experts),
        router_tensors=tuple(checkpoint_tensors(model, _router_tensors(moe, layer)).values()),
        has_selection_bias=layer.bias_holder is not None,
    )


def _router_tensors(moe: MoEModel, layer: MoELayer) -> list[str]:
    """Names of the tensors of a layer's router, and of a selection bias beside it: a row for each expert."""
    router = f"{layer.name}.{moe.family.router}"
    names = [f"{router}.{name}" for name in (*layer.router._parameters, *layer.router._buffers)]
    beside = layer.bias_holder is layer.block
    return [*names, f"{layer.name}.e_score_correction_bias"] if beside else names


def _tied_head(model: Any) -> str | None:
    """Name of the lm_head if the config says that its weight is the embeddings'."""
    head = model.get_output_embeddings()
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return None
    return next(name for name, module in model.named_modules() if module is head)
