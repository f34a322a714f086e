"""What the control groups of Linux, versions 1 and 2, leave to this process: cores and memory.

A group is limited by every group around it, so the walk goes from the process's own group up to the
mount's root, and the smallest limit counts. Where there are no groups, or what they say cannot be
read, there is no limit. Knows nothing about the machine otherwise.

Source: cgroups(7), proc_pid_mountinfo(5), the kernel's Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1/memory.rst.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 says "none" with a number near 2**63


def cores(system: Path = _ROOT) -> int | None:
    """Whole cores that the quotas grant, rounded up, at least 1; None without one.

    `system` is the folder that holds `proc` and `sys`.
    """
    granted = [share for group in _groups("cpu", system) if (share := _share(group)) is not None]
    return min(granted, default=None)


def _share(group: Path) -> int | None:
    words = _text(group / "cpu.max").split()  # version 2: "max 100000"
    if len(words) != 2:
        words = [_text(group / f"cpu.cfs_{what}_us").strip() for what in ("quota", "period")]
    try:
        quota, period = (int(word) for word in words)
    except ValueError:
        return None
    return max(1, -(-quota // period)) if quota > 0 and period > 0 else None


def free_memory(system: Path = _ROOT) -> int | None:
    """Bytes left below the tightest limit; None without one. File pages count as free."""
    left = [room for group in _groups("memory", system) if (room := _room(group)) is not None]
    return min(left, default=None)


def _room(group: Path) -> int | None:
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for limit_name, used_name in names:
        try:
            limit, used = int(_text(group / limit_name)), int(_text(group / used_name))
        except ValueError:  # not there, or "max"
            continue
        return max(0, limit - used + _file_pages(group)) if limit < _UNLIMITED else None
    return None


def _file_pages(group: Path) -> int:
    """Bytes of files that are only kept for another reading."""
    stat = _text(group / "memory.stat")
    found = dict(re.findall(r"^((?:total_)?(?:in)?active_file) (\d+)$", stat, re.MULTILINE))
    prefix = "total_" if "total_inactive_file" in found else ""  # version 1: with groups below
    return sum(int(found.get(prefix + name, 0)) for name in ("active_file", "inactive_file"))


# --- where the groups are ------------------------------------------------------------------------


def _groups(controller: str, system: Path) -> Iterator[Path]:
    """Folders of the process's groups that this controller may limit, from its own upwards."""
    own = _own(system)
    for line in _text(system / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        name = "" if kind[0] == "cgroup2" else controller
        if name and name not in kind[2].split(","):
            continue
        if name in own:
            yield from _upwards(system, _plain(fields[3]), _plain(fields[4]), own[name])


def _own(system: Path) -> dict[str, str]:
    """The process's group by controller; version 2's under the empty name."""
    groups = {}
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if group:
            groups.update(dict.fromkeys(controllers.split(","), group))
    return groups


def _upwards(system: Path, root: str, mount: str, group: str) -> Iterator[Path]:
    """From the group's folder to the mount's, whose root is a group itself, in containers too."""
    folder = system / mount.lstrip("/")
    try:
        inner = PurePosixPath(group).relative_to(root)
    except ValueError:  # a container's view of a group outside it
        inner = PurePosixPath()
    if ".." in inner.parts:
        inner = PurePosixPath()
    yield folder / inner
    yield from (folder / parent for parent in inner.parents)


def _plain(path: str) -> str:
    """mountinfo writes spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _text(path: Path) -> str:
    """A file's contents; nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
