"""Which backend serves, and what is said when the fast one cannot."""

import os
import subprocess
import sys

import pytest

from moe_collab import MoeCollabError
from moe_collab.kernels import backends, cpu
from moe_collab.kernels.cpu.build import BuildError, build


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("MOE_COLLAB_BACKEND", raising=False)
    backends.backend.cache_clear()
    backends.activation_bits.cache_clear()
    yield
    backends.backend.cache_clear()
    backends.activation_bits.cache_clear()


def test_the_fast_one_by_default():
    assert backends.backend().name.startswith("cpu (") and backends.backend().is_fast


def test_by_name(monkeypatch):
    monkeypatch.setenv("MOE_COLLAB_BACKEND", "reference")
    assert backends.backend().name == "torch reference"
    backends.backend.cache_clear()
    monkeypatch.setenv("MOE_COLLAB_BACKEND", "gpu")
    with pytest.raises(MoeCollabError, match="MOE_COLLAB_BACKEND: 'gpu'"):
        backends.backend()


def run_without_library(tmp_path, code, **variables):
    """In a process of its own, which has not loaded the library yet."""
    code = f"from moe_collab.kernels import backends, cpu\ncpu.LIBRARY = {str(tmp_path / 'absent.so')!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables)


def test_without_the_extension_the_reference_serves_and_says_so_once(tmp_path):
    done = run_without_library(tmp_path, "print(backends.backend().name, backends.backend().name)")
    # llm-compressor, where it is installed, sends the log to stdout.
    said = done.stdout + done.stderr
    assert done.stdout.endswith("torch reference torch reference\n")
    assert said.count("serving with the torch reference") == 1
    assert "python -m moe_collab.kernels.cpu.build" in said


def test_a_backend_asked_for_by_name_does_not_fall_back(tmp_path):
    done = run_without_library(tmp_path, "backends.backend()", MOE_COLLAB_BACKEND="cpu")
    assert done.returncode != 0 and "MoeCollabError: the CPU kernels are not built" in done.stderr


def test_a_damaged_library_is_reported(monkeypatch, tmp_path):
    damaged = tmp_path / "_C.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "LIBRARY", str(damaged))
    with pytest.raises(MoeCollabError, match="do not load"):
        cpu.load.__wrapped__()


def test_a_failed_build_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match="false -std"):
        build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activation_bits(monkeypatch):
    assert backends.activation_bits() == 16
    backends.activation_bits.cache_clear()
    monkeypatch.setenv("MOE_COLLAB_ACTIVATION_BITS", "4")
    with pytest.raises(MoeCollabError, match="MOE_COLLAB_ACTIVATION_BITS"):
        backends.activation_bits()
