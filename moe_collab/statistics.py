"""What one calibration pass observes about a router: who is chosen, how often, with which weight."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .errors import MoeCollabError

__all__ = ["RouterStatistics", "routed_weights"]


@dataclass
class RouterStatistics:
    """Counts and weights of a router's decisions, accumulated in float64."""

    num_experts: int
    tokens: int = 0
    selections: torch.Tensor = field(init=False)
    weight_sum: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.selections = torch.zeros(self.num_experts, dtype=torch.float64)
        self.weight_sum = torch.zeros(self.num_experts, dtype=torch.float64)

    def update(self, weights: torch.Tensor, indices: torch.Tensor, scaling_factor: float = 1.0) -> None:
        """Add one batch: `weights` and `indices` [tokens, top_k]; weights are divided by `scaling_factor`."""
        flat = indices.reshape(-1).cpu()
        self.tokens += indices.shape[0]
        self.selections += torch.bincount(flat, minlength=self.num_experts)
        self.weight_sum.index_add_(0, flat, weights.reshape(-1).double().cpu() / scaling_factor)

    @property
    def frequency(self) -> torch.Tensor:
        """f_e = selections / tokens, [num_experts]."""
        return self.selections / max(self.tokens, 1)

    @property
    def mean_weight(self) -> torch.Tensor:
        """s_e = mean router weight when selected, 0 for an expert never selected, [num_experts]."""
        return self.weight_sum / self.selections.clamp(min=1)

    def check_finite(self, layer: str) -> None:
        """Raise `MoeCollabError` naming the layer and experts whose statistics are NaN or infinite."""
        bad = (~torch.isfinite(self.weight_sum)).nonzero().flatten().tolist()
        if bad:
            raise MoeCollabError(
                f"{layer}: the router weights of experts {bad} are NaN or infinite on the calibration data. "
                "Check the model and the data; nothing was changed in this layer."
            )
        if self.tokens == 0:
            raise MoeCollabError(f"{layer}: calibration reached no token here. Give oneshot() a non-empty dataset.")


def routed_weights(indices: torch.Tensor, weights: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, router weights) of the tokens routed to `expert`; `indices`, `weights` are [tokens, top_k].

    The order is that of llm-compressor's linearized experts: slot by slot, then by token.
    """
    slots, tokens = torch.where(indices.T.eq(expert))
    return tokens, weights[tokens, slots]
