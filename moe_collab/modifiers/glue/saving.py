"""`save_pretrained` made safe: right config, compact targets, companion files, written aside, verified, then moved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import from_accelerate
from loguru import logger

from ...allocation.budget import format_bytes
from ...checkpoint.atomic import Rejected, check_output_directory, replace_directory
from ...checkpoint.companions import copy_companions, source_directory
from ...checkpoint.groups import write_quantization_config
from ...checkpoint.verify import verify
from ...distributed import is_distributed, is_source_process
from ...errors import MoeCollabError
from ...moe_model import describe
from ...plan import CompressionPlan
from ...pruning import check_masks
from ...pruning.surgery import sync_config
from .compat import output_directory
from .naming import use_checkpoint_names
from .quantizers import check_formats
from .snapshot import Snapshot, snapshot_of

__all__ = ["expect_plan", "install_save"]


def install_save(model: Any) -> None:
    """Wrap `model.save_pretrained`, once; what `oneshot(output_dir=...)` and users call both go through it.

    The checkpoint appears in the directory complete and verified, or not at all. What is refused after it was written
    is kept in `.moe-collab-rejected` inside the directory, and the `MoeCollabError` says so. Called before calibration,
    it raises `MoeCollabError` if the directory that oneshot() was given cannot be written.
    """
    check_formats()
    directory = output_directory()
    if directory and is_source_process():
        _check_not_source(model, directory)
        check_output_directory(directory)
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
        _check_not_source(model, save_directory)
        with replace_directory(save_directory) as staged:
            snapshot = snapshot_of(model)
            _write(model, snapshot, lambda: inner(str(staged), *args, **kwargs))
            with _kept_whatever_fails():
                _complete(model, staged)
                _check(model, snapshot, staged, compressed=kwargs.get("save_compressed", True))
        _warn_of_neighbours(Path(save_directory))

    # llm-compressor wraps again whatever does not carry this mark.
    save_pretrained._overridden = save_pretrained._moe_collab = True  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained


_PLAN = "_moe_collab_plan"


def expect_plan(model: torch.nn.Module, plan: CompressionPlan) -> None:
    """Have the next saves compared with `plan`'s predicted size."""
    setattr(model, _PLAN, plan)


def _check_not_source(model: Any, directory: str | Path) -> None:
    origin = getattr(model.config, "_name_or_path", "")
    if origin and Path(origin).is_dir() and Path(directory).resolve() == Path(origin).resolve():
        raise MoeCollabError(
            f"{directory}: the model was read from there, and the checkpoint would replace it. Name another directory."
        )


@contextmanager
def _kept_whatever_fails() -> Iterator[None]:
    """Once the weights are written, no error in the block discards them: they are kept in the rejected place."""
    try:
        yield
    except Rejected:
        raise
    except Exception as error:
        raise Rejected(f"the weights are written, but what follows failed: {error!r}") from error


def _write(model: Any, snapshot: Snapshot, write: Any) -> None:
    """Write the weights, after the checks that need no file."""
    moe = describe(model)
    check_masks(moe)
    sync_config(model, moe)
    _forget_older_save(model)
    try:
        with _usable_after_failure(model):
            write()
    except MoeCollabError as error:
        if not snapshot.unsound:
            raise
        raise MoeCollabError(
            f"{_listed(snapshot.unsound)}\nSuch a checkpoint could not even be written, so nothing was saved: {error}"
        ) from error


def _complete(model: Any, staged: Path) -> None:
    """Correct the config beside the weights, and copy what belongs to the model from where it was read."""
    moe = describe(model)
    _patch_config(staged / "config.json", sync_config(model, moe), moe.family.architecture)
    origin = getattr(model.config, "_name_or_path", "")
    source = source_directory(origin, getattr(model.config, "_commit_hash", None))
    if source is None:
        logger.warning("{!r} is no local directory: no tokenizer or licence was copied from there", origin)
    else:
        copy_companions(source, staged)


def _check(model: Any, snapshot: Snapshot, staged: Path, compressed: bool) -> None:
    """Raise `Rejected`, which keeps the files out of the way, if they are not what the model is."""
    if snapshot.unsound:
        snapshot.remember_unsound()
        raise Rejected(
            f"{_listed(snapshot.unsound)}\nThe live model is packed now and cannot be repaired: load it again, "
            "quantize these modules or name them in `ignore`, and save. What was written must not be served; its other "
            "tensors are good."
        )
    if not snapshot.schemes:
        verify(staged, {}, snapshot.plain)
    elif compressed:
        write_quantization_config(staged, snapshot.schemes, snapshot.unquantized)
        verify(staged, snapshot.quantized, snapshot.plain)
        _check_size(staged, getattr(model, _PLAN, None))


def _listed(unsound: Mapping[str, str]) -> str:
    first = "\n  ".join(f"{name}: {complaint}" for name, complaint in list(unsound.items())[:5])
    more = f"\n  and {len(unsound) - 5} more" if len(unsound) > 5 else ""
    return f"{len(unsound)} quantized weights are not what a quantizer makes:\n  {first}{more}"


def _forget_older_save(model: Any) -> None:
    """Remove the hook that unpacks the model before its next forward pass: llm-compressor adds one in each save.

    It forgets all but the newest, and the second to run would find nothing packed and raise KeyError.
    """
    if hook := getattr(model, "ct_decompress_hook", None):
        hook.remove()
        del model.ct_decompress_hook


@contextmanager
def _usable_after_failure(model: Any) -> Iterator[None]:
    """Give the model its offloading back if llm-compressor, which changes it to save, does not come to do so."""
    try:
        yield
    except BaseException:
        if hasattr(model, "hf_device_map") and not is_distributed():
            from_accelerate(model)
        raise


def _warn_of_neighbours(directory: Path) -> None:
    """Name weights of others that vLLM would read too: without an index it takes every *.safetensors for a shard."""
    if (directory / "model.safetensors.index.json").exists():
        return
    if others := sorted(file.name for file in directory.glob("*.safetensors") if file.name != "model.safetensors"):
        logger.warning("{}: vLLM would read {} as part of the checkpoint; move them elsewhere", directory, others)


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
        raise Rejected(
            f"the checkpoint is {format_bytes(size)}, over the budget of "
            f"{format_bytes(plan.budget_bytes)}. Save with the default max_shard_size."
        )
