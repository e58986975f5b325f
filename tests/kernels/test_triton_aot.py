"""The Triton kernels compiled for GPUs that are not here; `make bench-triton-aot` does all of them."""

import pytest

pytest.importorskip("triton")
from integration.benchmarks.triton_aot import TARGETS, compile_kernel
from moe_collab.kernels.triton import kernels
from moe_collab.kernels.triton.ops import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter, which the other files need, compiles nothing")


@pytest.mark.parametrize("name", ["gate_up", "down", "combine", "linear"])
def test_nothing_is_compiled_for_one_size_of_batch(name):
    kernel = getattr(kernels, f"{name}_kernel")
    sizes = [p for p in kernel.params if p.name in ("num_pairs", "num_tokens")]
    assert sizes and all(p.do_not_specialize for p in sizes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kernel", "mix", "batch"), [("gate_up", (4,), "decode"), ("down", (4, 16), "prefill")])
def test_no_spills_and_matrix_instructions(target, kernel, mix, batch):
    row = compile_kernel(target, kernel, mix, batch)
    assert row["spilled_bytes"] == 0 and row["matrix_instructions"] > 0
