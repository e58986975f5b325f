"""Importing the package is cheap for a server, and enough for a recipe."""

import subprocess
import sys
from importlib.util import find_spec

import pytest


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(find_spec("llmcompressor") is not None, reason="lean only where llm-compressor is absent")
def test_import_is_lean_without_llm_compressor():
    heavy = "('torch', 'vllm', 'transformers', 'numpy')"
    out = _run(f"import sys, moe_collab; print([m for m in {heavy} if m in sys.modules])")
    assert out.strip() == "[]"


@pytest.mark.skipif(find_spec("llmcompressor") is None, reason="needs llm-compressor")
def test_import_registers_the_modifiers():
    recipe = "a_stage: {b_modifiers: {ExpertPruningModifier: {retention: 0.5}}}"
    code = "import moe_collab; from llmcompressor.recipe import Recipe as R"
    code += f"; print(R.create_instance({recipe!r}).modifiers)"
    assert "ExpertPruningModifier" in _run(code)


def test_unknown_attribute_is_an_attribute_error():
    import moe_collab

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moe_collab.nothing
