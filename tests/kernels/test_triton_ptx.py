"""The PTX that reads two weights at a time, executed here instruction by instruction: the interpreter knows no PTX."""

import re
from itertools import product

import numpy as np
import pytest

pytest.importorskip("triton")
from moe_collab.kernels.triton import ops
from moe_collab.kernels.triton.fields import PTX_BITS, SPARE_PTX, field_ptx, left_of

pytestmark = pytest.mark.skipif(not ops.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("num_bits", PTX_BITS)
def test_ptx_of_every_field(num_bits, fp16):
    """At every place that the field's bits can have in a word."""
    generator = np.random.default_rng(0)
    lower = 4 if num_bits > 4 else num_bits
    for place, above in product(range(17 - lower), range(17 - num_bits + lower)):
        words, upper = generator.integers(0, 1 << 16, (2, 2))
        left = left_of(num_bits, place, fp16)
        minus = -((1024 if fp16 else 128) / 2**left + (1 << (num_bits - 1)) + 1)
        registers = [pair(*words), pair(*[as_bits(minus, fp16)] * 2), pair(*upper)]
        for half, word, up in zip(
            run_ptx(field_ptx(num_bits, lower, place, above, left, fp16), *registers, fp16), words, upper, strict=True
        ):
            code = int(word) >> place & ((1 << lower) - 1)
            code |= (int(up) >> above & ((1 << num_bits - lower) - 1)) << lower
            assert half == code - (1 << (num_bits - 1)) - 1


def test_ptx_of_the_last_bits_of_three_words():
    planes, spare = [pair(0x7FFF, 0x8001), pair(0x8000, 0x7FFF), pair(0xFFFF, 0x0000)], 0
    for words in planes:
        spare = pair(*run_ptx(SPARE_PTX.value, spare, words, 0, False))
    assert [half >> 13 for half in (spare & 0xFFFF, spare >> 16)] == [0b110, 0b001]


def pair(low, high) -> int:
    """Two halves of a register."""
    return int(low) | int(high) << 16


def as_bits(value: float, fp16: bool) -> int:
    return int(np.float16(value).view(np.uint16)) if fp16 else int(np.float32(value).view(np.uint32)) >> 16


def as_float(bits: int, fp16: bool) -> float:
    return float(np.uint16(bits).view(np.float16)) if fp16 else float(np.uint32(bits << 16).view(np.float32))


def run_ptx(code: str, words: int, minus: int, upper: int, fp16: bool) -> list[float]:
    """The two floats that a fragment of shifts, lop3 (and-or), mov and fma leaves in $0; without fma, their bits."""
    registers = {"$1": words, "$2": minus, "$3": upper}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.findall(r"([a-z][\w.]*) ([^;]*);", re.sub(r"\.reg .*?;", "", code)):
        name, (target, *operands) = line[0], line[1].split(", ")
        a, b, c = [*map(value, operands), 0, 0][:3]
        if name in ("shr.u32", "shl.b32"):
            result = a >> b if name == "shr.u32" else a << b & 0xFFFFFFFF
        elif name == "lop3.b32":
            assert value(operands[3]) == (0xF0 & 0xCC) | 0xAA
            result = a & b | c
        elif name == "mov.b32":
            result = a
        else:
            assert name == f"fma.rn.{'f16x2' if fp16 else 'bf16x2'}"
            halves = [[v >> 16 * i & 0xFFFF for v in (a, b, c)] for i in range(2)]
            x, y, z = ([as_float(h, fp16) for h in half] for half in zip(*halves, strict=True))
            return [p * q + r for p, q, r in zip(x, y, z, strict=True)]
        registers[target] = result
    return [registers["$0"] & 0xFFFF, registers["$0"] >> 16]
