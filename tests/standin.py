"""A stand-in accelerator: a torch device, `standin`, that tests code meant for a GPU on a machine without one.

Its memory is the host's and every operation runs the CPU's kernel, so a result has the bytes that the CPU gives. What
it does not share with the CPU is what this is for: it is `torch.accelerator`'s device, its tensors are apart from the
CPU's, and an operation that mixes the two is refused as CUDA refuses it.

It is written in Python. A tensor is a real one, made by DLPack (which can wrap any memory as a tensor of the
device that extensions define), so views, storages and autograd are torch's own. The operations are in `standin_ops.py`.

A process has it from `install()` to its end, thus tests run what needs it in a process of its own: `run_on_standin`, or
`python -m tests.standin script.py`. Limits: one device; random numbers come from the CPU's default generator, and a
`torch.Generator` for the stand-in does not exist; `parameter.data = tensor` of another device is refused, which CUDA
takes; pinned memory is ordinary memory, streams and events do nothing, so that it shows no race. An operation costs
20 to 60 microseconds.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from .standin_ops import NAME, register

__all__ = ["NAME", "absent", "copying_onloads", "install", "run_on_standin"]

MEMORY = 8 << 30  # what it says it has, in bytes
ROOT = Path(__file__).parents[1]
Model = TypeVar("Model", bound=torch.nn.Module)

_libraries: list[torch.library.Library] = []


# --- the device --------------------------------------------------------------------------------------------------


class _Module(_DummyBackendModule):
    """`torch.standin`, what torch asks of a device's module."""

    def set_device(self, device: Any) -> None: ...

    def device(self, device: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self, device: Any = None) -> None: ...

    def get_rng_state(self, device: Any = NAME) -> torch.Tensor:
        return torch.random.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = NAME) -> None:
        torch.random.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]


def _patch_storage_copies() -> None:
    """deepcopy clones storages, which torch would allocate itself."""
    stock = torch.UntypedStorage.clone

    def clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
        if self.device.type != NAME:
            return stock(self)
        return torch.empty(0, dtype=torch.uint8, device=NAME).set_(self).clone().untyped_storage()

    torch.UntypedStorage.clone = clone  # type: ignore[method-assign, assignment]


def _patch_memory() -> None:
    """torch asks a device's allocator, which only C++ can register, how much memory there is."""
    torch._C._accelerator_getMemoryInfo = lambda index: (MEMORY, MEMORY)  # type: ignore[assignment, misc]
    torch._C._accelerator_isAllocatorInitialized = lambda: False
    torch._C._accelerator_emptyHostCache = torch._C._accelerator_synchronizeDevice = lambda *_: None  # type: ignore


def install() -> torch.device:
    """Give this process the stand-in as its accelerator, and return the device. More than once does nothing."""
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        _libraries.extend(register())
        _patch_storage_copies()
        _patch_memory()
        torch.__future__.set_swap_module_params_on_conversion(True)  # as on CUDA, `to` keeps parameters
    return torch.device(NAME, 0)


# --- for tests ---------------------------------------------------------------------------------------------------


def run_on_standin(script: str | Path, *arguments: Any, timeout: float = 300) -> str:
    """Run Python (a file, or a snippet that may be indented) in a process that has the stand-in; what it prints.

    An exception in it is an `AssertionError` here, with what it wrote.
    """
    source = ["-c", textwrap.dedent(script)] if isinstance(script, str) else [str(script)]
    command = [sys.executable, "-m", "tests.standin", *source, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def absent() -> Iterator[None]:
    """A block in which `torch.accelerator` knows of no accelerator, to get the bytes to compare with from the CPU."""
    with mock.patch.object(torch._C, "_accelerator_getAccelerator", lambda: None):
        yield


@contextlib.contextmanager
def copying_onloads(model: Model, device: torch.device | str = f"{NAME}:0") -> Iterator[Model]:
    """A CPU model that llm-compressor offloads: every access of a weight is a fresh copy on `device`."""
    from compressed_tensors.offload import remove_dispatch, set_onload_device

    set_onload_device(model, torch.device(device))
    try:
        yield model
    finally:
        remove_dispatch(model)


def _main(arguments: list[str]) -> None:
    """`python -m tests.standin script.py ...` or `python -m tests.standin -c "code" ...`."""
    install()
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<on the stand-in>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    from tests.standin import _main as main  # one module, whether a script imports it or not

    main(sys.argv[1:])
