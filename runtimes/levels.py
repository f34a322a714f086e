"""Instruction-set levels: which there are, which this machine has, and what differs between them.

Kernels are the same at every level but for a few small functions: see `level_sources.py`.

Knows nothing about kernels or models.
"""

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache

from edgellama.errors import DeviceUnavailable, ParameterError, shown
from edgellama.runtimes.level_sources import SOURCES


@dataclass(frozen=True)
class Level:
    """One target: what LLVM compiles for, what the CPU must have, and the functions that differ."""

    name: str
    cpu: str
    features: str
    needs: tuple[str, ...]  # LLVM's names of CPU features
    tiles: str = ""  # the kernels that multiply many tokens in bfloat16, if there are any

    @property
    def source(self) -> str:
        """The functions that differ, as LLVM reads them."""
        return SOURCES[self.name]


_V3 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
_VNNI = (*_V4, "avx512vnni")
_AMX = ("amx-tile", "amx-bf16", "avx512bf16")
LEVELS = {  # best first
    level.name: level
    for level in (
        Level(
            "amx",
            "x86-64-v4",
            "+avx512vnni,+amx-tile,+amx-bf16,+avx512bf16",
            (*_VNNI, *_AMX),
            tiles="tiles",
        ),
        Level("avx512vnni", "x86-64-v4", "+avx512vnni", _VNNI),
        Level("avxvnni", "x86-64-v3", "+avxvnni", (*_V3, "avxvnni")),
        Level("avx2", "x86-64-v3", "", _V3),
        Level("neon", "generic", "+neon,+dotprod", ("dotprod",)),
        Level("generic", "", "", ()),
    )
}


@cache
def available() -> tuple[str, ...]:
    """Names of the levels this machine can run, best first."""
    features = _features()
    return tuple(name for name, level in LEVELS.items() if features.issuperset(level.needs))


def _features() -> set[str]:
    """LLVM's names of what this processor has."""
    import llvmlite.binding as llvm

    try:
        found = {name for name, has in llvm.get_host_cpu_features().items() if has}
    except RuntimeError:  # LLVM cannot tell on this system
        found = set()
    if platform.machine().lower() in ("aarch64", "arm64") and _arm_has_dotprod():
        found.add("dotprod")
    if found.issuperset(_AMX) and not _tiles_permitted():
        found.difference_update(_AMX)
    return found


def _tiles_permitted() -> bool:
    """Ask Linux, once a process, to let it use the tile registers; elsewhere nobody can be asked.

    The system refuses where a thread's signal stack is too small to save them.
    """
    try:
        number, request, tile_data = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA
        if sys.platform != "linux":
            return False
        return bool(ctypes.CDLL(None).syscall(number, request, tile_data) == 0)
    except (OSError, AttributeError):
        return False


def _arm_has_dotprod() -> bool:
    """Ask the system, since LLVM names this feature for no ARM machine."""
    try:
        if sys.platform == "win32":
            return bool(ctypes.WinDLL("kernel32").IsProcessorFeaturePresent(43))
        if sys.platform == "darwin":
            value, size = ctypes.c_int(), ctypes.c_size_t(4)
            name, empty = b"hw.optional.arm.FEAT_DotProd", ctypes.c_size_t(0)
            arguments = (name, ctypes.byref(value), ctypes.byref(size), None, empty)
            return bool(ctypes.CDLL(None).sysctlbyname(*arguments) == 0 and value.value == 1)
        hardware = ctypes.CDLL(None).getauxval
        hardware.restype, hardware.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return bool(hardware(16) >> 20 & 1)  # AT_HWCAP, HWCAP_ASIMDDP
    except (OSError, AttributeError):
        return False


def choose() -> tuple[Level, str]:
    """The level to run at and why: the best there is, or the one `EDGELLAMA_ISA` names.

    Raises ParameterError for an unknown name, DeviceUnavailable for one this machine lacks.
    """
    wanted = os.environ.get("EDGELLAMA_ISA", "").strip().lower()
    if not wanted:
        best = available()[0]
        return LEVELS[best], "the best this processor has"
    if wanted not in LEVELS:
        raise ParameterError(
            f"EDGELLAMA_ISA = {shown(wanted)}; allowed: {', '.join(LEVELS)}",
            field="EDGELLAMA_ISA",
            value=wanted,
            allowed=", ".join(LEVELS),
        )
    if wanted not in available():
        raise DeviceUnavailable(
            f"this processor lacks the instruction-set level '{wanted}'; "
            f"it has {', '.join(available())}",
            field="EDGELLAMA_ISA",
            value=wanted,
            allowed=", ".join(available()),
            hint="Unset EDGELLAMA_ISA to use the best one",
        )
    return LEVELS[wanted], "named by EDGELLAMA_ISA"
