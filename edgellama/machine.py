"""What this machine has to give: cores and memory, as far as the process may use them.

What only Linux tells has a fallback. Knows nothing about models.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgellama import cgroups
from edgellama.errors import OutOfMemory


def usable_cores() -> int:
    """Physical cores within this process's affinity and its cgroup's quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), cgroups.cores() or len(cores)))


def _siblings(cpu: int) -> str:
    """The hardware threads of this one's core: its own number where that is not known."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def available_memory() -> int | None:
    """Bytes that can be had without swapping, the cgroup's limit included; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    limit = cgroups.free_memory()
    return free if limit is None else min(free, limit)


@contextmanager
def room_for(what: str, n_bytes: int, hint: str) -> Iterator[None]:
    """What is allocated within; OutOfMemory with both numbers where there is no room for it."""
    try:
        yield
    except MemoryError as error:
        free = available_memory()
        has = "unknown" if free is None else f"{free / 2**20:,.1f} MiB"
        problem = f"no room for {what}: {n_bytes / 2**20:,.1f} MiB; available: {has}"
        raise OutOfMemory(problem, hint=hint) from error
