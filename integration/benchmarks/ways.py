"""One recipe carried out in several ways, each in processes of its own: the checkpoints must be equal to the byte."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_collab import MoeCollabError
from moe_collab.calibration.results import Results
from moe_collab.calibration.scratch import Scratch

from .peak import Measured, run_measured

__all__ = ["WAYS", "die_after", "run_way"]

KILLS = 5
LIMIT = 40 * 60
"""Seconds that each process may take."""
_ON_STANDIN = "from integration.benchmarks.scale import main; raise SystemExit(main())"
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

_PROGRAMS: dict[str, list[str]] = {
    "memory": ["-m", "integration.benchmarks.scale"],
    "disk": ["-m", "integration.benchmarks.scale"],
    "standin": ["-m", "tests.standin", "-c", _ON_STANDIN],
    "torchrun": [*_TORCHRUN, "-m", "integration.benchmarks.scale"],
}
WAYS = (*_PROGRAMS, "killed")
"""Model in memory or on disk; on the stand-in accelerator; by two processes; from disk, killed five times."""


def run_way(way: str, job: dict[str, Any], folder: Path, logs: Path) -> list[Measured]:
    """Do `job` in that way, its files in `folder`; what each process took that was not killed.

    Names of log files begin with `logs`.
    """
    if way != "killed":
        return [_run(way, job, folder, Path(f"{logs}-{way}.log"))]
    whole = _run("disk", job | {"work": str(folder / "whole")}, folder / "whole-out", Path(f"{logs}-whole.log"))
    steps = whole.result["steps"]
    for number in range(1, KILLS + 1):
        # Every start goes on where the one before was killed, so that each dies as far beyond it.
        cut = job | {"work": str(folder / "killed"), "die_after": steps // (KILLS + 1)}
        try:
            _run("disk", cut, folder / f"killed-out-{number}", Path(f"{logs}-killed-{number}.log"))
        except MoeCollabError as error:
            if f"exited with {-signal.SIGKILL}" not in str(error):
                raise
        else:
            raise MoeCollabError(f"start {number} was to be killed after {cut['die_after']} steps, but ended")
    last = job | {"work": str(folder / "killed")}
    return [whole, _run("disk", last, folder / "killed-out", Path(f"{logs}-killed-last.log"))]


def _run(way: str, job: dict[str, Any], folder: Path, log: Path) -> Measured:
    """One process, or two under torchrun, which are measured as if they were the first of them."""
    command = [sys.executable, *_PROGRAMS[way], "--job", json.dumps(job | {"way": way}), "--output", str(folder)]
    return run_measured(command, log, LIMIT)


def die_after(steps: int | None) -> Callable[[], int]:
    """Kill this process when so many steps have been finished durably; returns how many there were so far."""
    done = 0

    def counted(stock: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Any, *args: Any) -> Any:
            nonlocal done
            if self._durable and done == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            found = stock(self, *args)
            done += self._durable
            return found

        return step

    for owner, name in ((Results, "put"), (Results, "note"), (Scratch, "finish")):
        setattr(owner, name, counted(getattr(owner, name)))
    return lambda: done
