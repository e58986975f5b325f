"""`work`: a directory in which a run keeps what it has finished, so that it can be killed and started again.

Modifiers name it in their field `work`, or `moe_collab.oneshot(..., work=...)` does. Every stage of ours puts there,
layer by layer, what it has found; a run that is started again with the same model, recipe, data and versions finds it
there, and comes to the same bytes. What it does to the model is done again, which takes little time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llmcompressor
import torch
from filelock import FileLock, Timeout
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from loguru import logger

from ...calibration.at_hand import compute_device
from ...calibration.results import Results, key_of
from ...checkpoint.atomic import check_output_directory, replace_text
from ...distributed import everyones, is_source_process, wait
from ...errors import MoeCollabError
from .compat import output_directory, when_run_ends
from .data import one_pass
from .domains import token_domains
from .likeness import few_of_each
from .linearized import load_linearized
from .outline import model_fingerprint
from .recipe import modifiers_of_this_pass

__all__ = ["Work", "oneshot", "open_work", "saved_before", "work_of"]

_WORK: ContextVar[str | None] = ContextVar("work", default=None)
_IDENTITY, _LOCK = "run.json", "moe-collab.lock"
_PACKAGES = ("moe-collab", "llmcompressor", "compressed-tensors", "transformers", "torch")
_PLACES = {"work", "plan", "costs", "statistics"}
"""Fields of modifiers that only say where something is kept."""


def oneshot(model: Any, *args: Any, work: str | Path | None = None, **options: Any) -> Any:
    """llm-compressor's `oneshot` with the same arguments, which works in directory `work` if one is named.

    A `model` that is a folder or a name on the hub is opened by `load_linearized`, so its weights may be quantized.
    """
    if isinstance(model, str | Path):
        model = load_linearized(model)
    token = _WORK.set(None if work is None else str(work))
    try:
        found = llmcompressor.oneshot(model, *args, **options)
    finally:
        _WORK.reset(token)
    if work is not None and not (Path(work).expanduser() / _IDENTITY).exists():
        logger.warning("{}: `work` was not used, for no modifier of ours is in the recipe", work)
    return found


class Work:
    """The directory of one run, locked until the run ends or its process dies.

    Raises `MoeCollabError` if another run is using the directory, if what is in it belongs to a run of another
    `identity` (what is compared -> a digest or name of it), or if it is somebody else's.
    """

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder = folder
        # Noted now, for in a calibration pass a modifier sees only those that share the pass.
        self._sections = {id(m): f"{at}-{type(m).__name__}" for at, m in enumerate(modifiers_of_this_pass())}
        if is_source_process():
            self._begin(identity)
        wait()
        self.saved = Results(folder / "saved", durable=True)
        """What is known of the files in which the result is saved."""

    def _begin(self, identity: dict[str, str]) -> None:
        folder, known, output = self.folder, self.folder / _IDENTITY, output_directory()
        if output is not None and folder in (Path(output).absolute(), *Path(output).absolute().parents):
            raise MoeCollabError(
                f"{output}: output_dir lies in the `work` directory, which is to be deleted once the checkpoint is "
                "there. Name another one."
            )
        check_output_directory(folder)
        if folder.exists() and any(folder.iterdir()) and not known.exists() and not (folder / _LOCK).exists():
            raise MoeCollabError(
                f"{folder}: `work` is a directory with other files in it. Name one that is empty, or that is not there."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / _LOCK, timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise MoeCollabError(
                f"{folder}: another run is working in this directory. Wait until it has ended, or name another `work`."
            ) from error
        when_run_ends(self._lock.release)
        if known.exists() and self._has_begun():
            self._check(_read(known), identity)
            logger.info("{}: going on with what an earlier run has finished there", folder)
        else:
            replace_text(known, json.dumps(identity, indent=1) + "\n")

    def _has_begun(self) -> bool:
        """Whether anything is finished; a run whose recipe was refused leaves nothing."""
        return any(file.is_file() and file.name not in (_IDENTITY, _LOCK) for file in self.folder.rglob("*"))

    def _check(self, known: dict[str, str], identity: dict[str, str]) -> None:
        others = [what for what in identity if known.get(what) != identity[what]]
        if others:
            raise MoeCollabError(
                f"{self.folder}: this `work` directory belongs to another run: {', '.join(others)} "
                f"{'are' if len(others) > 1 else 'is'} not the same. Name another directory, or delete this one."
            )

    @property
    def is_open(self) -> bool:
        """Whether the run goes on; only the source process knows."""
        return self._lock.is_locked

    def section(self, modifier: Modifier) -> Path:
        """The folder of what a modifier of the recipe keeps."""
        return self.folder / self._sections[id(modifier)]


def _read(file: Path) -> dict[str, str]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise MoeCollabError(
            f"{file}: not readable ({error}). Delete the `work` directory, or name another."
        ) from error


def work_of(state: State) -> Work | None:
    """The run's directory, if it has one."""
    return vars(state.data).get("work")


def saved_before(model: Any) -> Results | None:
    """What is known of the files in which `model` is saved, if a run with a directory is at work on it.

    The source process may ask.
    """
    state = active_session().state
    work = work_of(state)
    return work.saved if work is not None and work.is_open and state.model is model else None


def open_work(state: State) -> None:
    """Open the directory that the run is to work in, if there is to be one, unless it is open already."""
    everywhere = [_WORK.get(), *(getattr(modifier, "work", None) for modifier in modifiers_of_this_pass())]
    named = {Path(name).expanduser().absolute() for name in everywhere if name}
    if not named or work_of(state) is not None:
        return
    if len(named) > 1:
        raise MoeCollabError(f"`work`: one run works in one directory, but {sorted(map(str, named))} are named.")
    identity = {
        "model": key_of(model_fingerprint(state.model), _config(state.model), few_of_each(state.model)),
        "recipe": key_of(_recipe(), _applied_plans()),
        "data": key_of(*everyones(list(map(_content, one_pass(state)))), _domains(state)),
        "device": compute_device().type,
        **{name: version(name) for name in _PACKAGES},
    }
    vars(state.data)["work"] = Work(named.pop(), identity)


def _content(batch: Mapping[str, Any]) -> str:
    """A digest of all tensors of a batch."""
    found = blake2b(digest_size=8)
    for name in sorted(batch):
        value = torch.as_tensor(batch[name]).cpu().contiguous()
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode() + value.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _domains(state: State) -> str:
    """A digest of the domains that the samples name, if they do so in a way that anybody can use."""
    try:
        names, domains = token_domains(state)
    except MoeCollabError:
        return ""
    return f"{names} {blake2b(domains.numpy().tobytes(), digest_size=8).hexdigest()}"


def _config(model: Any) -> dict[str, Any]:
    return {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}


def _recipe() -> list[Any]:
    """The recipe's modifiers in order, without the fields that only say where something is kept, or how far it is."""
    found: list[Any] = []
    for modifier in modifiers_of_this_pass():
        fields = {name for name in type(modifier).model_fields if name not in _PLACES and not name.endswith("_")}
        found.append([type(modifier).__name__, modifier.model_dump(mode="json", include=fields)])
    return found


def _applied_plans() -> list[str]:
    """What plans say that decide in the place of a recipe."""
    paths = (Path(m.plan) for m in modifiers_of_this_pass() if getattr(m, "only_applies", False))  # type: ignore[attr-defined]
    return [path.read_text() for path in paths if path.is_file()]
