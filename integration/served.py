"""What vLLM generates from a checkpoint, and what transformers says it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import moe_collab

from .generate import PROMPTS

__all__ = ["MLA", "TOLERANCE", "assert_equal", "generate", "generate_with_transformers", "run_vllm"]

# On CPUs with AMX vLLM would take an attention kernel for MLA that has no float32.
MLA = {"attention_backend": "CPU_MLA"}
TOLERANCE = 4e-3
"""What rounding activations to 16 bits costs, in nats."""

Generated = list[tuple[list[int], list[float]]]
"""By prompt, the tokens and the log-probability of each."""

_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def run_vllm(
    model: Path, options: dict[str, Any], variables: dict[str, str] | None = None, python: Path | str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run generate.py with vLLM's `options` and environment `variables`, in the environment of `python`."""
    environment = os.environ | _ENVIRONMENT | (variables or {})
    if options.get("tensor_parallel_size", 1) == 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "auto"
    command = [str(python), str(Path(__file__).with_name("generate.py")), str(model), json.dumps(options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def generate(model: Path, options: dict[str, Any], variables: dict[str, str] | None = None, **where: Any) -> Generated:
    """Greedy tokens from vLLM. Raises `RuntimeError` with its log if it fails."""
    done = run_vllm(model, options, variables, **where)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(result.removeprefix("RESULT "))


@torch.no_grad()
def generate_with_transformers(path: Path) -> Generated:
    """Greedy tokens from transformers on the dequantized float32 weights."""
    model = moe_collab.load(path, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        logprobs = []
        for _ in range(16):
            logp = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(logp.argmax()))
            logprobs.append(float(logp.max()))
        found.append((tokens[len(prompt) :], logprobs))
    return found


def assert_equal(found: Generated, expected: Generated, tolerance: float = TOLERANCE) -> None:
    """The same tokens, and log-probabilities within `tolerance` (nats).

    Where two tokens are as likely within that tolerance either may be chosen; what follows is not comparable then.
    """
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(found, expected, strict=True):
        for token, logprob, other, expected_logprob in zip(
            tokens, logprobs, expected_tokens, expected_logprobs, strict=True
        ):
            assert abs(logprob - expected_logprob) <= tolerance, f"log-probability {logprob}, not {expected_logprob}"
            if token != other:
                break
    # Chance does not tie them all.
    assert any(tokens == others for (tokens, _), (others, _) in zip(found, expected, strict=True)), "other tokens"
