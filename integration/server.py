"""A real `vllm serve`, asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Server", "serve"]

_START_SECONDS = 240


class Server:
    """The address of a running server and the two questions the demo asks it."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        # A proxy set for the machine must not see requests to the machine itself.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def healthy(self) -> bool:
        """Whether it answers yet."""
        try:
            return self._opener.open(f"{self._url}/health", timeout=2).status == 200
        except OSError:
            return False

    def complete(self, prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
        """The greedy completion: `text` and `token_ids`."""
        question = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        return json.load(self._opener.open(request, timeout=120))["choices"][0]


@contextmanager
def serve(
    python: Path,
    model: Path,
    log: Path,
    *,
    dtype: str = "float32",
    memory: float = 0.3,
    start_seconds: float = _START_SECONDS,
) -> Iterator[Server]:
    """Run `vllm serve` from `python`'s environment until the block ends; it writes to `log`.

    `memory` is the share of the machine's, or of the GPU's, that it may take: by default vLLM wants 92 % to be free,
    and the fixture takes a few MB.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The interpreter's path must not be resolved: a virtual environment's python is a link out of it.
    command = [str(python.absolute().parent / "vllm"), "serve", str(model), "--served-model-name", "demo"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "512"]
    command += ["--gpu-memory-utilization", str(memory)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            server, deadline = Server(port), time.monotonic() + start_seconds
            while not server.healthy():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vllm serve did not start; {log} ends:\n{log.read_text()[-2000:]}")
                time.sleep(0.5)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
