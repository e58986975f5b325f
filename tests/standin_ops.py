"""The operations of the stand-in accelerator (`standin.py`), and what its tensors are made of.

All are one function, `_compute`: each operand is wrapped as a CPU tensor over the same memory, the CPU computes, and
new results are wrapped as the stand-in's. Below it is what must not go that way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from moe_collab.kernels.cpu import load

__all__ = ["NAME", "register"]

NAME = "standin"

aten = torch.ops.aten
_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_DL_EXTENSION = 12  # kDLExtDev: torch takes it for its one device that extensions may define

# Views: the CPU's kernels only make another tensor of the same storage and the same keys, whatever the device.
_VIEWS = ("as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex")
_SETS = ("set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "set_")
# torch would take these apart by kernels or choices of its own that know the devices by name.
_WHOLE = ("convolution", "convolution_backward", "_grouped_mm")
# Operands that CUDA takes from the CPU: indices, and (outside pointwise operations) values without a dimension.
_CPU_INDICES = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")
# The loops of rounding, which another accelerator would have kernels of its own for.
_ROUNDING = ("moe_collab::round_search", "moe_collab::round_feed_back", "moe_collab::round_descend")
_CPU_SCALARS = (*_CPU_INDICES, "aten::fill_", "aten::masked_fill_", "aten::masked_fill", "aten::where")


# --- tensors -----------------------------------------------------------------------------------------------------


def _wrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The stand-in's tensor over the memory of a CPU tensor, which lives as long as it does."""
    whole = tensor.is_contiguous() and min(tensor.shape, default=0) > 1
    whole = whole and tensor.untyped_storage().nbytes() == tensor.nbytes
    if not whole:  # DLPack knows neither what lies before a tensor, nor the strides of dimensions of size 1
        storage = tensor.untyped_storage()
        flat = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))
    capsule = torch._C._to_dlpack(tensor if whole else flat)
    address = _capsule_pointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(address + ctypes.sizeof(ctypes.c_void_p)).value = _DL_EXTENSION  # DLTensor.device
    result = torch._C._from_dlpack(capsule)
    return result if whole else _as_strided(result, tensor.shape, tensor.stride(), tensor.storage_offset())


_as_strided = partial(aten.as_strided.default.redispatch, _CPU_KERNEL)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Twins:
    """CPU tensors over the memory of the stand-in's, for one operation: they do not keep that memory alive."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[Any, torch.Tensor]] = {}
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        for original, twin in self.pairs:
            if original is tensor:
                return twin
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        twin = torch.empty(0, dtype=tensor.dtype)
        if pointer and size:
            if pointer not in self.storages:
                copy = torch._C._construct_storage_from_data_pointer(pointer, torch.device("cpu"), size)
                self.storages[pointer] = (copy, tensor)
            twin.set_(self.storages[pointer][0], tensor.storage_offset(), tensor.shape, tensor.stride())
        elif tensor.dim() != 1:
            twin = twin.as_strided(tensor.shape, tensor.stride())
        twin = twin.conj() if tensor.is_conj() else twin
        twin = torch._neg_view(twin) if tensor.is_neg() else twin
        self.pairs.append((tensor, twin))
        return twin

    def result(self, tensor: Any) -> Any:
        """What the caller gets for what the CPU's kernel returned: an operand, a view of one, or a new one."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        for original, twin in self.pairs:
            if tensor is twin:
                return original
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in self.storages and tensor.numel():
            base = self.storages[pointer][1]
            if base.dtype != tensor.dtype:
                raise NotImplementedError(f"{NAME}: a view of {base.dtype} as {tensor.dtype}")
            return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return _wrapped(tensor.resolve_conj().resolve_neg())


# --- operations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Argument:
    """What an operation may be given for one of its arguments."""

    name: str
    written: bool
    number_as_tensor: bool  # Python is handed numbers where C++ had passed tensors made of them: it wants them back
    any_from_cpu: bool
    scalar_from_cpu: bool


@cache
def _arguments(op: torch._ops.OpOverload) -> dict[str, _Argument]:
    if op.namespace not in ("aten", "prims") and op._schema.name not in _ROUNDING:
        raise NotImplementedError(f"Could not run '{op}' with arguments from the '{NAME}' backend: only the CPU has it")
    name = op._schema.name
    numbers = not torch._C._should_allow_numbers_as_tensors(name.partition("::")[2])
    scalars = torch.Tag.pointwise in op.tags or name in _CPU_SCALARS
    return {
        argument.name: _Argument(
            argument.name,
            argument.alias_info is not None and argument.alias_info.is_write,
            numbers and str(argument.type) == "Tensor",
            name in _CPU_INDICES and argument.name == "indices",
            scalars,
        )
        for argument in op._schema.arguments
    }


def _compute(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Any operation: refuse what CUDA would, then let the CPU do it."""
    known, twins = _arguments(op), _Twins()

    def to_cpu(argument: _Argument, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.device.type == NAME:
                return twins.of(value)
            return _from_cpu(op, argument, value)
        if isinstance(value, list | tuple):
            return type(value)(to_cpu(argument, item) for item in value)
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{value.device.type}'")
        if argument.number_as_tensor and isinstance(value, int | float | complex):
            return _number(value, args)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    positional = [to_cpu(argument, value) for argument, value in zip(known.values(), args, strict=False)]
    named = {name: to_cpu(known[name], value) for name, value in kwargs.items() if name != "pin_memory"}
    with torch._C._AutoDispatchBelowAutograd():
        results = op(*positional, **named)
    for original, twin in twins.pairs:
        if twin.shape != original.shape:  # an `out=` that was empty
            aten.set_.source_Tensor(original, _wrapped(twin))
    if isinstance(results, list | tuple):
        return type(results)([twins.result(item) for item in results])
    return twins.result(results)


def _from_cpu(op: torch._ops.OpOverload, argument: _Argument, tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor among the stand-in's, if CUDA takes one there."""
    scalar = argument.scalar_from_cpu and tensor.dim() == 0 and not argument.written
    if scalar or argument.any_from_cpu:
        return tensor
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
        f"{tensor.device}! (when checking argument for argument {argument.name} in {op})"
    )


def _number(value: Any, operands: Any) -> torch.Tensor:
    """A number as a tensor that, as numbers do, promotes no operand beyond its kind."""
    tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    if any(tensor.dim() for tensor in tensors) or not tensors:
        return torch.tensor(value)
    return torch.tensor(value, dtype=torch.result_type(tensors[0], value))


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`target.copy_(source)`, the one operation for two devices."""
    twins = _Twins()
    a, b = (twins.of(t) if t.device.type == NAME else t for t in (target, source))
    with torch._C._AutoDispatchBelowAutograd():
        a.copy_(b)
    return target


def _resize(tensor: torch.Tensor, size: Any, memory_format: torch.memory_format | None = None) -> torch.Tensor:
    """`tensor.resize_`: what was in it stays in front, in new memory if it needs more."""
    grown = torch.empty(0, dtype=tensor.dtype).resize_(size)
    room = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
    if grown.numel() <= room:
        return tensor.as_strided_(grown.shape, grown.stride())
    new = _wrapped(grown)
    new.as_strided((tensor.numel(),), (1,)).copy_(tensor.as_strided((tensor.numel(),), (1,)))
    return aten.set_.source_Tensor(tensor, new)


def _histc(tensor: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """`torch.histc`, which CUDA has for integers too: transformers counts the tokens of experts with it."""
    counted = tensor if tensor.is_floating_point() else tensor.double()
    return _compute(aten.histc.default, counted, bins, min, max).to(tensor.dtype)


def _taken_apart() -> set[str]:
    """The operations that the CPU has a kernel for, while a device without one gets them as a formula of others."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::") and has(name, "CPU")]
    composite = ["CompositeImplicitAutograd"] + [f"CompositeExplicitAutograd{end}" for end in ("", "NonFunctional")]
    apart = {name.removeprefix("aten::") for name in names if any(has(name, key) for key in composite)}
    return apart - {"as_strided_"}


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _on_cpu_kernel(name: str) -> Callable[..., torch.Tensor]:
    op = _overload(name)
    return lambda *args, **kwargs: op.redispatch(_CPU_KERNEL, *args, **kwargs)


def register() -> list[torch.library.Library]:
    """Give torch the operations; they last as long as what this returns."""
    everything, ours = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_compute, "PrivateUse1")
    for name in (*_VIEWS, *_SETS):
        ours.impl(name, _on_cpu_kernel(name), "PrivateUse1")
    for name in _taken_apart().union(_WHOLE):
        ours.impl(name, partial(_compute, _overload(name)), "PrivateUse1")
    ours.impl("copy_", _copy, "PrivateUse1")
    ours.impl("resize_", _resize, "PrivateUse1")
    ours.impl("histc", _histc, "PrivateUse1")
    ours.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")
    load()
    rounding = torch.library.Library("moe_collab", "IMPL")
    for name in _ROUNDING:
        op = getattr(torch.ops.moe_collab, name.partition("::")[2]).default
        rounding.impl(name.partition("::")[2], partial(_compute, op), "PrivateUse1")
    return [everything, ours, rounding]
