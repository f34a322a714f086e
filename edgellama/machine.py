"""What this machine has to give: cores and memory, as far as the process may use them.

What only Linux tells has a fallback. Knows nothing about models.
"""

import os
import sys
from pathlib import Path


def usable_cores() -> int:
    """Physical cores within this process's affinity and its cgroup's quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    """The hardware threads of this one's core: its own number where that is not known."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Whole cores that the cgroup (version 2) grants, rounded up."""
    try:
        granted, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, -(-int(granted) // int(period)))
    except (OSError, ValueError):
        return sys.maxsize


def available_memory() -> int | None:
    """Bytes that can be had without swapping, the cgroup's limit included; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(free, max(0, limit - used))
    except (OSError, ValueError):  # no cgroup, or its limit is "max"
        return free
