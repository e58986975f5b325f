"""vLLM's MoE method over our arena: allocate, place each loaded tensor, check completeness, run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ..errors import MoeCollabError
from ..formats import pack, unpack
from ..kernels.descriptors import Field, TensorSpec, plan_arena
from ..kernels.reference import fused_experts

__all__ = ["ExpertSchemes", "MixedBitMoEMethod"]

logger = init_logger("vllm.moe_collab")

_SHARDS = {"w1": 0, "w3": 1, "w2": 2}
_DOWN = 2
_PLACEHOLDERS = [
    f"{fused}_{suffix}"
    for fused in ("w13", "w2")
    for suffix in ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
]


@dataclass(frozen=True)
class ExpertSchemes:
    """How the checkpoint stores each global expert's gate, up and down; None = unquantized."""

    prefix: str
    projections: tuple[str, str, str]
    table: list[tuple[QuantizationArgs | None, ...]]

    def name(self, expert: int, projection: int) -> str:
        """Checkpoint name of a module."""
        return f"{self.prefix}.{expert}.{self.projections[projection]}"


class MixedBitMoEMethod(FusedMoEMethodBase):
    """Routed experts of any mix of bits; routing and shared experts stay vLLM's."""

    def __init__(self, moe: FusedMoEConfig, schemes: ExpertSchemes) -> None:
        super().__init__(moe)
        self.schemes = schemes

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: the arena is ours alone."""
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate the arenas, and placeholders that catch the checkpoint's tensor names."""
        self._global_ids = _global_ids(layer, num_experts)
        hidden, width = hidden_size, intermediate_size_per_partition
        sizes = ((width, hidden), (width, hidden), (hidden, width))
        layout = plan_arena([[self._spec(g, p, *sizes[p]) for p in range(3)] for g in self._global_ids])
        self._table = layout.table.tolist()
        self._loaded: set[tuple[int, int, str]] = set()
        layer.register_buffer("arena_table", layout.table, persistent=False)
        arenas = {
            "arena_codes": torch.zeros(layout.num_words, dtype=torch.int32),
            "arena_scales": torch.zeros(layout.num_scales, dtype=torch.float32),
            "arena_zero_points": torch.zeros(layout.num_zero_points, dtype=torch.int8),
        }
        for name, arena in arenas.items():
            layer.register_buffer(name, arena, persistent=False)
        for name in _PLACEHOLDERS:
            parameter = torch.nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": self._loader(layer, name.split("_", 1)[1])})

    def _spec(self, expert: int, projection: int, rows: int, columns: int) -> TensorSpec:
        scheme = self.schemes.table[expert][projection]
        if scheme is None:
            return TensorSpec(16, rows, columns)
        if scheme.actorder in ("group",):
            name = self.schemes.name(expert, projection)
            raise MoeCollabError(f"{name}: actorder `group` (weight_g_idx) is not served. Quantize with `static`.")
        group = self._group_size(scheme, projection, columns)
        return TensorSpec(scheme.num_bits, rows, columns, group, bool(scheme.symmetric))

    def _stored_group(self, scheme: QuantizationArgs, projection: int, descriptor_columns: int) -> int:
        """Group size of the checkpoint; a channel is one group over the columns of all ranks."""
        if scheme.group_size in (None, -1):
            return descriptor_columns * (self._tensor_parallel()[0] if projection == _DOWN else 1)
        return int(scheme.group_size)

    def _group_size(self, scheme: QuantizationArgs, projection: int, columns: int) -> int:
        """Of this rank's columns; a stored group that straddles ranks is cut into smaller equal ones."""
        return math.gcd(self._stored_group(scheme, projection, columns), columns)

    def _tensor_parallel(self) -> tuple[int, int]:
        """(ranks that share an expert, our rank among them)."""
        if self.moe.moe_parallel_config.use_ep:
            return 1, 0
        return self.moe.tp_size, self.moe.tp_rank

    def _loader(self, layer: Any, kind: str) -> Any:
        def load(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str | None = None,
            shard_id: str | None = None,
            expert_id: int | None = None,
            return_success: bool = False,
        ) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local != -1:
                self._place(layer, kind, local, _SHARDS[str(shard_id)], loaded_weight)
            return local != -1 if return_success else None

        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def _place(self, layer: Any, kind: str, local: int, projection: int, tensor: torch.Tensor) -> None:
        """Cut one checkpoint tensor for this rank and write it into the arena."""
        expert = self._global_ids[local]
        name = self.schemes.name(expert, projection)
        scheme = self.schemes.table[expert][projection]
        descriptor = self._table[local][projection]
        if (kind == "weight") != (scheme is None) or kind == "weight_g_idx":
            raise MoeCollabError(f"{name}.{kind}: contradicts config.json, which stores this module as {scheme}.")
        try:
            if kind == "weight":
                self._place_dense(layer, descriptor, projection, tensor)
            elif kind == "weight_packed":
                self._place_codes(layer, descriptor, projection, tensor)
            elif kind == "weight_shape":
                _expect(tensor.tolist(), self._full_shape(descriptor, projection))
            else:
                groups = self._full_shape(descriptor, projection)[1] // self._stored_group(
                    scheme, projection, descriptor[Field.COLUMNS]
                )
                self._place_groups(layer, descriptor, projection, tensor, kind, groups)
        except (MoeCollabError, RuntimeError) as error:
            raise MoeCollabError(f"{name}.{kind}: {error} The checkpoint is truncated or its config wrong.") from error
        self._loaded.add((local, projection, kind))

    def _full_shape(self, descriptor: list[int], projection: int) -> tuple[int, int]:
        ranks, _ = self._tensor_parallel()
        rows, columns = descriptor[Field.ROWS], descriptor[Field.COLUMNS]
        return (rows, columns * ranks) if projection == _DOWN else (rows * ranks, columns)

    def _cut(self, tensor: torch.Tensor, projection: int) -> torch.Tensor:
        """This rank's rows (gate, up) or columns (down)."""
        ranks, rank = self._tensor_parallel()
        return tensor.chunk(ranks, dim=1 if projection == _DOWN else 0)[rank].contiguous()

    def _place_dense(self, layer: Any, descriptor: list[int], projection: int, weight: torch.Tensor) -> None:
        _expect(weight.shape, self._full_shape(descriptor, projection))
        if weight.dtype != torch.bfloat16:
            raise MoeCollabError(f"unquantized experts are served in bfloat16, not {weight.dtype}.")
        _write(layer.arena_codes, descriptor[Field.CODES], self._cut(weight, projection).view(torch.int32))

    def _place_codes(self, layer: Any, descriptor: list[int], projection: int, packed: torch.Tensor) -> None:
        bits = descriptor[Field.NUM_BITS]
        codes = unpack(packed, bits, self._full_shape(descriptor, projection))
        _write(layer.arena_codes, descriptor[Field.CODES], pack(self._cut(codes, projection), bits))

    def _place_groups(
        self, layer: Any, descriptor: list[int], projection: int, tensor: torch.Tensor, kind: str, groups: int
    ) -> None:
        rows, columns = self._full_shape(descriptor, projection)
        arena, field = layer.arena_scales, Field.SCALES
        if kind == "weight_zero_point":
            tensor = unpack(tensor, descriptor[Field.NUM_BITS], (rows, groups), packed_dim=0)
            arena, field = layer.arena_zero_points, Field.ZERO_POINTS
        _expect(tensor.shape, (rows, groups))
        repeated = tensor.repeat_interleave(columns // groups // descriptor[Field.GROUP_SIZE], dim=1)
        _write(arena, descriptor[field], self._cut(repeated, projection))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a checkpoint that lacks a tensor this rank needs; drop the placeholders."""
        missing = [
            f"{self.schemes.name(self._global_ids[local], projection)}.{kind}"
            for local, descriptors in enumerate(self._table)
            for projection, descriptor in enumerate(descriptors)
            for kind in _needed(descriptor)
            if (local, projection, kind) not in self._loaded
        ]
        if missing:
            raise MoeCollabError(
                f"the checkpoint lacks {len(missing)} tensors of {self.schemes.prefix}, the first {missing[0]}. "
                "Copy or make it again."
            )
        self._loaded.clear()
        for name in _PLACEHOLDERS:
            delattr(layer, name)
        bits = sorted({d[Field.NUM_BITS] for descriptors in self._table for d in descriptors})
        logger.info_once("moe_collab serves experts of %s bits with the torch reference backend", str(bits))

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The routed experts' output [tokens, hidden], not yet reduced over ranks."""
        return fused_experts(
            x,
            topk_weights,
            topk_ids,
            layer.arena_codes,
            layer.arena_scales,
            layer.arena_zero_points,
            layer.arena_table,
            layer.expert_map,
            layer.activation.value,
            layer.apply_router_weight_on_input,
        )


def _global_ids(layer: Any, num_local: int) -> list[int]:
    """Global expert id of each local one."""
    if layer._expert_map is None:
        return list(range(num_local))
    ids = [0] * num_local
    for expert, local in enumerate(layer._expert_map.tolist()):
        if local >= 0:
            ids[local] = expert
    return ids


def _needed(descriptor: list[int]) -> list[str]:
    if descriptor[Field.NUM_BITS] == 0:
        return []
    if descriptor[Field.NUM_BITS] == 16:
        return ["weight"]
    zero = [] if descriptor[Field.ZERO_POINTS] < 0 else ["weight_zero_point"]
    return ["weight_packed", "weight_scale", *zero]


def _expect(shape: Any, expected: tuple[int, int]) -> None:
    if tuple(shape) != tuple(expected):
        raise MoeCollabError(f"shape {list(shape)}, expected {list(expected)}.")


def _write(arena: torch.Tensor, start: int, values: torch.Tensor) -> None:
    arena[start : start + values.numel()] = values.flatten().to(arena.dtype)
