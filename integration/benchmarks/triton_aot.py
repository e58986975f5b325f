"""Every Triton kernel compiled ahead of time for GPUs that need not be here: registers, spills, matrix instructions.

    make bench-triton-aot

writes `build/bench/triton_aot.json`. Tiles are those of configs.json for one token, a few (16), and prefill (4096).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_collab.kernels.triton import kernels
from moe_collab.kernels.triton.configs import choose, kinds_of
from moe_collab.kernels.triton.layout import BLOCK
from moe_collab.kernels.triton.ops import SORT_ABOVE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1151": GPUTarget("hip", "gfx1151", 32),
}
MIXES = [(2,), (3,), (4,), (5,), (6,), (8,), (16,), (2, 3, 4)]
BATCHES = {"decode": 1, "few": 16, "prefill": 4096}
_UNIT = 128
_POINTERS = {
    "x": "bf16", "inner": "bf16", "output": "bf16", "factors": "fp32", "partial": "fp32", "scales": "bf16",
    "zero_points": "i8", "codes": "i32", "table": "i64", "ids": "i32", "order": "i32", "block_expert": "i32",
    "block_start": "i32", "block_end": "i32",
}  # fmt: skip
_MULTIPLES_OF_16 = ("hidden", "width", "columns", "num_rows", "bias_stride")
_MATRIX = re.compile(r"mma\.sync|wgmma\.mma_async|v_wmma|v_mfma")


def compile_kernel(target: str, kernel: str, mix: tuple[int, ...], batch: str) -> dict[str, Any]:
    """One row: what the compiler made of a kernel for these bits."""
    gpu, kinds = TARGETS[target], kinds_of(mix)
    tile = choose((target, gpu.backend), kinds, kernel, BATCHES[batch])
    constants = {
        "KINDS": kinds, "ZEROS": False, "UNIT": _UNIT, "WHOLE": True, "PTX": gpu.backend == "cuda",
        "ROWS": tile.rows, "TOKENS": tile.tokens, "SPLIT": tile.split, "PIECES": 3, "PAIRS": SORT_ABOVE,
        "ON_INPUT": False, "ACTIVATION": "silu", "expert_map": None, "bias": None,
    }  # fmt: skip
    if batch != "prefill":
        constants |= dict.fromkeys(("order", "block_expert", "block_start", "block_end"))
    function = getattr(kernels, f"{kernel}_kernel")
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        kind = "constexpr" if name in constants else f"*{_POINTERS[name]}" if name in _POINTERS else "i32"
        signature[name] = kind
        if kind[0] == "*" or name in _MULTIPLES_OF_16:
            attributes[(position,)] = [["tt.divisibility", 16]]
    known = {(function.arg_names.index(n),): v for n, v in constants.items() if n in function.arg_names}
    source = ASTSource(function, signature, constexprs=known, attrs=attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source, target=gpu, options=options)
    row = {"target": target, "kernel": kernel, "bits": list(mix), "batch": batch, "tile": tile.model_dump()}
    row["shared_bytes"] = compiled.metadata.shared
    if gpu.backend != "cuda":
        return row | _amd(compiled)
    # A thread's share of the weights that one turn of the loop takes.
    weights = tile.rows * (64 if mix == (16,) else BLOCK) / (32 * tile.num_warps)
    row |= _nvidia(compiled)
    row["instructions_per_weight"] = round(row.pop("loop") / weights, 2) if len(mix) == 1 else None
    return row


def _nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "matrix_instructions": len(_MATRIX.findall(compiled.asm["ptx"])),
        "loop": _loop(text),
    }


def _loop(text: str) -> int:
    """Instructions of the shortest loop with a matrix instruction; 0 if the compiler left none."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found = []
    for label, instruction in re.findall(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+([^;]*);", text, re.MULTILINE):
        if label:
            labels[label] = len(instructions)
            continue
        instructions.append(instruction)
        start = labels.get(instruction.partition("`(")[2].rstrip(") ")) if "BRA" in instruction else None
        if start is not None and any("MMA" in i for i in instructions[start:]):
            found.append(len(instructions) - start)
    return min(found, default=0)


def _amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]
    count = {name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
    return {
        "registers": count["vgpr_count"],
        "spilled_bytes": 4 * count["vgpr_spill_count"] + int(re.search(r"\.sgpr_spill_count:\s*(\d+)", text)[1]) * 4,
        "matrix_instructions": len(_MATRIX.findall(text)),
    }


def cases() -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """Arguments of `compile_kernel`."""
    return product(TARGETS, ("gate_up", "down", "linear"), MIXES, BATCHES)


def main() -> None:
    """Compile all, print a line each, write them together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = []
        for row in pool.map(compile_kernel, *zip(*cases(), strict=True)):
            rows.append(row)
            print(
                f"{row['target']:8} {row['kernel']:8} {','.join(map(str, row['bits'])):6} {row['batch']:8} "
                f"{row['registers']:4} registers {row['shared_bytes']:6} shared {row['spilled_bytes']:5} spilled "
                f"{row['matrix_instructions']:4} matrix instructions",
                flush=True,
            )
    path = options.output / "triton_aot.json"
    path.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    spilled = sum(row["spilled_bytes"] > 0 for row in rows)
    lacking = sum(not row["matrix_instructions"] for row in rows)
    print(f"{path}: {len(rows)} kernels, {spilled} spill, {lacking} lack matrix instructions")


if __name__ == "__main__":
    main()
