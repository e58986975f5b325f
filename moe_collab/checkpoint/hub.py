"""Models by their name on the hub, downloaded when they are asked for."""

from __future__ import annotations

from pathlib import Path

from ..errors import MoeCollabError

__all__ = ["model_folder"]

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*"]
"""What is downloaded of a model: some have the same weights in other formats besides. No code of it is run."""
_OTHERS = ["*/*", "consolidated*"]


def model_folder(name_or_path: str | Path) -> Path:
    """The folder of a model: `name_or_path` itself, or that to which the hub's model of this name is downloaded.

    Raises `MoeCollabError` if it is neither.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=_WANTED, ignore_patterns=_OTHERS))
    except (OSError, ValueError) as error:  # no such model, no network; no name that the hub could have
        raise MoeCollabError(
            f"{name_or_path}: neither the folder of a model, nor one that the hub gives: {error}"
        ) from error
