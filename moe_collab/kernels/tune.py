"""Find the fastest tiles of the Triton kernels on this GPU, for a checkpoint or for shapes and bits.

    python -m moe_collab.kernels.tune my-model-compressed
    export MOE_COLLAB_TRITON_CONFIGS=$PWD/triton-configs.json
    vllm serve my-model-compressed

Starts from the tiles in use and goes to whatever is faster, one step of one setting at a time. A kernel's tiles are
stored as soon as they are found, in the form of moe_collab/kernels/triton/configs.json; what else the file holds stays.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ..checkpoint.atomic import replace_text
from ..errors import MoeCollabError
from . import triton
from .layers import Layers, layers_of
from .triton.configs import ANY, VARIABLE, Config, Configs, choose, kinds_of, mix_of, read, using
from .triton.layout import FieldLayout
from .triton.trial import EXPERTS, LINEARS, Call, Experts, ExpertsShape, Linear, LinearShape, Trial, seconds

__all__ = ["LADDERS", "Step", "climb", "main", "steps", "tune"]

T = TypeVar("T")

LADDERS: dict[str, tuple[int, ...]] = {
    "rows": (16, 32, 64, 128, 256),
    "tokens": (8, 16, 32, 64, 128),
    "split": (1, 2, 4, 8, 16),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5, 6, 8, 10, 12),
}
"""The values that each setting of a kernel can have."""
_ANY_BITS = (2, 3, 4)
"""Bits of the layers on which configs for any mix of bits are tuned."""
_GAIN = 0.99
"""A config that takes a larger part of the time than this is no better: times vary as much by chance."""


class Step(NamedTuple):
    """The config found for a kernel and batches of `tokens`; `before`, `after`: seconds, geometric mean over layers."""

    kernel: str
    tokens: int
    config: Config
    before: float
    after: float


def tune(layers: Layers, tokens: Sequence[int]) -> Iterator[Step]:
    """Tune all kernels that `layers` need for batches of each of `tokens`.

    Raises `MoeCollabError` if no tile runs, or the layers are too large for the device.
    """
    from .triton.ops import device_names

    bits = tuple(FieldLayout.stored(b) for b in layers.bits)
    trials: dict[str, list[Trial]] = {}
    try:
        if layers.experts:
            experts: list[Trial] = [Experts(shape, bits, layers.group) for shape in sorted(layers.experts)]
            trials |= {"gate_up": experts, "down": experts}
        if layers.linears:
            trials["linear"] = [Linear(shape, bits, layers.group) for shape in sorted(layers.linears)]
    except torch.OutOfMemoryError as error:
        raise MoeCollabError(f"{layers} do not fit this GPU's memory; name smaller ones with --shape.") from error
    found: dict[int, dict[str, Config]] = {count: {} for count in tokens}
    for kernel, count in ((kernel, count) for kernel in trials for count in tokens):
        start = choose(device_names(), kinds_of(bits), kernel, count).model_copy(update={"up_to": None})
        every = [trial.calls(count) for trial in trials[kernel]]
        config, before, after = climb(
            [start], partial(_neighbours, kernel=kernel), partial(_calls_with, every, kernel, found[count])
        )
        found[count][kernel] = config
        yield Step(kernel, count, config, before, after)


def _calls_with(
    every: Sequence[Sequence[Call]], kernel: str, others: Mapping[str, Config], config: Config
) -> list[list[Call]]:
    """The calls of each layer of `every`, made with `config` for `kernel` and with `others` for other kernels."""

    def run(call: Call) -> torch.Tensor:
        with using({**others, kernel: config}):
            return call()

    return [[partial(run, call) for call in calls] for calls in every]


def climb(
    starts: Sequence[T], neighbours: Callable[[T], list[T]], calls: Callable[[T], list[list[Call]]]
) -> tuple[T, float, float]:
    """(a config that no neighbour beats, seconds of the best of `starts`, seconds of that config); inf = does not run.

    `calls` returns for a config the calls of each of several layers; the geometric mean of the layers' times counts.
    Raises `MoeCollabError` if neither `starts` nor the neighbours of one of them run.
    """
    tried = list(starts)
    before, best = min(zip(_seconds([calls(s) for s in tried]), tried, strict=True), key=lambda pair: pair[0])
    after = before
    while new := [config for config in neighbours(best) if config not in tried]:
        tried += new
        time, config = min(zip(_seconds([calls(c) for c in new]), new, strict=True), key=lambda pair: pair[0])
        if time >= _GAIN * after:
            break
        best, after = config, time
    if math.isinf(after):
        raise MoeCollabError(f"neither {starts} nor their neighbours run on this device.")
    return best, before, after


def _seconds(candidates: list[list[list[Call]]]) -> list[float]:
    """Each candidate's time, the geometric mean over its layers; inf if it does not run.

    All candidates are compiled first, in parallel.
    """
    from triton import TritonError

    def runs(layers: list[list[Call]]) -> bool:
        try:
            for calls in layers:
                calls[0]()
        except TritonError:
            return False
        except RuntimeError as error:
            if "PassManager" not in str(error):
                raise
            return False
        return True

    # The interpreter runs one kernel at a time.
    with ThreadPoolExecutor(os.cpu_count() if torch.cuda.is_available() else 1) as pool:
        good = list(pool.map(runs, candidates))
    return [
        statistics.geometric_mean(map(seconds, layers)) if is_good else math.inf
        for layers, is_good in zip(candidates, good, strict=True)
    ]


def steps(ladder: Sequence[int], value: int) -> list[int]:
    """The next smaller and the next larger value on an ascending `ladder`, as far as there are such."""
    return [v for v in ladder if v < value][-1:] + [v for v in ladder if v > value][:1]


def _neighbours(config: Config, kernel: str) -> list[Config]:
    """All configs that differ from `config` by one step in one setting."""
    return [
        config.model_copy(update={name: step})
        for name, ladder in LADDERS.items()
        if name != "split" or kernel == "down"
        for step in steps(ladder, getattr(config, name))
    ]


def _store(path: Path, device: str, mix: str, kernel: str, by_tokens: Mapping[int, Config]) -> None:
    """Put a kernel's configs into the file; equal configs of successive numbers of tokens become one entry."""
    root = read(path).root if path.exists() else {}
    kept: list[Config] = []
    for count, config in sorted(by_tokens.items()):
        if kept and kept[-1].model_copy(update={"up_to": None}) == config:
            kept.pop()
        kept.append(config.model_copy(update={"up_to": count}))
    kept[-1] = kept[-1].model_copy(update={"up_to": None})
    root.setdefault(device, {}).setdefault(mix, {})[kernel] = kept
    replace_text(path, Configs(root).model_dump_json(indent=1, exclude_defaults=True) + "\n")


def _wanted(options: argparse.Namespace) -> list[tuple[str, Layers]]:
    """Pairs (the mix of bits that configs are stored for, the layers to tune them on)."""
    if options.checkpoint:
        found = layers_of(options.checkpoint)
        return [(mix_of(kinds_of(map(FieldLayout.stored, layers.bits))), layers) for layers in found]
    experts, linears = set(options.shape), set(options.linear)
    if not experts and not linears:
        experts, linears = set(EXPERTS.values()), set(LINEARS.values())
    every = [Layers(mix or _ANY_BITS, options.group_size, experts, linears) for mix in options.bits]
    return [(mix_of(kinds_of(mix)) if mix else ANY, layers) for mix, layers in zip(options.bits, every, strict=True)]


def shape(text: str) -> ExpertsShape:
    """Parse HIDDENxWIDTHxEXPERTSxTOP_K. The name of this function and the next two appear in argparse's errors."""
    return ExpertsShape(*map(int, text.split("x")))


def linear_shape(text: str) -> LinearShape:
    """Parse ROWSxCOLUMNS."""
    return LinearShape(*map(int, text.split("x")))


def bits(text: str) -> tuple[int, ...] | None:
    """Parse bits such as 2,4 into the widths that the kernels store them in; None for `any`."""
    found = None if text == ANY else tuple(sorted({FieldLayout.stored(int(b)) for b in text.split(",")}))
    if found and not set(found) <= {2, 3, 4, 5, 6, 8, 16}:
        raise ValueError(text)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m moe_collab.kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="tune for its layers")
    parser.add_argument("--shape", type=shape, action="append", default=[], metavar="HIDDENxWIDTHxEXPERTSxTOP_K")
    parser.add_argument("--linear", type=linear_shape, action="append", default=[], metavar="ROWSxCOLUMNS")
    parser.add_argument(
        "--bits", type=bits, nargs="+", default=[None, (2,), (3,), (4,)],
        help=f"that occur in a layer, such as 2,4; {ANY}: for layers whose bits have no configs of their own",
    )  # fmt: skip
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 4096], help="sizes of batches")
    parser.add_argument("--output", type=Path, default=Path("triton-configs.json"))
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune; print a line for each kernel and number of tokens, and store the configs."""
    options = _parser().parse_args(arguments)
    device, tokens = triton.check(), sorted(set(options.tokens))
    if options.output.exists():
        read(options.output)  # to learn now, and not after an hour of tuning, if it is not a file of configs
    for mix, layers in _wanted(options):
        found: dict[str, dict[int, Config]] = {}
        for step in tune(layers, tokens):
            found.setdefault(step.kernel, {})[step.tokens] = step.config
            gain = f"{1e6 * step.before:9.1f} -> {1e6 * step.after:9.1f} us"
            print(f"{mix:8} {step.kernel:8} {step.tokens:5} tokens {gain}  {step.config!r}", flush=True)
            if len(found[step.kernel]) == len(tokens):
                _store(options.output, device, mix, step.kernel, found[step.kernel])
    print(f"Use them with: export {VARIABLE}={options.output.absolute()}")


if __name__ == "__main__":
    try:
        main()
    except MoeCollabError as error:
        sys.exit(f"error: {error}")
