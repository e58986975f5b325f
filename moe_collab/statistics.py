"""What one calibration pass observes about experts: who is chosen, how often, with which weight, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from .checkpoint.atomic import replace_directory, replace_text
from .errors import MoeCollabError

__all__ = ["ExpertStatistics", "SavedStatistics", "routed_weights"]

_FILES = ("statistics.json", "statistics.safetensors")


@dataclass
class ExpertStatistics:
    """Sums over the tokens that one layer's router sent to each expert, float64 [domains, experts]."""

    num_experts: int
    num_domains: int = 1
    tokens: torch.Tensor = field(init=False)
    """Tokens the layer saw, [domains]."""
    selections: torch.Tensor = field(init=False)
    weight_sum: torch.Tensor = field(init=False)
    """Of router weights g."""
    norm_sum: torch.Tensor = field(init=False)
    """Of the norms ||f|| of the expert's output."""
    weighted_norm_sum: torch.Tensor = field(init=False)
    """Of g ||f||."""
    largest: torch.Tensor = field(init=False)
    """Largest absolute value in the expert's output."""

    def __post_init__(self) -> None:
        self.tokens = torch.zeros(self.num_domains, dtype=torch.float64)
        for name in _BY_EXPERT:
            setattr(self, name, torch.zeros(self.num_domains, self.num_experts, dtype=torch.float64))

    def see(self, domains: torch.Tensor) -> None:
        """Count tokens by their `domains` [tokens]."""
        self.tokens += torch.bincount(domains, minlength=self.num_domains)

    def add(
        self, expert: int, weights: torch.Tensor, norms: torch.Tensor, peaks: torch.Tensor, domains: torch.Tensor
    ) -> None:
        """Add tokens routed to `expert`, each [tokens]: router weights, norms and largest absolute values of the
        expert's outputs, all float64, and domains.
        """
        columns = {
            "selections": torch.ones_like(weights),
            "weight_sum": weights,
            "norm_sum": norms,
            "weighted_norm_sum": weights * norms,
        }
        for name, column in columns.items():
            getattr(self, name)[:, expert].index_add_(0, domains, column)
        self.largest[:, expert].scatter_reduce_(0, domains, peaks, "amax")

    def join(self, other: ExpertStatistics) -> None:
        """Add what was seen of other tokens."""
        for name, sums in other.tensors().items():
            own = getattr(self, name)
            setattr(self, name, torch.maximum(own, sums) if name == "largest" else own + sums)

    def domain(self, index: int) -> ExpertStatistics:
        """What was seen of one domain."""
        found = ExpertStatistics(self.num_experts)
        found.tokens = self.tokens[index : index + 1].clone()
        for name in _BY_EXPERT:
            setattr(found, name, getattr(self, name)[index : index + 1].clone())
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> ExpertStatistics:
        """What `tensors` gave. Raises `KeyError` or `ValueError` if they are others."""
        num_domains, num_experts = tensors["selections"].shape
        found = cls(num_experts, num_domains)
        for name, empty in found.tensors().items():
            if tensors[name].shape != empty.shape:
                raise ValueError(f"{name} has shape {list(tensors[name].shape)}")
            setattr(found, name, tensors[name])
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every sum by its name."""
        return {name: getattr(self, name) for name in ("tokens", *_BY_EXPERT)}

    @property
    def counts(self) -> torch.Tensor:
        """Tokens sent to each expert, [experts]."""
        return self.selections.sum(0)

    @property
    def frequency(self) -> torch.Tensor:
        """f_e = selections / tokens, [experts]."""
        return self.counts / self.tokens.sum().clamp(min=1)

    @property
    def mean_weight(self) -> torch.Tensor:
        """s_e = mean router weight when selected, 0 for an expert never selected, [experts]."""
        return self._mean(self.weight_sum)

    @property
    def mean_norm(self) -> torch.Tensor:
        """Mean of ||f|| when selected, [experts]."""
        return self._mean(self.norm_sum)

    @property
    def mean_weighted_norm(self) -> torch.Tensor:
        """Mean of g ||f|| when selected, [experts]."""
        return self._mean(self.weighted_norm_sum)

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        return total.sum(0) / self.counts.clamp(min=1)

    def check(self, layer: str) -> None:
        """Raise `MoeCollabError` naming the layer and experts whose statistics are NaN or infinite, or if empty."""
        finite = torch.isfinite(self.weight_sum + self.weighted_norm_sum + self.largest).all(0)
        if not finite.all():
            raise MoeCollabError(
                f"{layer}: the router weights or outputs of experts {(~finite).nonzero().flatten().tolist()} are NaN "
                "or infinite on the calibration data. Check the model and the data; nothing was changed."
            )
        if not self.tokens.sum():
            raise MoeCollabError(f"{layer}: calibration reached no token here. Give oneshot() a non-empty dataset.")


_BY_EXPERT = tuple(f.name for f in fields(ExpertStatistics) if not f.init and f.name != "tokens")


class SavedStatistics(BaseModel):
    """`statistics.json`: what the tensors beside it were measured on."""

    model_config = ConfigDict(extra="forbid")

    model_fingerprint: str
    domains: list[str]
    num_experts: int
    layers: list[str]

    def save(self, folder: str | Path, statistics: Mapping[str, ExpertStatistics]) -> None:
        """Write `statistics` by layer name; the folder appears complete or not at all."""
        tensors = {
            f"{layer}.{name}": value for layer, found in statistics.items() for name, value in found.tensors().items()
        }
        with replace_directory(Path(folder)) as partial:
            replace_text(partial / _FILES[0], self.model_dump_json(indent=1) + "\n")
            (partial / _FILES[1]).write_bytes(save(tensors))

    @staticmethod
    def exist(folder: str | Path) -> bool:
        """Whether statistics were written into `folder`, and completely."""
        return (Path(folder) / _FILES[0]).exists()

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str) -> tuple[list[str], dict[str, ExpertStatistics]]:
        """(domains, layer name -> statistics). Raises `MoeCollabError` if unreadable or of another model."""
        header, tensors = (Path(folder) / name for name in _FILES)
        try:
            meta = cls.model_validate_json(header.read_text())
            stored = load(tensors.read_bytes())
            found = {layer: _restored(meta, layer, stored) for layer in meta.layers}
        except (OSError, ValidationError, SafetensorError, ValueError, KeyError) as error:
            raise MoeCollabError(
                f"{folder}: no valid statistics; delete the folder to measure anew.\n{error}"
            ) from error
        if meta.model_fingerprint != fingerprint:
            raise MoeCollabError(
                f"{folder}: these statistics are of another model ({meta.model_fingerprint}, this one is "
                f"{fingerprint}). Delete the folder to measure anew, or name another one."
            )
        return meta.domains, found


def _restored(meta: SavedStatistics, layer: str, stored: Mapping[str, torch.Tensor]) -> ExpertStatistics:
    names = ExpertStatistics(meta.num_experts, len(meta.domains)).tensors()
    found = ExpertStatistics.of({name: stored[f"{layer}.{name}"] for name in names})
    if (found.num_experts, found.num_domains) != (meta.num_experts, len(meta.domains)):
        raise ValueError(f"{layer} has {found.num_experts} experts in {found.num_domains} domains")
    return found


def routed_weights(indices: torch.Tensor, weights: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, router weights) of the tokens routed to `expert`; `indices`, `weights` are [tokens, top_k].

    The order is that of llm-compressor's linearized experts: slot by slot, then by token.
    """
    slots, tokens = torch.where(indices.T.eq(expert))
    return tokens, weights[tokens, slots]
