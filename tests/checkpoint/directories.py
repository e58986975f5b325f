"""Small checkpoints written by `replace_directory`, told apart by one value, and other people's files beside them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_collab.checkpoint.atomic import (
    replace_directory,
)
from moe_collab.checkpoint.dense import dense_tensors
from moe_collab.checkpoint.reader import Checkpoint

OTHERS = ("consolidated.safetensors", "pytorch_model.bin", "adapter.safetensors", "notes.txt", "other.index.json")


def read_dense(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, dequantized."""
    return {name: tensor.read() for name, tensor in dense_tensors(Checkpoint(path)).items()}


def write(directory: Path, value: float, shards: int = 1) -> None:
    """A checkpoint of three tensors that are all `value`, in one file or in `shards` files with an index."""
    names = ["a", "b", "c"]
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        index = {"weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, file in enumerate(files):
        save_file({name: torch.full((4,), value) for name in names[i :: len(files)]}, directory / file)
    (directory / "config.json").write_text(json.dumps({"value": value}))
    (directory / "tokenizer.json").write_text(str(value))


def value(directory: Path) -> float:
    """The value of a checkpoint, which must be of one piece."""
    checkpoint = Checkpoint(directory)
    values = {float(v) for name in checkpoint.names() for v in checkpoint.tensor(name)}
    values |= {checkpoint.config["value"], float((directory / "tokenizer.json").read_text())}
    assert sorted(checkpoint.names()) == ["a", "b", "c"] and len(values) == 1
    return values.pop()


def save(directory: Path | str, new: float, shards: int = 1) -> None:
    with replace_directory(directory) as staged:
        write(staged, new, shards)


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def with_others(directory: Path) -> None:
    for name in OTHERS:
        (directory / name).write_text(name)


def others_are_there(directory: Path) -> bool:
    return all((directory / name).read_text() == name for name in OTHERS)
