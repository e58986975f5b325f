"""vLLM's MoE method over our arena: allocate, place each loaded tensor, check completeness, run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ..architectures import is_masked
from ..errors import MoeCollabError
from ..formats import PRUNED, Scheme
from ..kernels.arena import Cut
from ..kernels.backends import activation_bits, backend
from ..kernels.descriptors import TensorSpec
from .weights import KINDS, CheckpointArena, make_spec

__all__ = ["ExpertSchemes", "MixedBitMoEMethod"]

logger = init_logger("vllm.moe_collab")

# What loading leaves free for what comes after it; without a setting vLLM sizes its cache by what is left.
_USUAL_KV_CACHE = 4 << 30
_WORKING_MEMORY = 1 << 30
_SHARDS = {"w1": 0, "w3": 1, "w2": 2}
# Limit, alpha, beta. vLLM's two activations of this mathematics differ in how a checkpoint interleaves gate and up,
# which we keep apart; in one of them the numbers are fixed.
_SWIGLUOAI = (7.0, 1.702, 1.0)


@dataclass(frozen=True)
class ExpertSchemes:
    """How the checkpoint stores each global expert's gate, up and down."""

    prefix: str
    projections: tuple[str, str, str]
    table: list[tuple[Scheme, ...]]

    def name(self, expert: int, projection: int) -> str:
        """Checkpoint name of a module."""
        return f"{self.prefix}.{expert}.{self.projections[projection]}"


class MixedBitMoEMethod(FusedMoEMethodBase):
    """Routed experts of any mix of bits; routing and shared experts stay vLLM's."""

    def __init__(self, moe: FusedMoEConfig, schemes: ExpertSchemes) -> None:
        super().__init__(moe)
        self.schemes = schemes
        self._activation = _activation(moe, schemes.prefix)
        # Looked up here, as the op below is: torch.compile does not trace the look-up.
        self._activation_bits = activation_bits()
        kv_cache = get_current_vllm_config().cache_config.kv_cache_memory_bytes
        self._keep_free = (_USUAL_KV_CACHE if kv_cache is None else kv_cache) + _WORKING_MEMORY

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
        """Allocate the arena, and placeholders that catch the checkpoint's tensor names."""
        ranks, rank = self._tensor_parallel()
        width, full = intermediate_size_per_partition, intermediate_size_per_partition * ranks
        gate_up = ((width, hidden_size), Cut((full, hidden_size), row=rank * width))
        down = ((hidden_size, width), Cut((hidden_size, full), column=rank * width))
        self._parts = (gate_up, gate_up, down)
        specs, names, schemes = [], [], []
        for expert in _global_ids(layer, num_experts):
            for projection, (shape, cut) in enumerate(self._parts):
                names.append(self.schemes.name(expert, projection))
                schemes.append(self.schemes.table[expert][projection])
                specs.append(make_spec(names[-1], schemes[-1], shape, cut.shape[1]))
        self._arena = CheckpointArena(specs, names, schemes, self.moe.has_bias)
        kinds = (*KINDS, "bias") if self.moe.has_bias else KINDS
        self._placeholders = [f"{fused}_{kind}" for fused in ("w13", "w2") for kind in kinds]
        for name in self._placeholders:
            parameter = torch.nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": self._loader(layer, name.split("_", 1)[1])})

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
                projection = _SHARDS[str(shard_id)]
                self._arena.place(3 * local + projection, kind, loaded_weight, self._parts[projection][1])
            return local != -1 if return_success else None

        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a checkpoint that lacks a tensor this rank needs; drop the placeholders."""
        self._check_absent(layer.e_score_correction_bias)
        self._arena.check(self.schemes.prefix)
        if backend().widen_ternary(self._arena, self._keep_free):
            logger.info_once("moe_collab keeps ternary experts in 1.6 bits, which is slower: memory is short")
        backend().tune(self._arena)
        self._arena.register(layer)
        layer.arena_table = layer.arena_table.view(-1, 3, layer.arena_table.shape[1])
        self._fused_experts = backend().fused_experts(self._arena.specs)
        specs = self._arena.specs
        del self._arena
        for name in self._placeholders:
            delattr(layer, name)
        self._compile(layer, specs)
        bits = sorted({spec.num_bits for spec in specs})
        logger.info_once("moe_collab serves experts of %s bits with backend: %s", str(bits), backend().name)

    def _compile(self, layer: Any, specs: list[TensorSpec]) -> None:
        """Now, not during the first requests."""
        top_k, device = self.moe.experts_per_token, layer.arena_codes.device
        for tokens in backend().batches(specs, top_k):
            x = torch.zeros(tokens, specs[0].columns, dtype=self.moe.in_dtype, device=device)
            weights = torch.zeros(tokens, top_k, dtype=torch.float32, device=device)
            self.apply(layer, x, weights, weights.int(), None, None)

    def _check_absent(self, bias: torch.Tensor | None) -> None:
        """Refuse an absent expert that the router, now that its selection bias [experts] is loaded, can select."""
        for expert, schemes in enumerate(self.schemes.table):
            if PRUNED in schemes and (bias is None or not is_masked(bias[expert])):
                raise MoeCollabError(
                    f"{self.schemes.prefix}.{expert}: config.json names no scheme for it, as if it were pruned, but "
                    "its router can select it. Copy or make the checkpoint again."
                )

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
        return self._fused_experts(
            x,
            topk_weights,
            topk_ids,
            layer.arena_codes,
            layer.arena_scales,
            layer.arena_zero_points,
            layer.arena_table,
            layer.arena_bias,
            layer.expert_map,
            self._activation,
            layer.apply_router_weight_on_input,
            self._activation_bits,
        )


def _activation(moe: FusedMoEConfig, prefix: str) -> str:
    """What the kernels call it. Raises `MoeCollabError` if they do not know it."""
    name, numbers = moe.activation.value, (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta)
    if name == "swigluoai" or (name == "swigluoai_uninterleave" and numbers == _SWIGLUOAI):
        return "swigluoai"
    if name in ("silu", "gelu", "gelu_tanh") and moe.swiglu_limit is None:
        return name
    raise MoeCollabError(
        f"{prefix}: experts with activation {name}, swiglu_limit, alpha, beta = {numbers} are not served. Quantize "
        "them alike, in 4 or 8 bits: then vLLM's own kernels serve them on GPUs."
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
