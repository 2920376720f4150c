"""How much memory is left, in a container too."""

import psutil
import pytest

from hfprune.runtime.memory import available_bytes

MIB = 2**20


def cgroup(root, line, folder, **files):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (root / "sys/fs/cgroup" / folder / f"memory.{name}").write_text(f"{value}\n")


def test_a_limit_of_the_cgroup_counts_less_what_it_uses_and_cached_files_come_back(tmp_path):
    cgroup(tmp_path, "0::/job", "job", max=100 * MIB, current=70 * MIB, stat=f"anon 5\ninactive_file {20 * MIB}")
    assert available_bytes(tmp_path) == 50 * MIB


def test_the_narrowest_group_around_it_counts(tmp_path):
    cgroup(tmp_path, "0::/slurm/job", "slurm/job", max="max", current=70 * MIB, stat="inactive_file 0")
    cgroup(tmp_path, "0::/slurm/job", "slurm", max=90 * MIB, current=80 * MIB, stat="inactive_file 0")
    assert available_bytes(tmp_path) == 10 * MIB


def test_version_1_of_cgroups(tmp_path):
    files = {"limit_in_bytes": 64 * MIB, "usage_in_bytes": 60 * MIB, "stat": "inactive_file 0"}
    cgroup(tmp_path, "4:memory:/docker/a", "memory/docker/a", **files)
    assert available_bytes(tmp_path) == 4 * MIB


@pytest.mark.parametrize("limit", ["max", 2**62])
def test_without_a_limit_it_is_the_machines(limit, tmp_path):
    cgroup(tmp_path, "0::/", "", max=limit, current=1, stat="inactive_file 0")
    assert available_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.1)
