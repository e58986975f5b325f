"""Files beside a model's weights that belong to it: licence, model card, tokenizer, processor, templates, own code.

`save_pretrained` writes weights and configs only. A checkpoint without its tokenizer cannot be used, without its chat
template it answers worse, without its licence it may not be passed on.

The rule is "all that is small and is not weights", not a list of names: a list forgets what families invent
(`tekken.json`, `vocab.bpe`, `video_preprocessor_config.json`, `USE_POLICY.md`), and nobody notices until the
checkpoint is used, while a file too many does no harm. Left out are what describes weights that do not come along
(indices, adapters, other quantizations), pictures, hidden files, and caches.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from loguru import logger

__all__ = ["copy_companions", "source_directory"]

_LARGEST = 64 * 2**20
"""Bytes of the largest file that is copied; the largest tokenizers known to us have 35 MB."""

# fmt: off
_WEIGHTS = frozenset((
    ".bin", ".ckpt", ".gguf", ".ggml", ".h5", ".joblib", ".llamafile", ".mlmodel", ".msgpack", ".nemo", ".npy", ".npz",
    ".onnx", ".onnx_data", ".ot", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tflite",
))
_UNNEEDED = frozenset((
    ".7z", ".arrow", ".gif", ".gz", ".jpeg", ".jpg", ".log", ".mov", ".mp3", ".mp4", ".parquet", ".pdf", ".png", ".pyc",
    ".svg", ".tar", ".wav", ".webp", ".zip",
))
# fmt: on
_OF_OTHER_WEIGHTS = frozenset(
    (
        "config.json",  # save_pretrained writes it
        "params.json",  # describes consolidated.safetensors
        "adapter_config.json",  # these make loaders look for weights that are not there
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
    )
)
_TEMPLATES = "additional_chat_templates"
_OF_PROCESSOR = ("tokenizer_config.json", "preprocessor_config.json")


def source_directory(name_or_path: str, revision: str | None = None) -> Path | None:
    """The local directory of a model: the path itself, or the snapshot of a hub name in the cache.

    `revision` is the commit that was loaded, None for the newest. None if there is no such directory; the network is
    never asked.
    """
    if not name_or_path:
        return None
    if (path := Path(name_or_path)).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache; no hub name
        return None


def copy_companions(source: Path, staged: Path) -> list[str]:
    """Copy what belongs to the model in `source` into `staged`, where files that are there win; names of the copied.

    Does nothing if `source` has no config.json, so is no model's directory.
    """
    if not (source / "config.json").is_file():
        return []
    copied = []
    for file in _companions(source, custom_code=_has_custom_code(source)):
        name = file.relative_to(source)
        if (staged / name).exists():
            continue
        try:
            if file.stat().st_size > _LARGEST:
                logger.warning("{} was not copied into the checkpoint: it has more than {} MiB", file, _LARGEST >> 20)
                continue
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, staged / name)  # not its mode: files of the hub's cache may be read-only
        except PermissionError as error:  # no reason to lose a finished checkpoint
            logger.warning("{} was not copied into the checkpoint: {}", file, error)
            continue
        copied.append(str(name))
    return copied


def _companions(folder: Path, custom_code: bool) -> list[Path]:
    """Files of `folder` to copy, and of those folders in it that are part of the model."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_file() and _is_companion(path):
            found.append(path)
        elif path.is_dir() and _is_part(path, custom_code):
            found += _companions(path, custom_code)
    return found


def _is_companion(file: Path) -> bool:
    """Whether a file belongs to the model and neither is weights nor describes any."""
    if file.suffix.lower() in _WEIGHTS | _UNNEEDED or file.name in _OF_OTHER_WEIGHTS:
        return False
    return not file.name.endswith(".index.json")


def _is_part(folder: Path, custom_code: bool) -> bool:
    """Whether a folder holds chat templates, a part of the processor, or custom code.

    Others may be anything: the weights in another format, a training run, the user's own data.
    """
    if folder.name == _TEMPLATES:
        return True
    if not os.access(folder, os.R_OK | os.X_OK):  # such as lost+found, where the model lies at the root of a disk
        return False
    if any(file.suffix.lower() in _WEIGHTS for file in folder.iterdir()):
        return False
    return any((folder / name).exists() for name in _OF_PROCESSOR) or (custom_code and any(folder.glob("*.py")))


def _has_custom_code(source: Path) -> bool:
    """Whether the config, or that of the tokenizer or processor, names classes in Python files beside it."""
    for name in ("config.json", "processor_config.json", *_OF_PROCESSOR):
        try:
            if "auto_map" in json.loads((source / name).read_text()):
                return True
        except (OSError, ValueError):
            continue
    return False
