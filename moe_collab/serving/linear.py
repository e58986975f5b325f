"""vLLM's linear method over our arena, for attention, shared experts and lm_head in packed integers."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    DCPGroupColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear
from vllm.model_executor.utils import set_weight_attrs

from ..errors import MoeCollabError
from ..formats import Scheme
from ..kernels.arena import Cut
from ..kernels.backends import activation_bits, backend
from .weights import KINDS, CheckpointArena, make_spec

__all__ = ["SERVED", "MixedBitLinearMethod"]

SERVED = (
    ColumnParallelLinear,
    DCPGroupColumnParallelLinear,
    DeepSeekV2FusedQkvAProjLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
"""The very classes whose sharding we know; a subclass may shard in another way."""

_QKV = ("q", "k", "v")


class MixedBitLinearMethod(LinearMethodBase):
    """One weight, or a fused one whose parts (`names`, `schemes`) may differ in bits."""

    def __init__(self, names: list[str], schemes: list[Scheme]) -> None:
        self.names, self.schemes = names, schemes
        # Looked up here, as the op below is: torch.compile does not trace the look-up.
        self._activation_bits = activation_bits()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate the arena, and placeholders that catch the checkpoint's tensor names."""
        if len(output_partition_sizes) != len(self.names):
            raise MoeCollabError(
                f"{self.names[0]}: {len(output_partition_sizes)} fused parts, {len(self.names)} names."
            )
        columns, self._dtype = input_size_per_partition, params_dtype
        kept = _cuts(layer, output_partition_sizes, input_size, columns)
        self._cuts = [cut for _, cut in kept]
        specs = [
            make_spec(name, scheme, (rows, columns), input_size)
            for name, scheme, (rows, _) in zip(self.names, self.schemes, kept, strict=True)
        ]
        self._arena = CheckpointArena(specs, self.names, self.schemes)
        self._rows = sum(rows for rows, _ in kept)
        # Of lm_head: rows beyond the vocabulary, which make it divisible.
        self._padding = sum(output_partition_sizes) - self._rows
        for kind in KINDS:
            parameter = torch.nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
            layer.register_parameter(kind, parameter)
            set_weight_attrs(parameter, {"weight_loader": self._loader(kind)})

    def _loader(self, kind: str) -> Any:
        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, shard_id: str | int | None = None) -> None:
            if shard_id is None and len(self.names) > 1:
                raise MoeCollabError(f"{self.names[0]}.{kind}: parts fused in the checkpoint are not served.")
            index = 0 if shard_id is None else _QKV.index(shard_id) if shard_id in _QKV else int(shard_id)
            self._arena.place(index, kind, loaded_weight, self._cuts[index])

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a checkpoint that lacks a tensor; drop the placeholders."""
        self._arena.check(self.names[0])
        self._arena.register(layer)
        specs = self._arena.specs
        self._linear = backend().linear(specs)
        del self._arena
        for kind in KINDS:
            delattr(layer, kind)
        # Multi-head latent attention asks a layer for one of its weights before it calls `apply`.
        layer.weight_packed = layer.arena_codes
        for tokens in backend().batches(specs, None):
            x = torch.zeros(tokens, specs[0].columns, dtype=self._dtype, device=layer.arena_codes.device)
            self.apply(layer, x, layer.bias)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias, [..., rows of this rank]."""
        out = self._linear(
            x.reshape(-1, x.shape[-1]).contiguous(),
            layer.arena_codes,
            layer.arena_scales,
            layer.arena_zero_points,
            layer.arena_table,
            None if bias is None else bias.float(),
            self._activation_bits,
            self._rows,
        )
        if self._padding:
            out = torch.nn.functional.pad(out, (0, self._padding))
        return out.view(*x.shape[:-1], out.shape[-1])


def _cuts(layer: Any, sizes: list[int], input_size: int, columns: int) -> list[tuple[int, Cut]]:
    """(rows, cut) of each part's checkpoint tensor that this rank keeps."""
    if isinstance(layer, ParallelLMHead):
        rows = layer.shard_indices
        kept = rows.org_vocab_end_index - rows.org_vocab_start_index
        return [(kept, Cut((layer.org_vocab_size, input_size), row=rows.org_vocab_start_index))]
    if isinstance(layer, ReplicatedLinear):
        return [(rows, Cut((rows, input_size))) for rows in sizes]
    rank, ranks = layer.tp_rank, layer.tp_size
    if isinstance(layer, RowParallelLinear):
        return [(rows, Cut((rows, input_size), column=rank * columns)) for rows in sizes]
    # Where there are fewer key and value heads than ranks, several ranks hold the same ones.
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) else 1
    shares = [1 if index == 0 else replicas for index in range(len(sizes))]
    return [
        (rows, Cut((rows * ranks // share, input_size), row=rank // share * rows))
        for rows, share in zip(sizes, shares, strict=True)
    ]
