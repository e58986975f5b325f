"""What a run takes: memory by stage, seconds, and bytes read from disk, of a process of its own.

Memory is anonymous plus shared pages: what a machine must have. File pages that are mapped into the process, as
safetensors maps the files it reads, stand apart, because the system takes them back whenever it needs room.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from moe_collab import MoeCollabError

__all__ = ["DiskReads", "Measured", "PeakMeter", "Stage", "announce", "machine", "report", "run_measured"]

_INTERVAL = 0.02
_STAGE, _RESULT = "STAGE ", "RESULT "
_FROM_LOG = {r"Inferred `\w+` for `(\w+)`": r"\1", r"Compression lifecycle finalized": "save"}
"""Lines of llm-compressor's log -> the stage that begins there: each modifier in turn, then saving."""
_FEATURES = {"amx_tile": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
_TAIL = 3000


@dataclass
class Stage:
    """What a stage took: its time, and the largest memory, in bytes, while it lasted."""

    seconds: float = 0.0
    cpu: float = 0.0
    """Of these, seconds of processor time, of all threads: what is left where others share the machine."""
    memory: int = 0
    """Anonymous and shared pages."""
    mapped: int = 0
    """Pages of files."""


class PeakMeter:
    """Samples the memory of process `pid`, by default this one, every 20 ms in a thread, while a `with` block lasts.

    A meter in another process than the one it watches sees what code that never lets go of Python's lock takes, too.
    """

    def __init__(self, pid: int | None = None, stage: str = "start") -> None:
        self.stages: dict[str, Stage] = {}
        self._process, self._used = Path(f"/proc/{pid or 'self'}"), 0.0
        self._done, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._stage, self._since = stage, time.monotonic()

    def enter(self, stage: str) -> None:
        """Count what follows for `stage`, which may have been entered before."""
        with self._lock:
            self._sample()
            self._stage = stage

    def __enter__(self) -> PeakMeter:
        self._since, self._used = time.monotonic(), _processor_time(self._process)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        with self._lock:
            self._sample()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            with self._lock:
                self._sample()

    def _sample(self) -> None:
        now, used, memory = time.monotonic(), _processor_time(self._process), _resident(self._process)
        stage = self.stages.setdefault(self._stage, Stage())
        stage.seconds += now - self._since
        stage.cpu += max(used - self._used, 0.0)
        stage.memory = max(stage.memory, memory.get("RssAnon", 0) + memory.get("RssShmem", 0))
        stage.mapped = max(stage.mapped, memory.get("RssFile", 0))
        self._since, self._used = now, used


def _processor_time(process: Path) -> float:
    """Seconds so far; none once the process is gone."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(process: Path) -> dict[str, int]:
    """Bytes by kind of page; none once the process is gone."""
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) << 10 for name, _, rest in (s.partition(":") for s in lines if s[:3] == "Rss")}


@dataclass
class Measured:
    """What a process took, and what it reported with `report`."""

    seconds: float
    stages: dict[str, Stage]
    result: dict[str, Any]


def run_measured(command: Sequence[str], log: Path, limit: float) -> Measured:
    """Run `command`, its output to `log`, and measure it.

    A line `STAGE name` of it, see `announce`, begins a stage once it is read, which on a busy machine can take some
    milliseconds, and so do some of llm-compressor's log lines. Raises
    `MoeCollabError` with the log's end if it fails or takes more than `limit` seconds; it and its children end then.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    result: dict[str, Any] = {}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    alarm = threading.Timer(limit, _end, [process.pid])
    alarm.start()
    try:
        with PeakMeter(process.pid) as meter, log.open("w", buffering=1) as file:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if line.startswith(_RESULT):
                    result = json.loads(line.removeprefix(_RESULT))
                elif stage := _stage_of(line):
                    meter.enter(stage)
            code = process.wait()
    finally:
        alarm.cancel()
        if process.poll() is None:
            _end(process.pid)
    seconds = time.monotonic() - began
    if code:
        why = f"took more than {limit:.0f} s" if seconds > limit else f"exited with {code}"
        raise MoeCollabError(f"{' '.join(command)} {why}; {log} ends:\n{log.read_text()[-_TAIL:]}")
    return Measured(seconds, meter.stages, result)


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):  # it may end just now
        os.killpg(pid, signal.SIGKILL)


def _stage_of(line: str) -> str | None:
    if line.startswith(_STAGE):
        return line.removeprefix(_STAGE).strip()
    for pattern, name in _FROM_LOG.items():
        if found := re.search(pattern, line):
            return found.expand(name)
    return None


def announce(stage: str) -> None:
    """Say, in a process that `run_measured` runs, that a stage begins."""
    print(f"{_STAGE}{stage}", flush=True)


def report(result: dict[str, Any]) -> None:
    """Hand `result` to `run_measured`, once."""
    print(f"{_RESULT}{json.dumps(result)}", flush=True)


@dataclass
class DiskReads:
    """Counts the bytes that safetensors is asked for, whoever asks: its reads are page faults, which no counter of the
    system gives by process once the file is cached.

    `install` it when all that reads checkpoints is imported; it stays for the life of the process.
    """

    source: Path
    """The folder of the model's own files."""
    asked: int = 0
    asked_of_source: int = 0

    def add(self, size: int, path: Path) -> None:
        """Count bytes asked of the file `path`."""
        self.asked += size
        self.asked_of_source += size * path.resolve().is_relative_to(self.source.resolve())

    def install(self) -> None:
        """Put a counting `safe_open` in the place of safetensors' own, in every module that has it by name."""
        stock, counting = safetensors.safe_open, self._opened(safetensors.safe_open)
        for module in list(sys.modules.values()):
            if vars(module).get("safe_open") is stock:
                vars(module)["safe_open"] = counting

    def _opened(self, stock: Any) -> Any:
        return lambda path, *args, **kwargs: _CountedFile(stock(path, *args, **kwargs), self, Path(path))

    def by_system(self) -> dict[str, int]:
        """With what the kernel counts: `rchar`, read by system calls, and `read_bytes`, fetched from the disk."""
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        own = {"asked": self.asked, "asked_of_source": self.asked_of_source}
        return own | {"rchar": int(counters["rchar"]), "fetched": int(counters["read_bytes"])}


class _Counted:
    """Passes on whatever is not counted."""

    def __init__(self, inner: Any, reads: DiskReads, path: Path) -> None:
        self._inner, self._reads, self._path = inner, reads, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _count(self, tensor: Any) -> Any:
        self._reads.add(tensor.nbytes, self._path)
        return tensor


class _CountedSlice(_Counted):
    def __getitem__(self, index: Any) -> Any:
        return self._count(self._inner[index])


class _CountedFile(_Counted):
    def __enter__(self) -> _CountedFile:
        self._inner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(*error)

    def get_tensor(self, name: str) -> Any:
        """As safetensors' own."""
        return self._count(self._inner.get_tensor(name))

    def get_slice(self, name: str) -> _CountedSlice:
        """As safetensors' own."""
        return _CountedSlice(self._inner.get_slice(name), self._reads, self._path)


def machine() -> str:
    """The processor by its name and the widest instructions it has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    widest = next((name for flag, name in _FEATURES.items() if flag in flags), "no AVX2")
    return f"{fields.get('model name', 'unknown')}, {widest}"
