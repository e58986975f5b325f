"""`make bench-cpu`, second half: tokens per second of a whole model in vLLM, bfloat16 against packed experts.

The model has Qwen3-30B-A3B's layers with random weights, as many as 12 GB hold in bfloat16, and a vocabulary of 8,192.
Appends `{"case": "model", ...}` rows to build/bench/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from moe_collab.checkpoint.groups import write_quantization_config
from moe_collab.formats import packed_width

from .contenders import MIX

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
MEMORY = 12e9
ATTENTION_BITS, GROUP = 4, 128
MIXES = {"4": ((4,) * 3,), "3": ((3,) * 3,), "2": ((2,) * 3,), "mix 4/3/2": MIX}
PREFILL, DECODE, REPEATS = 512, 48, 3
KV_CACHE = 256 << 20


def main() -> None:
    """Build the checkpoints, run each in a process of its own, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--memory", type=float, default=MEMORY, help="bytes of bfloat16 weights: how many layers")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print("RESULT", json.dumps(measure(arguments.measure)))
        return
    layers = int(arguments.memory // _layer_bytes())
    rows = [run(arguments.output / "model", None, layers)]
    for name in arguments.mixes:
        rows.append(run(arguments.output / "model", MIXES[name], layers) | {"bits": name})
    for row in rows:
        row["vs_bf16"] = {
            key: round(rate / rows[0]["tokens_per_s"][key], 2) for key, rate in row["tokens_per_s"].items()
        }
        print(json.dumps(row))
    path = arguments.output / "cpu.json"
    others = [r for r in json.loads(path.read_text()) if r["case"] != "model"] if path.exists() else []
    path.write_text(json.dumps(others + rows, indent=1))


def run(path: Path, bits: tuple | None, layers: int) -> dict:
    """One row, measured on a fresh checkpoint in a fresh process; the checkpoint is removed."""
    shutil.rmtree(path, ignore_errors=True)
    write_checkpoint(path, bits, layers)
    # Left to itself vLLM keeps one core for its scheduler, which on a small machine is half of what there is.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    size = round(sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e9, 2)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
    }
    command = [sys.executable, "-m", "integration.benchmarks.model", "--measure", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    shutil.rmtree(path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"vLLM did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    rates = json.loads(lines[0].removeprefix("RESULT "))
    row = {"case": "model", "bits": "16", "layers": layers, "threads": torch.get_num_threads()}
    memory = {key: rates.pop(key) for key in ("load_peak_gb", "loaded_gb")}
    return row | memory | {"checkpoint_gb": size, "tokens_per_s": rates}


def measure(path: Path) -> dict[str, float]:
    """Memory while loading, and tokens per second: decoding at batch 1 and 8, and prefill of one prompt."""
    from vllm import LLM, SamplingParams

    packed = "quantization_config" in json.loads((path / "config.json").read_text())
    with PeakMemory() as memory:
        model = LLM(
            model=str(path),
            dtype="bfloat16",
            load_format="auto" if packed else "dummy",
            skip_tokenizer_init=True,
            max_model_len=1024,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.3,  # of which kv_cache_memory_bytes makes nothing but a check
            kv_cache_memory_bytes=KV_CACHE,
        )

    def seconds(batch: int, length: int, new: int, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        prompts = [
            {"prompt_token_ids": torch.randint(0, 8192, (length,), generator=generator).tolist()} for _ in range(batch)
        ]
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        model.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began

    rates = {"load_peak_gb": round(memory.peak / 1e9, 2), "loaded_gb": round(memory.now / 1e9, 2)}
    seconds(8, 16, 4, 0)
    for batch in (1, 8):
        runs = [seconds(batch, 16, DECODE + 1, r) - seconds(batch, 16, 1, r) for r in range(REPEATS)]
        rates[f"decode_{batch}"] = round(batch * DECODE / statistics.median(runs), 2)
    rates["prefill"] = round(PREFILL / statistics.median(seconds(1, PREFILL, 1, r) for r in range(REPEATS)), 2)
    return rates


class PeakMemory:
    """Samples the memory of the process with the weights: `peak` and `now`, bytes, without pages of mapped files."""

    def __init__(self) -> None:
        self.peak = self.now = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.now = max(map(_anonymous, psutil.Process().children(recursive=True)), default=0)
            self.peak = max(self.peak, self.now)


def _anonymous(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


def write_checkpoint(path: Path, bits: tuple | None, layers: int) -> None:
    """Random codes and scales, a file a layer; without `bits` the configuration alone, for vLLM's dummy weights."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=1))
    if bits is None:
        return
    schemes: dict[str, dict] = {}
    index: dict[str, str] = {}
    for layer in range(-1, layers):
        tensors = _outer(schemes) if layer < 0 else _layer(layer, bits, schemes)
        file = f"model-{layer + 1}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    (path / "config.json").write_text(json.dumps(config))
    write_quantization_config(path, schemes, [])


def _outer(schemes: dict[str, dict]) -> dict[str, torch.Tensor]:
    hidden, vocabulary = CONFIG["hidden_size"], CONFIG["vocab_size"]
    tensors = {"model.embed_tokens.weight": _dense(vocabulary, hidden), "model.norm.weight": _ones(hidden)}
    return tensors | _packed("lm_head", vocabulary, hidden, ATTENTION_BITS, schemes)


def _layer(layer: int, bits: tuple, schemes: dict[str, dict]) -> dict[str, torch.Tensor]:
    prefix, hidden, width = f"model.layers.{layer}", CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    query, key = 32 * 128, 4 * 128
    tensors = {f"{prefix}.{norm}_layernorm.weight": _ones(hidden) for norm in ("input", "post_attention")}
    tensors |= {f"{prefix}.self_attn.{norm}_norm.weight": _ones(128) for norm in "qk"}
    tensors[f"{prefix}.mlp.gate.weight"] = _dense(CONFIG["num_experts"], hidden)
    for name, rows, columns in (("q", query, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, query)):
        tensors |= _packed(f"{prefix}.self_attn.{name}_proj", rows, columns, ATTENTION_BITS, schemes)
    for expert in range(CONFIG["num_experts"]):
        shapes = zip(("gate", "up", "down"), ((width, hidden), (width, hidden), (hidden, width)), strict=True)
        for (name, shape), b in zip(shapes, bits[expert % len(bits)], strict=True):
            tensors |= _packed(f"{prefix}.mlp.experts.{expert}.{name}_proj", *shape, b, schemes)
    return tensors


def _packed(name: str, rows: int, columns: int, bits: int, schemes: dict[str, dict]) -> dict[str, torch.Tensor]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group"}
    schemes[name] = {"format": "pack-quantized", "weights": weights | {"group_size": GROUP}}
    size = (rows, packed_width(columns, bits))
    scales = (torch.rand(rows, columns // GROUP) + 0.5) / (1 << (bits - 1)) / columns**0.5
    return {
        f"{name}.weight_packed": torch.randint(-(1 << 31), (1 << 31) - 1, size, dtype=torch.int32),
        f"{name}.weight_scale": scales.bfloat16(),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }


def _dense(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) / columns**0.5).bfloat16()


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def _layer_bytes() -> float:
    hidden, width = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    return 2.0 * (CONFIG["num_experts"] * 3 * hidden * width + 2 * hidden * 128 * (32 + 4))


if __name__ == "__main__":
    main()
