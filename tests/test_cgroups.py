"""Limits of control groups, read from trees as Linux shows them."""

from pathlib import Path

import pytest

from edgellama import cgroups

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
33 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:4 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
NO_LIMIT = "9223372036854771712"  # as version 1 writes it
GIB = 2**30


def tree(folder: Path, mounts: str, own: str, **files: str) -> Path:
    """A system of these mounts and files; `own` is /proc/self/cgroup."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/mountinfo").write_text(mounts)
    (folder / "proc/self/cgroup").write_text(own)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def v2(folder: Path, group: str, files: dict[str, str]) -> Path:
    return tree(folder, V2, f"0::{group}\n", **files)


def test_no_groups_no_limits(tmp_path: Path) -> None:
    assert cgroups.cores(tmp_path) is None and cgroups.free_memory(tmp_path) is None
    system = v2(tmp_path, "/user.slice/a.scope", {})
    assert cgroups.cores(system) is None and cgroups.free_memory(system) is None


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "1000 100000"}, 1),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),
        ({"a/cpu.max": "100000 100000", "a/b/cpu.max": "300000 100000"}, 1),
        ({"a/cpu.max": "800000 100000", "a/b/cpu.max": "300000 100000"}, 3),
        ({"other/cpu.max": "100000 100000"}, None),
        ({"cpu.max": "100000 0"}, None),
        ({"cpu.max": "nonsense"}, None),
    ],
)
def test_cores_of_version_2(limits: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    assert cgroups.cores(v2(tmp_path, "/a/b", limits)) == cores


def test_memory_of_version_2(tmp_path: Path) -> None:
    """The tightest room on the way up counts, and pages of files are room."""
    files = {
        "a/b/memory.max": str(8 * GIB),
        "a/b/memory.current": str(1 * GIB),
        "a/memory.max": str(6 * GIB),
        "a/memory.current": str(5 * GIB),
        "a/memory.stat": f"anon 77\nfile {3 * GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}",
        "memory.current": str(20 * GIB),
    }
    assert cgroups.free_memory(v2(tmp_path, "/a/b", files)) == 4 * GIB


def test_memory_that_is_used_up(tmp_path: Path) -> None:
    files = {"a/memory.max": str(GIB), "a/memory.current": str(2 * GIB)}
    assert cgroups.free_memory(v2(tmp_path, "/a", files)) == 0


def test_unlimited_memory(tmp_path: Path) -> None:
    files = {"a/memory.max": "max", "a/memory.current": str(2 * GIB)}
    assert cgroups.free_memory(v2(tmp_path, "/a", files)) is None


def test_version_1(tmp_path: Path) -> None:
    own = "4:memory:/jobs/one\n3:cpu,cpuacct:/jobs/two\n0::/\n"
    files = {
        "cpu,cpuacct/jobs/two/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/jobs/two/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/jobs/cpu.cfs_quota_us": "250000",
        "cpu,cpuacct/jobs/cpu.cfs_period_us": "100000",
        "memory/jobs/one/memory.limit_in_bytes": NO_LIMIT,
        "memory/jobs/one/memory.usage_in_bytes": "1",
        "memory/jobs/memory.limit_in_bytes": str(4 * GIB),
        "memory/jobs/memory.usage_in_bytes": str(3 * GIB),
        "memory/jobs/memory.stat": f"inactive_file 5\ntotal_active_file 0\n"
        f"total_inactive_file {GIB}",
        "memory/memory.limit_in_bytes": NO_LIMIT,
        "memory/memory.usage_in_bytes": str(9 * GIB),
    }
    system = tree(tmp_path, V1, own, **files)
    assert cgroups.cores(system) == 3
    assert cgroups.free_memory(system) == 2 * GIB


@pytest.mark.parametrize("own", ["/docker/abc", "/docker/abc/inner", "/", "/../../elsewhere"])
def test_a_container_sees_its_group_at_the_mount(own: str, tmp_path: Path) -> None:
    """Whether it is told its own group's name outside, or a name of the container's own."""
    mounts = V2.replace(" / /sys", " /docker/abc /sys")
    files = {"cpu.max": "200000 100000", "inner/cpu.max": "100000 100000"}
    expected = 1 if own.endswith("inner") else 2
    assert cgroups.cores(tree(tmp_path, mounts, f"0::{own}\n", **files)) == expected


def test_a_mount_with_a_space(tmp_path: Path) -> None:
    mounts = V2.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/my\040groups")
    system = tree(tmp_path, mounts, "0::/\n", **{"my groups/cpu.max": "100000 100000"})
    assert cgroups.cores(system) == 1


def test_damaged_files_are_no_limits(tmp_path: Path) -> None:
    system = tree(tmp_path, "\n1 2\nx - cgroup2\n" + V2, "\n:\n0\n", **{"cpu.max": "100000 100000"})
    assert cgroups.cores(system) is None
    (system / "proc/self/cgroup").write_bytes(b"0::/\xff\xfe\n")
    assert cgroups.cores(system) == 1
