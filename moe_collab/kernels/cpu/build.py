"""Compiles the extension: `python -m moe_collab.kernels.cpu.build [FLAG ...]`. Needs a C++20 compiler and torch.

`setup.py` runs it at install; where that could not be (no compiler yet, or an isolated build that does not see
torch), the command builds it afterwards, in place.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

__all__ = ["COMMAND", "LIBRARY", "BuildError", "build"]

LIBRARY = "_C.so"
COMMAND = "python -m moe_collab.kernels.cpu.build"

_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12 warns about its own headers (bug 105593).
_AVX512 = [*_AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni")), "-Wno-maybe-uninitialized"]
# Only these files may use the instructions; which of them run is decided at run time.
_INSTRUCTIONS = {
    "avx2.cpp": _AVX2,
    "avxvnni.cpp": [*_AVX2, "-mavxvnni"],
    "avx512.cpp": _AVX512,
    "amx.cpp": [*_AVX512, "-mamx-tile", "-mamx-int8"],
}


class BuildError(Exception):
    """The extension could not be built; the message says why."""


def build(target: Path, extra_flags: list[str] | None = None) -> Path:
    """Compile every source beside this file into `target` / `LIBRARY`; nothing is left half-written.

    `extra_flags` are added to every command, as sanitizers need. Raises `BuildError`.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("there is no C++ compiler (looked for $CXX, g++, c++, clang++)")
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise BuildError("torch is not installed here (an isolated build does not see it)")
    root = Path(torch.origin).parent
    flags = [*_FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{root / 'include'}", *(extra_flags or [])]
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    if platform.machine() not in ("x86_64", "AMD64"):
        sources = [s for s in sources if s.name not in _INSTRUCTIONS]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *flags, *_INSTRUCTIONS.get(s.name, []), "-c", str(s), "-o", str(o)]
            for s, o in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        library = Path(folder) / LIBRARY
        link = ["-shared", *map(str, objects), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([compiler, *(extra_flags or ["-s"]), *link, "-o", str(library)])
        target.mkdir(parents=True, exist_ok=True)
        staged = target / f".{LIBRARY}.{os.getpid()}"
        shutil.copy(library, staged)
        return staged.replace(target / LIBRARY)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    try:
        print(build(Path(__file__).parent, sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"moe_collab: the CPU kernels could not be built: {error}")
