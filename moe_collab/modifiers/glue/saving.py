"""`save_pretrained` made safe: it streams, the live model stays as it is, and nothing unverified takes its place.

llm-compressor's own packs the live modules in place and keeps them all: saving took memory for the whole model. Here
the weights go to disk tensor by tensor, file by file, each file verified before the next is begun. They are written
beside what is there, checked as a whole, and then moved into place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from llmcompressor.transformers.compression.compressed_tensors_utils import suspend_distributed_timeout
from loguru import logger

from ...allocation.budget import format_bytes, parse_bytes
from ...checkpoint.atomic import Rejected, check_output_directory, remedy_for, replace_directory
from ...checkpoint.groups import write_quantization_config
from ...checkpoint.shards import write_shards
from ...checkpoint.sizes import DEFAULT_SHARD_SIZE
from ...checkpoint.verify import Digest, verify
from ...distributed import is_source_process
from ...errors import MoeCollabError
from ...moe_model import describe
from ...plan import CompressionPlan
from ...pruning import check_masks
from ...pruning.surgery import sync_config
from .compat import output_directory
from .description import write_description
from .finished_files import FinishedFiles
from .live_tensors import LiveTensors
from .naming import use_checkpoint_names
from .quantizers import check_formats
from .work import saved_before

__all__ = ["expect_plan", "install_save"]

_PLAN = "_moe_collab_plan"
_FIXED = {
    "quantization_format": (None, "the format is that of each module's scheme"),
    "state_dict": (None, "the tensors of the live model are saved"),
    "push_to_hub": (False, "push the directory once it is saved and verified, with `hf upload`"),
    "variant": (None, "the names of the files are those that vLLM looks for"),
    "safe_serialization": (True, "only safetensors files are written"),
    "save_original_format": (True, "the names of the tensors are those that vLLM knows"),
    "save_peft_format": (True, "no adapters are saved"),
    "distributed_checkpoint": (False, "one process writes the whole checkpoint"),
}
"""Options of stock `save_pretrained` with the one value that is taken, and why no other is."""


def install_save(model: Any) -> None:
    """Replace `model.save_pretrained`, once; what `oneshot(output_dir=...)` and users call both go through it.

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

    def save_pretrained(
        save_directory: str | Path,
        quantization_format: str | None = None,
        save_compressed: bool = True,
        *,
        is_main_process: bool = True,
        max_shard_size: int | str = DEFAULT_SHARD_SIZE,
        token: str | bool | None = None,
        **options: Any,
    ) -> None:
        """`save_compressed` False stores quantized weights as they are in the live model, beside their scales."""
        _check_options({"quantization_format": quantization_format, **options})
        shard_size = parse_bytes(max_shard_size, "max_shard_size")
        with suspend_distributed_timeout():
            if is_source_process() and is_main_process:
                _save(model, Path(save_directory), shard_size, save_compressed)
            else:
                sync_config(model, describe(model))

    # llm-compressor wraps again whatever does not carry this mark.
    save_pretrained._overridden = save_pretrained._moe_collab = True  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained


def expect_plan(model: torch.nn.Module, plan: CompressionPlan) -> None:
    """Have the next saves compared with `plan`'s predicted size."""
    setattr(model, _PLAN, plan)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise `MoeCollabError` for what cannot be done as asked: nothing is ignored in silence."""
    for name, value in options.items():
        if name not in _FIXED:
            raise MoeCollabError(f"save_pretrained({name}=...): there is no such option. Leave it out.")
        only, reason = _FIXED[name]
        if value is not only:
            raise MoeCollabError(f"save_pretrained({name}=...): {reason}. Leave the option out.")


def _check_not_source(model: Any, directory: str | Path) -> None:
    origin = getattr(model.config, "_name_or_path", "")
    if origin and Path(origin).is_dir() and Path(directory).resolve() == Path(origin).resolve():
        raise MoeCollabError(
            f"{directory}: the model was read from there, and the checkpoint would replace it. Name another directory."
        )


def _save(model: Any, directory: Path, shard_size: int, compressed: bool) -> None:
    _check_not_source(model, directory)
    known = saved_before(model)
    with replace_directory(directory, resumable=known is not None) as staged:
        moe = describe(model)
        check_masks(moe)
        sync_config(model, moe)
        tensors = LiveTensors(model, compressed)
        finished = None if known is None else FinishedFiles(known, model, tensors, directory, shard_size)
        digests = _write_weights(tensors, staged, shard_size, finished)
        with _kept_whatever_fails(resumable=finished is not None):
            write_description(model, staged, compressed, tensors.ties_head)
            if tensors.schemes:
                write_quantization_config(staged, tensors.schemes, tensors.unquantized)
            _check(model, tensors, digests, staged, compressed)
    _warn_of_neighbours(directory)


def _write_weights(
    tensors: LiveTensors, staged: Path, shard_size: int, finished: FinishedFiles | None
) -> dict[str, Digest]:
    try:
        return write_shards(staged, tensors.entries, tensors.make, shard_size, finished)
    except Rejected:
        raise
    except MoeCollabError as error:
        if not tensors.unsound:
            raise
        raise MoeCollabError(
            f"{_listed(tensors.unsound)}\nSuch a checkpoint could not even be written, so nothing was saved: {error}"
        ) from error


@contextmanager
def _kept_whatever_fails(resumable: bool) -> Iterator[None]:
    """Once the weights are written, no error in the block discards them: they are kept in the rejected place.

    If the save is `resumable`, what the file system refuses leaves them where the same run, started again, takes them.
    """
    try:
        yield
    except Rejected:
        raise
    except Exception as error:
        if resumable and remedy_for(error):
            raise
        raise Rejected(f"the weights are written, but what follows failed: {error!r}") from error


def _check(model: Any, tensors: LiveTensors, digests: dict[str, Digest], staged: Path, compressed: bool) -> None:
    """Raise `Rejected`, which keeps the files out of the way, if they are not what the model is."""
    if tensors.unsound:
        raise Rejected(
            f"{_listed(tensors.unsound)}\nThe live model is as it was: quantize these modules again, or give them back "
            "their original weights and no scheme, and save. What was written must not be served; its other tensors "
            "are good."
        )
    if compressed:
        verify(staged, tensors.digests, tensors.plain(digests))
        _check_size(staged, getattr(model, _PLAN, None))


def _listed(unsound: Mapping[str, str]) -> str:
    first = "\n  ".join(f"{name}: {complaint}" for name, complaint in list(unsound.items())[:5])
    more = f"\n  and {len(unsound) - 5} more" if len(unsound) > 5 else ""
    return f"{len(unsound)} quantized weights are not what a quantizer makes:\n  {first}{more}"


def _warn_of_neighbours(directory: Path) -> None:
    """Name weights of others that vLLM would read too: without an index it takes every *.safetensors for a shard."""
    if (directory / "model.safetensors.index.json").exists():
        return
    if others := sorted(file.name for file in directory.glob("*.safetensors") if file.name != "model.safetensors"):
        logger.warning("{}: vLLM would read {} as part of the checkpoint; move them elsewhere", directory, others)


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
