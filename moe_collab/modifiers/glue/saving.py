"""`save_pretrained` made safe: right config, compact targets, written beside, verified, then renamed."""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from loguru import logger
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...allocation.budget import format_bytes
from ...checkpoint.atomic import replace_directory
from ...checkpoint.groups import write_quantization_config
from ...checkpoint.verify import Fingerprint, fingerprint, tensor_digest, verify
from ...distributed import is_source_process
from ...errors import MoeCollabError
from ...moe_model import describe
from ...plan import CompressionPlan
from ...pruning import check_masks
from ...pruning.surgery import sync_config
from .naming import checkpoint_names, use_checkpoint_names
from .schemes import codes_of, is_sound

__all__ = ["expect_plan", "install_save"]


def install_save(model: torch.nn.Module) -> None:
    """Wrap `model.save_pretrained`, once; what `oneshot(output_dir=...)` and users call both go through it."""
    if getattr(model.save_pretrained, "_moe_collab", False):
        return
    use_checkpoint_names(model)
    inner = model.save_pretrained

    @wraps(inner)
    def save_pretrained(save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        if not is_source_process():
            sync_config(model, describe(model))
            inner(str(save_directory), *args, **kwargs)  # joins the others, and writes nothing
            return
        expected, schemes, plain = _snapshot(model)
        digests = _plain_digests(model)
        with replace_directory(Path(save_directory)) as beside:
            moe = describe(model)
            check_masks(moe)
            counts = sync_config(model, moe)
            inner(str(beside), *args, **kwargs)
            _patch_config(beside / "config.json", counts, moe.family.architecture)
            if schemes and kwargs.get("save_compressed", True):
                write_quantization_config(beside, schemes, plain)
                verify(beside, expected, digests)
                _check_size(beside, getattr(model, _PLAN, None))

    # llm-compressor wraps again whatever does not carry this mark.
    save_pretrained._overridden = save_pretrained._moe_collab = True  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained


_PLAN = "_moe_collab_plan"


def expect_plan(model: torch.nn.Module, plan: CompressionPlan) -> None:
    """Have the next saves compared with `plan`'s predicted size."""
    setattr(model, _PLAN, plan)


def _snapshot(model: torch.nn.Module) -> tuple[dict[str, Fingerprint], dict[str, dict[str, Any]], list[str]]:
    """(fingerprints, schemes, unquantized Linear names) of the live model, by checkpoint name."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = checkpoint_names(model, list(linears))
    expected, schemes, plain = {}, {}, []
    for name, module in linears.items():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            plain.append(names[name])
            continue
        expected[names[name]] = _fingerprint(name, module)
        schemes[names[name]] = _scheme(scheme)
    return expected, schemes, plain


def _plain_digests(model: torch.nn.Module) -> dict[str, Fingerprint]:
    """Checkpoint name -> digest of every tensor that is saved as it is."""
    skipped = {n for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    kept = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in skipped}
    return {name: tensor_digest(tensor) for name, tensor in revert_weight_conversion(model, kept).items()}


def _scheme(scheme: QuantizationScheme) -> dict[str, Any]:
    described = scheme.model_dump(mode="json", exclude={"targets"})
    described["format"] = described.get("format") or "pack-quantized"
    return described


@torch.no_grad()
def _fingerprint(name: str, module: torch.nn.Linear) -> Fingerprint:
    """What the quantizer produced: integer codes, scales, zero points."""
    if not hasattr(module, "weight_packed") and not is_sound(module):
        raise MoeCollabError(f"{name}.weight: not on the grid of its scales; was it quantized? Nothing was saved.")
    return fingerprint(*codes_of(module))


def _patch_config(path: Path, counts: dict[str, int], architecture: str | None) -> None:
    """Write the live expert counts over those llm-compressor copied from the original config, and vLLM's class."""
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    for key in counts.keys() & text.keys():
        text[key] = counts[key]
    if architecture:
        config["architectures"] = [architecture]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_size(directory: Path, plan: CompressionPlan | None) -> None:
    if plan is None:
        return
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if size != plan.predicted_bytes:
        logger.warning(
            "the checkpoint is {}, the plan predicted {}", format_bytes(size), format_bytes(plan.predicted_bytes)
        )
    if plan.budget_bytes is not None and size > plan.budget_bytes:
        raise MoeCollabError(
            f"{directory}: the checkpoint is {format_bytes(size)}, over the budget of "
            f"{format_bytes(plan.budget_bytes)}. Save with the default max_shard_size."
        )
