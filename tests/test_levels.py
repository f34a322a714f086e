"""Instruction-set levels: which are chosen, and that each one's code compiles."""

import platform

import llvmlite.binding as llvm
import numpy as np
import pytest
from checked import arena, compiled
from numba import float32

from edgellama import DeviceUnavailable, ParameterError
from edgellama.runtimes import (
    kernel_team,
    kernels,
    kernels_attention,
    kernels_linear,
    levels,
    memory,
    simd,
)
from edgellama.runtimes.compiler import _EXTERNAL, object_code
from edgellama.runtimes.levels import LEVELS, Level, available, choose

ARM = "aarch64-unknown-linux-gnu"
KINDS = ("Q8_0", "Q4_K", "IQ4_NL", "F16")  # each function that differs is in one of them
INTEL = "x86_64-unknown-linux-gnu"
TRIPLES = {"neon": (ARM,), "generic": (ARM, INTEL)}  # the others are for INTEL alone


def test_generic_is_everywhere_and_last() -> None:
    assert available()[-1] == "generic"
    assert [name for name in LEVELS if name in available()] == list(available())


def test_every_level_needs_what_the_compiler_is_told_to_use() -> None:
    for level in LEVELS.values():
        told = {feature.removeprefix("+") for feature in level.features.split(",")} - {"", "neon"}
        assert told <= set(level.needs), level.name
        assert level.cpu in ("", "generic", "x86-64-v3", "x86-64-v4"), level.name
        if level.cpu.startswith("x86-64-v3") or level.cpu.startswith("x86-64-v4"):
            assert {"avx2", "fma", "f16c", "bmi2"} <= set(level.needs), level.name


def test_arm_is_asked_through_the_system() -> None:
    """LLVM itself never reports this feature; elsewhere the question is harmless."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        assert levels._arm_has_dotprod() == ("neon" in available())
    else:
        assert "neon" not in available()


def test_the_best_level_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for unset in (None, "", "  "):
        if unset is None:
            monkeypatch.delenv("EDGELLAMA_ISA", raising=False)
        else:
            monkeypatch.setenv("EDGELLAMA_ISA", unset)
        level, reason = choose()
        assert level.name == available()[0] and reason == "the best this processor has"


def test_the_environment_names_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in available():
        monkeypatch.setenv("EDGELLAMA_ISA", f" {name.upper()} ")
        assert choose() == (LEVELS[name], "named by EDGELLAMA_ISA")


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLAMA_ISA", "avx1024\x1b[31m")
    with pytest.raises(
        ParameterError, match=r"EDGELLAMA_ISA = 'avx1024.*allowed: amx, avx512"
    ) as caught:
        choose()
    assert str(caught.value).isprintable() and caught.value.field == "EDGELLAMA_ISA"


def test_a_level_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = [name for name in LEVELS if name not in available()]
    assert lacking  # no processor has both NEON and AVX
    for name in lacking:
        monkeypatch.setenv("EDGELLAMA_ISA", name)
        with pytest.raises(DeviceUnavailable, match=f"lacks .*'{name}'; it has .*generic"):
            choose()


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_every_level_defines_the_same_functions(level: Level) -> None:
    module = llvm.parse_assembly(level.source)
    module.verify()
    defined = {f.name for f in module.functions if not f.is_declaration}
    names = [n for n in _EXTERNAL if level.tiles or not n.startswith("tile_")]
    assert defined == {f"edgellama.{name}" for name in names}


def undefined_symbols(code: bytes) -> set[str]:
    """Names that a 64-bit little-endian ELF object asks the loader for."""
    assert code[:6] == b"\x7fELF\x02\x01"

    def word(at: int, size: int) -> int:
        return int.from_bytes(code[at : at + size], "little")

    sections, size, count = word(40, 8), word(58, 2), word(60, 2)
    names = set()
    for i in range(count):
        section = sections + i * size
        if word(section + 4, 4) != 2:  # SHT_SYMTAB
            continue
        start, length = word(section + 24, 8), word(section + 32, 8)
        strings = word(sections + word(section + 40, 4) * size + 24, 8)
        for symbol in range(start, start + length, 24):
            name = strings + word(symbol, 4)
            if word(symbol + 6, 2) == 0 and code[name]:
                names.add(code[name : code.index(b"\0", name)].decode())
    return names


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_kernels_compile_and_call_nothing_outside(level: Level) -> None:
    """For every level and target, whether this machine could run it or not."""
    functions = {name: getattr(kernels, name) for name in ("norm", "swiglu")}
    functions["attention"] = kernels_attention.attention("q8_0")
    functions |= {f"linear_{kind}": kernels_linear.linear(kind) for kind in KINDS}
    functions |= {"embed": kernels_linear.embed("Q4_1"), "lead": kernel_team.lead}
    if level.name in available() and level.name != "generic":
        functions = {"follow": kernel_team.follow}  # the other tests compile and run the rest
    for triple in TRIPLES.get(level.name, (INTEL,)):
        for name, function in functions.items():
            code = object_code(f"edgellama_{name}", function, level, triple)
            machine = int.from_bytes(code[18:20], "little")
            assert machine == {ARM: 183, INTEL: 62}[triple]
            assert undefined_symbols(code) <= {"memset"}, (triple, name)  # every process has it


def _columns(values: int, out: int, columns: int, rows: int) -> None:
    for column in range(0, columns, 16):
        total = simd.splat_f32(float32(0.0))
        for row in range(rows):
            total = simd.add(total, memory.load_i8x16(values + row * 34 + 2 + column % 32))
        memory.store_f32x16(out + column * 4, total)


@pytest.mark.parametrize("level", available())
def test_addresses_survive_being_optimized_twice(level: str) -> None:
    """Numba's code generator splits addresses in a way that LLVM's optimizer must not see."""
    with arena() as room:
        values, out = room.new((3, 34), np.int8), room.new(32, np.float32)
        values[:, 2:] = np.arange(32) + np.arange(3)[:, None]
        kernel = compiled(level, "_columns", _columns)
        kernel(values.ctypes.data, out.ctypes.data, 32, 3)
        assert np.array_equal(out, values[:, 2:].sum(axis=0))
