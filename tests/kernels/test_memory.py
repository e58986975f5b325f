"""What may still be allocated, on the machine and in a container."""

from moe_collab.kernels.memory import available_memory

GIB = 1 << 30


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 100 kB\nMemAvailable:    8388608 kB\n"}


def test_this_machine():
    assert available_memory() > 0


def test_a_machine_without_limits(tmp_path):
    files = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "100\n"}
    assert available_memory(write(tmp_path, MACHINE | files)) == 8 * GIB


def test_containers(tmp_path):
    two = {"memory.max": 6 * GIB, "memory.current": 5 * GIB, "memory.stat": f"anon 7\ninactive_file {2 * GIB}"}
    files = {f"sys/fs/cgroup/{name}": f"{value}\n" for name, value in two.items()}
    assert available_memory(write(tmp_path / "two", MACHINE | files)) == 3 * GIB
    one = {"limit_in_bytes": 4 * GIB, "usage_in_bytes": 3 * GIB, "stat": f"cache 9\ntotal_inactive_file {GIB}"}
    files = {f"sys/fs/cgroup/memory/memory.{name}": f"{value}\n" for name, value in one.items()}
    assert available_memory(write(tmp_path / "one", MACHINE | files)) == 2 * GIB


def test_unknown(tmp_path):
    assert available_memory(tmp_path) == 0
