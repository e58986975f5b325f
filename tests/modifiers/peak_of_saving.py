"""How much memory saving takes: `peak_of_saving.py MODEL_DIRECTORY... prune|quantize disk|memory FOLDER`, as JSON.

For each model, of any number of layers: the most anonymous and shared memory during the save, less that before it.
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from llmcompressor.utils import load_context
from transformers import AutoModelForCausalLM

from tests.modifiers.conftest import run, samples

RECIPES = {
    "prune": [{"ExpertPruningModifier": {"retention": 0.5}}],
    "quantize": [
        {"ActivationSmoothModifier": {"num_experts_per_tok": "keep"}},
        {"QuantizationModifier": {"ignore": ["lm_head"], "scheme": "W4A16"}},
    ],
}
PLACES = {"memory": {}, "disk": {"device_map": "auto_offload", "max_memory": {"cpu": 100_000}}}


def held() -> int:
    """Bytes that no file backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(status[key].split()[0]) for key in ("RssAnon", "RssShmem"))


def growth(path: str, kind: str, place: str, folder: Path) -> int:
    """Bytes by which memory grows while the model at `path` is saved, compressed by `kind`."""
    with load_context():
        options = PLACES[place] | ({"offload_folder": str(folder / "offload")} if place == "disk" else {})
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)
    run(model, *RECIPES[kind], data=samples(2, 8))
    before = peak = held()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, held())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model.save_pretrained(folder / "out", max_shard_size="20MB")
    done.set()
    watcher.join()
    return peak - before


if __name__ == "__main__":
    *paths, kind, place, folder = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps([growth(path, kind, place, Path(folder) / str(i)) for i, path in enumerate(paths)]))
