"""A real model on your machine: loaded, planned, compressed, evaluated, served, and one file of evidence of it.

    python -m integration.real_model MODEL --output DIR [--bpw 3.0] [--tokens 65536] [--test-tokens 16384]
        [--text FILE ...] [--serve-python PYTHON] [--retention R]

MODEL is a name on the hub, such as allenai/OLMoE-1B-7B-0924, or a folder; it may be larger than memory. The first part
of each text calibrates, and the rest tests; without `--text` it is that of the fixtures. `DIR/real_model.json` gets the
evidence of each step once it is finished; the same command goes on after the last one, and inside compression where it
was killed. Serving can be made up for later, with `--serve-python`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from itertools import chain, count, islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from loguru import logger
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer

from moe_collab import MoeCollabError, load_linearized, oneshot
from moe_collab.architectures import family_of, text_config
from moe_collab.calibration.at_hand import compute_device
from moe_collab.checkpoint.atomic import replace_file, replace_text
from moe_collab.checkpoint.hub import model_folder
from moe_collab.evaluation import compare
from moe_collab.moe_model import describe
from moe_collab.plan import CompressionPlan

from .benchmarks.peak import announce, machine, report, run_measured
from .benchmarks.rows import standard_error
from .benchmarks.scale_jobs import digest
from .benchmarks.shapes import check_room
from .compress import checkpoint_size, expert_bpw, recipe
from .fixture.corpus import read_corpus
from .server import serve

EVIDENCE, TOKENS, CHECKPOINT, WORK, OFFLOAD = "real_model.json", "tokens.safetensors", "checkpoint", "work", "offload"
"""What there is in the output folder; the last two go when the checkpoint is there."""
PACKAGES = ("moe-collab", "torch", "transformers", "llmcompressor", "compressed-tensors")
LENGTH, ROWS, BATCH = 512, 32, 8
"""Tokens of a sequence, or fewer, so that there are so many test sequences: the noise is judged by them."""
LOCK = ".real_model.lock"
CHUNK = 16
"""Characters of a place in a text, for each token of a sequence."""
PROMPTS, PROMPT, ANSWER = 4, 32, 65
"""How many prompts the server gets, and tokens of each and of its answer."""
START_SECONDS = 3600
"""Most that the server takes to load."""

_PR_SET_PDEATHSIG = 1

Texts = dict[str, tuple[str, str]]
"""Domain -> what calibrates, what tests."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Do the steps that are not done yet, print the table; the evidence."""
    options = parse(arguments)
    output: Path = options.output
    if options.step:
        do_step(output, options.step)
        return {}
    vllm = options.serve_python and vllm_version(options.serve_python)
    source, tokenizer = find_model(options.model)
    tokens = draw_tokens(tokenizer, options)
    output.mkdir(parents=True, exist_ok=True)
    with alone(output):
        return run(options, source, tokens, vllm)


def run(options: argparse.Namespace, source: Path, tokens: dict[str, torch.Tensor], vllm: str | None) -> dict[str, Any]:
    """The steps, once all that can be wrong beforehand has been looked at."""
    output = options.output
    replace_file(output / TOKENS, partial(save_file, tokens))
    evidence = Evidence(output / EVIDENCE, described(options, source, tokens, digest([output / TOKENS])))
    if not evidence.has("compress"):
        check_room(output, 2 * checkpoint_size(source) + work_bytes(source, options.tokens))
    evidence.add("compress", partial(measured, options, "compress"))
    for temporary in (WORK, OFFLOAD):
        shutil.rmtree(output / temporary, ignore_errors=True)
    evidence.add("evaluate", partial(measured, options, "evaluate"))
    if vllm:
        evidence.add("serve", lambda: {"vllm": vllm} | served(options.serve_python, output))
    print_table(evidence.found)
    return evidence.found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name on the hub, or folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of all that is written")
    parser.add_argument("--bpw", type=float, default=3.0, help="mean bits per weight of the routed experts")
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration")
    parser.add_argument("--test-tokens", type=int, default=16384)
    parser.add_argument("--text", type=Path, nargs="+", help="plain text")
    parser.add_argument("--serve-python", type=Path, help="python of the environment with vLLM")
    parser.add_argument("--retention", type=float, help="share of the experts to keep")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Raise `MoeCollabError` if another process works in the folder."""
    try:
        with FileLock(output / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise MoeCollabError(f"{output}: another run is working there. Wait, or name another --output.") from error


class Evidence:
    """What is known of a run, in `file`. Raises `MoeCollabError` if a run that was `described` otherwise began it."""

    def __init__(self, file: Path, described: dict[str, Any]) -> None:
        self._file = file
        self.found: dict[str, Any] = described | {"starts": {}, "steps": {}}
        if not file.exists():
            return
        self.found = json.loads(file.read_text())
        both = [(self.found[part], described[part]) for part in ("arguments", "versions")]
        others = [
            f"{key} ({known.get(key)}, now {value})"
            for known, now in both
            for key, value in now.items()
            if known.get(key) != value
        ]
        if others:
            raise MoeCollabError(
                f"{file.parent}: it holds another run, with other {', '.join(others)}. Name another --output, or "
                "delete this folder."
            )

    def has(self, step: str) -> bool:
        """Whether it is finished."""
        return step in self.found["steps"]

    def add(self, step: str, make: Callable[[], dict[str, Any]]) -> None:
        """What `make` finds out in this step, unless it is known."""
        if self.has(step):
            return
        # Time and memory are those of the last start, so that it is told how many there were.
        self.found["starts"][step] = self.found["starts"].get(step, 0) + 1
        self._write()
        print(f"{step}: its log is {self._file.with_name(f'{step}.log')}", flush=True)
        began = time.monotonic()
        found = make()
        self.found["steps"][step] = {"seconds": round(time.monotonic() - began, 1), **found}
        self._write()

    def _write(self) -> None:
        replace_text(self._file, json.dumps(self.found, indent=1) + "\n")


def vllm_version(python: Path) -> str:
    """What is installed beside `python`. Raises `MoeCollabError` if it is no python, or there is no vLLM."""
    ask = "from importlib.metadata import version; print(version('vllm'))"
    try:
        return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    except OSError as error:
        raise MoeCollabError(f"--serve-python: {python} cannot be run: {error}.") from error
    except subprocess.CalledProcessError as error:
        raise MoeCollabError(f"--serve-python: {python} is of an environment without vLLM:\n{error.stderr}") from error


def find_model(name: str) -> tuple[Path, Any]:
    """A model's folder, downloaded if need be, and tokenizer. Raises `MoeCollabError` if it is no MoE model we know."""
    source = model_folder(name).resolve()
    try:
        config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise MoeCollabError(f"{name}: its config or tokenizer cannot be read: {error}") from error
    family_of(config)
    if not checkpoint_size(source):
        raise MoeCollabError(f"{name}: there are no *.safetensors in {source}. Name a folder with a model's weights.")
    return source, tokenizer


def draw_tokens(tokenizer: Any, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """`calibration` and `test` sequences [rows, length], going round the domains, which have no text in common.

    Raises `MoeCollabError` if there is too little text.
    """
    texts = split_files(options) if options.text else fixture_texts()
    length = max(min(LENGTH, options.tokens // ROWS, options.test_tokens // ROWS), 8)
    drawn = {}
    for part, (split, wanted) in enumerate((("calibration", options.tokens), ("test", options.test_tokens))):
        by_domain = [sequences(tokenizer, text[part], length) for text in texts.values()]
        going_round = (row for rows in zip_longest(*by_domain) for row in rows if row is not None)
        rows = list(islice(going_round, wanted // length))
        if len(rows) < max(wanted // length, 1):
            raise MoeCollabError(
                f"{', '.join(texts)}: too little text: {len(rows) * length} tokens for {split}, where {wanted} are "
                "wanted. Name more with --text, or ask for fewer tokens with --tokens and --test-tokens."
            )
        drawn[split] = torch.tensor(rows)
    return drawn


def split_files(options: argparse.Namespace) -> Texts:
    """Each file is a domain, cut in two in proportion to the tokens that are wanted."""
    share = options.tokens / max(options.tokens + options.test_tokens, 1)
    texts = {}
    for file in options.text:
        try:
            text = file.read_text("utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise MoeCollabError(f"--text: {file} cannot be read as text: {error}.") from error
        texts[str(file)] = text[: int(share * len(text))], text[int(share * len(text)) :]
    return texts


def fixture_texts() -> Texts:
    """What the fixtures were trained on, and what was held out."""
    try:
        corpus = read_corpus()
    except OSError as error:
        raise MoeCollabError(f"the text of the fixtures is not there: {error}. Name yours with --text.") from error
    return {domain: ("\n".join(of["train"]), "\n".join(of["held_out"])) for domain, of in corpus.items()}


def sequences(tokenizer: Any, text: str, length: int) -> Iterator[list[int]]:
    """Rows of `length` tokens from all over a text, each with what the tokenizer puts before any text.

    Of each place one row is taken before a second of any: rows that follow each other tell little that is new.
    """
    start = [int(token) for token in tokenizer("").input_ids]
    size, width = CHUNK * length, length - len(start)
    places = list(range(0, len(text), size))
    random.Random(0).shuffle(places)
    encoded = cache(lambda place: tokenizer(text[place : place + size], add_special_tokens=False).input_ids)
    for begin in count(0, width):
        rows = (encoded(place)[begin : begin + width] for place in places)
        whole = (row for row in rows if len(row) == width)
        if (first := next(whole, None)) is None:
            return
        yield from ([*start, *row] for row in chain([first], whole))


def described(options: argparse.Namespace, source: Path, tokens: dict[str, torch.Tensor], digest: str) -> dict:
    """What a run is, and where it takes place."""
    return {
        "arguments": {
            "model": options.model,
            "source": str(source),
            "model_bytes": checkpoint_size(source),
            "bpw": options.bpw,
            "retention": options.retention,
            "tokens": tokens["calibration"].numel(),
            "test_tokens": tokens["test"].numel(),
            "length": tokens["test"].shape[1],
            "text": [str(file) for file in options.text or []] or "fixtures",
            "digest_of_tokens": digest,
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": machine(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else compute_device().type,
        },
    }


def work_bytes(source: Path, tokens: int) -> int:
    """Most that calibration keeps in files, in bfloat16: of each token what goes through the blocks, and samples."""
    config = text_config(AutoConfig.from_pretrained(source))
    return tokens * config.hidden_size * (8 * config.num_hidden_layers + 48)


def measured(options: argparse.Namespace, step: str) -> dict[str, Any]:
    """What a step finds out in a process of its own, and its time and memory by stage."""
    command = [sys.executable, "-m", "integration.real_model", options.model, "--output", str(options.output)]
    found = run_measured([*command, "--step", step], options.output / f"{step}.log", threading.TIMEOUT_MAX)
    stages = {
        name: {key: round(value, 1) for key, value in asdict(stage).items()} for name, stage in found.stages.items()
    }
    return {"peak_memory": max(stage["memory"] for stage in stages.values()), "stages": stages} | found.result


def do_step(output: Path, step: str) -> None:
    """What `measured` has a process do."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # or it would go on if its parent is killed
    logger.remove()
    logger.add(sys.stdout, level="INFO", filter=lambda record: record["level"].name != "METRIC")
    report(_IN_PROCESS[step](output, json.loads((output / EVIDENCE).read_text())["arguments"]))


def compress(output: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Load the model from disk, plan, round and save; what the plan expected and what there is."""
    announce("load")
    shutil.rmtree(output / OFFLOAD, ignore_errors=True)  # of a run that was killed
    model = load_linearized(arguments["source"], offload_folder=output / OFFLOAD)
    experts = sum(layer.num_experts for layer in describe(model).layers)
    announce("prepare")
    rows: Any = load_file(output / TOKENS)["calibration"]
    samples: Any = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    oneshot(
        model=model,
        recipe=recipe(*modifiers(output, arguments)),
        dataset=DataLoader(samples, batch_size=BATCH),
        output_dir=str(output / CHECKPOINT),
        work=output / WORK,
    )
    plan = CompressionPlan.load(output / "plan.json")
    return {
        "checkpoint_bytes": checkpoint_size(output / CHECKPOINT),
        "predicted_bytes": plan.predicted_bytes,
        "expert_bpw": expert_bpw(output / CHECKPOINT),
        "experts": experts,
        "experts_dropped": experts - plan.num_experts * len(plan.routed_tokens),
        "schemes": dict(Counter(plan.schemes.values()).most_common()),
        "predicted_kl": plan.predicted_kl,
        "heldout_kl": plan.heldout_kl,
        "uniform": plan.uniform,
        "uniform_heldout_kl": plan.uniform_kl,
        **accelerator_peak(),
    }


def modifiers(output: Path, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The recipe's."""
    if arguments["retention"] is not None:
        yield {"ExpertPruningModifier": {"retention": arguments["retention"]}}
    options = {"bpw": arguments["bpw"], "bits": [2, 3, 4, 5, 6, 8], "group_size": [32, 64, 128]}
    yield {"MixedBitAllocModifier": options | {name: str(output / f"{name}.json") for name in ("plan", "costs")}}
    yield {"FisherGPTQModifier": {"ignore": ["lm_head"]}}


def evaluate(output: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Compare what was saved with the original, both streamed from disk and computed in float32."""
    tokens, source = load_file(output / TOKENS)["test"], arguments["source"]
    where: dict[str, Any] = {"dtype": torch.float32, "device": compute_device(), "scratch": output}
    announce("original")
    original = compare(source, source, tokens, **where)
    announce("compressed")
    found = compare(output / CHECKPOINT, source, tokens, **where)
    return {
        "predictions": tokens[:, 1:].numel(),
        "original_perplexity": original.perplexity,
        "perplexity": found.perplexity,
        "original_accuracy": original.accuracy,
        "accuracy": found.accuracy,
        "kl": found.kl,
        "kl_standard_error": standard_error(found.kl_by_row),
        "top1_agreement": found.top1,
        **accelerator_peak(),
    }


_IN_PROCESS = {"compress": compress, "evaluate": evaluate}


def accelerator_peak() -> dict[str, int]:
    """Most memory that torch had there in this process, if there is an accelerator."""
    return {"accelerator_peak": torch.accelerator.max_memory_allocated()} if torch.accelerator.is_available() else {}


def served(python: Path, output: Path) -> dict[str, Any]:
    """What `vllm serve` completes, and how fast it decodes one request at a time."""
    prompts = load_file(output / TOKENS)["test"][:PROMPTS, :PROMPT].tolist()
    memory = 0.9 if torch.accelerator.is_available() else 0.3
    began, tokens, seconds, texts = time.monotonic(), 0, 0.0, []
    log = output / "serve.log"
    with serve(python, output / CHECKPOINT, log, dtype="auto", memory=memory, start_seconds=START_SECONDS) as server:
        loaded = time.monotonic() - began
        for prompt in prompts:
            server.complete(prompt, ANSWER)  # so that what the two below have in common takes equally long
            first, whole = (timed(partial(server.complete, prompt, limit)) for limit in (1, ANSWER))
            tokens, seconds = tokens + len(whole[1]["token_ids"]) - 1, seconds + whole[0] - first[0]
            texts.append(whole[1]["text"])
    return {
        "load_seconds": round(loaded, 1),
        "decoded_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2) if tokens and seconds > 0 else None,
        "prompts": AutoTokenizer.from_pretrained(output / CHECKPOINT).batch_decode(prompts),
        "completions": texts,
    }


def timed(ask: Callable[[], dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """Seconds that it takes, and what it gives."""
    began = time.monotonic()
    found = ask()
    return time.monotonic() - began, found


def print_table(found: dict[str, Any]) -> None:
    """The evidence in short."""
    arguments, steps = found["arguments"], found["steps"]
    made, judged = steps["compress"], steps["evaluate"]
    table = Table(title=f"{arguments['model']}, {judged['predictions']:,} predictions of text that calibrated nothing")
    for column in ("", "original", "compressed"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("bytes", f"{arguments['model_bytes']:,}", f"{made['checkpoint_bytes']:,}")
    table.add_row("bits per expert weight", "", f"{made['expert_bpw']:.3f}")
    table.add_row("experts", f"{made['experts']:,}", f"{made['experts'] - made['experts_dropped']:,}")
    table.add_row("perplexity", f"{judged['original_perplexity']:.3f}", f"{judged['perplexity']:.3f}")
    table.add_row("right next tokens", f"{judged['original_accuracy']:.2%}", f"{judged['accuracy']:.2%}")
    table.add_row("KL to the original, nats", "", f"{judged['kl']:.4f} ± {judged['kl_standard_error']:.4f}")
    table.add_row("top-1 agreement", "", f"{judged['top1_agreement']:.2%}")
    for step in ("compress", "evaluate"):
        starts = found["starts"][step]
        last = f", the last of {starts} starts" if starts > 1 else ""
        taken = f"{steps[step]['seconds']:,.0f} s, {steps[step]['peak_memory'] / 1e9:.2f} GB"
        table.add_row(f"{step}: time, peak memory", "", taken + last)
    speed = f"{steps['serve']['tokens_per_second']} tokens/s" if "serve" in steps else "needs --serve-python"
    table.add_row("decoding in vLLM", "", speed)
    Console(width=max(110, Console().width)).print(table)


if __name__ == "__main__":
    try:
        main()
    except MoeCollabError as error:
        sys.exit(f"real_model: {error}")
