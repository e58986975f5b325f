"""Config groups whose targets are few, anchored, disjoint regexes.

The matchers of compressed-tensors and vLLM try every target on every module: exact names took 67 s for 3,072
modules where regexes took 2.2 s, and DeepSeek-V3 has 44,544.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..formats import TERNARY_PACKED

__all__ = ["NOTE_KEY", "PLUGIN_NOTE", "compact_targets", "config_groups", "write_quantization_config"]

NOTE_KEY, PLUGIN_NOTE = "sparsity_config", "needs the vLLM plugin: pip install moe-collab"
"""Stock vLLM cannot serve ternary, and its errors do not say why: this makes it refuse with the note in its message.

It validates this key, which has lost its meaning; transformers and compressed-tensors do not look at it.
"""

_EXPERT = re.compile(r"^(?P<layer>.*\.experts)\.(?P<index>0|[1-9][0-9]*)\.(?P<projection>\w+)$")


def compact_targets(names: Iterable[str]) -> list[str]:
    """Anchored regexes ("re:^...$") that match exactly `names`, each name by one of them."""
    targets = []
    experts: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in sorted(set(names)):
        if match := _EXPERT.match(name):
            experts[match["layer"]][int(match["index"])].add(match["projection"])
        else:
            targets.append(f"re:^{_escape(name)}$")
    for layer, by_index in experts.items():
        alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, projections in sorted(by_index.items()):
            alike[tuple(sorted(projections))].append(index)
        for members, indices in alike.items():
            targets.append(f"re:^{_escape(layer)}\\.({'|'.join(map(str, indices))})\\.({'|'.join(members)})$")
    return targets


def _escape(name: str) -> str:
    """Like `re.escape`, but without backslashes before characters that need none."""
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", name)


def config_groups(schemes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Module name -> scheme, as `config_groups`: one group per layer and scheme, disjoint."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    described: dict[str, Mapping[str, Any]] = {}
    for name, scheme in schemes.items():
        key = json.dumps(scheme, sort_keys=True)
        described[key] = scheme
        match = _EXPERT.match(name)
        alike[match["layer"] if match else "", key].append(name)
    return {
        f"group_{i}": {**described[key], "targets": compact_targets(names)}
        for i, ((_, key), names) in enumerate(alike.items())
    }


def write_quantization_config(
    directory: Path, schemes: Mapping[str, Mapping[str, Any]], unquantized: Iterable[str]
) -> None:
    """Replace the config groups and ignore list in `directory/config.json` by compact ones."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    quantization = config["quantization_config"]
    quantization["config_groups"] = config_groups(schemes)
    quantization["ignore"] = compact_targets(unquantized)
    formats = {scheme["format"] for scheme in schemes.values()}
    alike = len({json.dumps([s["format"], s["weights"]], sort_keys=True) for s in schemes.values()}) <= 1
    quantization["format"] = formats.pop() if alike and formats else "mixed-precision"
    if TERNARY_PACKED in {scheme["format"] for scheme in schemes.values()}:
        quantization[NOTE_KEY] = PLUGIN_NOTE
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
