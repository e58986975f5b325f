"""What is freed goes back to the system, however small objects lie between large ones."""

import subprocess
import sys

SCRIPT = """
import sys
from pathlib import Path
import torch
from moe_collab.calibration import Workspace

def held():
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith("RssAnon"))

workspace = Workspace(Path(sys.argv[1]))
torch.ones(16 << 18)  # freeing 16 MiB teaches glibc to keep as much
before = held()
large, small = zip(*((torch.ones(2 << 18), torch.ones(4 << 10)) for _ in range(64)), strict=True)
most = held()
del large
print(most - before, held() - before)
"""


def test_small_objects_do_not_hold_large_ones(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], check=True, capture_output=True, text=True)
    most, left = map(int, done.stdout.splitlines()[-1].split())
    assert most >= 128 << 20  # 64 tensors of 2 MiB were there
    assert left < 16 << 20
