"""What differs between instruction-set levels, in LLVM's own language.

Every level defines the same functions on sixteen lanes: `dot4` and `dot4_small` (sums of four
products of bytes), `lookup` (a table of sixteen bytes), `fma`, `from_f16`, `to_f16`, `to_bf16` and
`pause`. `simd.py` and `memory.py` call them by name. Integer results are bit-equal at all levels,
and so are float results but for `generic`, which does without fused multiply-add. Level `amx` has
three more, `tile_begin`, `tile_block` and `tile_end`: products of bfloat16 matrices.

Knows nothing about machines: `levels.py` chooses.
"""

from edgellama.runtimes.level_floats import BF16, FMA, HALF, MUL_ADD, SOFT_BF16, SOFT_HALF
from edgellama.runtimes.level_text import B, V, constant, function, mask
from edgellama.runtimes.level_tiles import TILES

# --- dot products: %t and the sums of four products of unsigned %u and signed %s ----------------

_DOT_ARGS = f"{V} %t, {B} %u, {B} %s"


def _both(body: str) -> str:
    """`dot4` and `dot4_small` alike."""
    return function(V, "dot4", _DOT_ARGS, body) + function(V, "dot4_small", _DOT_ARGS, body)


# AVX-512-VNNI: one instruction for all 64 products.
_VNNI_512 = f"declare {V} @llvm.x86.avx512.vpdpbusd.512({V}, {B}, {B})\n" + _both(
    f"  %r = call {V} @llvm.x86.avx512.vpdpbusd.512({_DOT_ARGS})\n  ret {V} %r"
)


def _halves(step: str) -> str:
    """A dot product on 256-bit halves: `step` turns %t#, %u#, %s# (# is 0 or 1) into %r#."""
    lines = []
    for i in (0, 1):
        lanes, bytes_ = mask(range(8 * i, 8 * i + 8)), mask(range(32 * i, 32 * i + 32))
        lines += [
            f"  %t{i} = shufflevector {V} %t, {V} poison, {lanes}",
            f"  %u{i} = shufflevector {B} %u, {B} poison, {bytes_}",
            f"  %s{i} = shufflevector {B} %s, {B} poison, {bytes_}",
            step.replace("#", str(i)),
        ]
    joined = f"  %r = shufflevector <8 x i32> %r0, <8 x i32> %r1, {mask(range(16))}"
    return "\n".join([*lines, joined, f"  ret {V} %r"])


_VNNI_256 = (
    "declare <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <32 x i8>, <32 x i8>)\n"
    + _both(
        _halves(
            "  %r# = call <8 x i32> @llvm.x86.avx512.vpdpbusd.256"
            "(<8 x i32> %t#, <32 x i8> %u#, <32 x i8> %s#)"
        )
    )
)

# AVX2: bytes are split into even and odd 16-bit lanes, because multiplying bytes directly
# (`pmaddubsw`) saturates above 127 * 127 * 2; where the codes are small it is safe and faster.
_MADD_WD = "call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> {}, <16 x i16> {})"
_W8 = constant("i16", 8)
_AVX2 = (
    "declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)\n"
    "declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)\n"
    + function(
        V,
        "dot4",
        _DOT_ARGS,
        _halves(
            "  %v# = bitcast <32 x i8> %u# to <16 x i16>\n"
            "  %w# = bitcast <32 x i8> %s# to <16 x i16>\n"
            f"  %ve# = and <16 x i16> %v#, {constant('i16', 255)}\n"
            f"  %vo# = lshr <16 x i16> %v#, {_W8}\n"
            f"  %wl# = shl <16 x i16> %w#, {_W8}\n"
            f"  %we# = ashr <16 x i16> %wl#, {_W8}\n"
            f"  %wo# = ashr <16 x i16> %w#, {_W8}\n"
            f"  %e# = {_MADD_WD.format('%ve#', '%we#')}\n"
            f"  %o# = {_MADD_WD.format('%vo#', '%wo#')}\n"
            "  %p# = add <8 x i32> %e#, %o#\n"
            "  %r# = add <8 x i32> %p#, %t#"
        ),
    )
    + function(
        V,
        "dot4_small",
        _DOT_ARGS,
        _halves(
            "  %v# = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %u#, <32 x i8> %s#)\n"
            f"  %p# = {_MADD_WD.format('%v#', constant('i16', 1))}\n"
            "  %r# = add <8 x i32> %p#, %t#"
        ),
    )
)


def _neon() -> str:
    """`sdot` multiplies signed bytes: codes up to 127 go as they are, larger ones less 128."""
    sdot = "<4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32> {}, <16 x i8> {}, <16 x i8> {})"
    declare = (
        "declare <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)\n"
    )

    def body(exact: bool) -> str:
        lines = []
        for i in range(4):
            lanes, bytes_ = mask(range(4 * i, 4 * i + 4)), mask(range(16 * i, 16 * i + 16))
            lines += [
                f"  %t{i} = shufflevector {V} %t, {V} poison, {lanes}",
                f"  %u{i} = shufflevector {B} %u, {B} poison, {bytes_}",
                f"  %s{i} = shufflevector {B} %s, {B} poison, {bytes_}",
            ]
            if not exact:
                lines.append(f"  %r{i} = call " + sdot.format(f"%t{i}", f"%u{i}", f"%s{i}"))
                continue
            ones = constant("i8", 64)  # 2 * 64 * s, since 128 is no signed byte
            lines += [
                f"  %v{i} = xor <16 x i8> %u{i}, {constant('i8', -128)}",
                f"  %a{i} = call " + sdot.format(f"%t{i}", f"%v{i}", f"%s{i}"),
                f"  %b{i} = call " + sdot.format(f"%a{i}", ones, f"%s{i}"),
                f"  %r{i} = call " + sdot.format(f"%b{i}", ones, f"%s{i}"),
            ]
        eight = mask(range(8))
        lines += [
            f"  %lo = shufflevector <4 x i32> %r0, <4 x i32> %r1, {eight}",
            f"  %hi = shufflevector <4 x i32> %r2, <4 x i32> %r3, {eight}",
            f"  %r = shufflevector <8 x i32> %lo, <8 x i32> %hi, {mask(range(16))}",
            f"  ret {V} %r",
        ]
        return "\n".join(lines)

    return (
        declare
        + function(V, "dot4", _DOT_ARGS, body(True))
        + function(V, "dot4_small", _DOT_ARGS, body(False))
    )


def _generic() -> str:
    """Plain vector arithmetic that every LLVM target can compile."""
    lines = [
        f"  %uw = zext {B} %u to <64 x i32>",
        f"  %sw = sext {B} %s to <64 x i32>",
        "  %p = mul <64 x i32> %uw, %sw",
    ]
    total = "%t"
    for i in range(4):
        lines += [
            f"  %p{i} = shufflevector <64 x i32> %p, <64 x i32> poison, {mask(range(i, 64, 4))}",
            f"  %r{i} = add {V} {total}, %p{i}",
        ]
        total = f"%r{i}"
    return _both("\n".join([*lines, f"  ret {V} {total}"]))


# --- `lookup`: each byte of %x (0..15) replaced by that entry of %t -----------------------------

_T = "<16 x i8>"
_LOOKUP_ARGS = f"{_T} %t, {B} %x"


def _wide_table(copies: int) -> str:
    """%w: the table, so many times."""
    lanes = (
        f"<{16 * copies} x i32> <" + ", ".join(f"i32 {i % 16}" for i in range(16 * copies)) + ">"
    )
    return f"  %w = shufflevector {_T} %t, {_T} poison, {lanes}"


_LOOKUP_512 = f"declare {B} @llvm.x86.avx512.pshuf.b.512({B}, {B})\n" + function(
    B,
    "lookup",
    _LOOKUP_ARGS,
    f"{_wide_table(4)}\n  %r = call {B} @llvm.x86.avx512.pshuf.b.512({B} %w, {B} %x)\n  ret {B} %r",
)


def _lookup_in_parts(parts: int, declare: str, step: str, table: str) -> str:
    """`lookup` on so many parts of %x: `step` turns %x# into %r#."""
    size = 64 // parts
    lines = [table] if table else []
    for i in range(parts):
        bytes_ = mask(range(size * i, size * (i + 1)))
        lines += [
            f"  %x{i} = shufflevector {B} %x, {B} poison, {bytes_}",
            step.replace("#", str(i)),
        ]
    joined = [f"%r{i}" for i in range(parts)]
    while len(joined) > 1:
        wide = size * parts // len(joined)
        kind, lanes = f"<{wide} x i8>", mask(range(2 * wide))
        pairs = list(zip(joined[::2], joined[1::2], strict=True))
        joined = [f"{a}{b[1:]}" for a, b in pairs]
        lines += [
            f"  {name} = shufflevector {kind} {a}, {kind} {b}, {lanes}"
            for name, (a, b) in zip(joined, pairs, strict=True)
        ]
    lines.append(f"  ret {B} {joined[0]}")
    return declare + function(B, "lookup", _LOOKUP_ARGS, "\n".join(lines))


_LOOKUP_256 = _lookup_in_parts(
    2,
    "declare <32 x i8> @llvm.x86.avx2.pshuf.b(<32 x i8>, <32 x i8>)\n",
    "  %r# = call <32 x i8> @llvm.x86.avx2.pshuf.b(<32 x i8> %w, <32 x i8> %x#)",
    _wide_table(2),
)
_LOOKUP_NEON = _lookup_in_parts(
    4,
    f"declare {_T} @llvm.aarch64.neon.tbl1.v16i8({_T}, {_T})\n",
    f"  %r# = call {_T} @llvm.aarch64.neon.tbl1.v16i8({_T} %t, {_T} %x#)",
    "",
)


def _lookup_generic() -> str:
    """Sixteen comparisons: slow, and possible everywhere."""
    lines, result = [], "zeroinitializer"
    for i in range(16):
        lanes = "<64 x i32> " + ("zeroinitializer" if i == 0 else f"splat (i32 {i})")
        lines += [
            f"  %e{i} = shufflevector {_T} %t, {_T} poison, {lanes}",
            f"  %c{i} = icmp eq {B} %x, {constant('i8', i)}",
            f"  %r{i} = select <64 x i1> %c{i}, {B} %e{i}, {B} {result}",
        ]
        result = f"%r{i}"
    return function(B, "lookup", _LOOKUP_ARGS, "\n".join([*lines, f"  ret {B} {result}"]))


# --- the levels ---------------------------------------------------------------------------------

_PAUSE_X86 = "declare void @llvm.x86.sse2.pause()\n" + function(
    "void", "pause", "", "  call void @llvm.x86.sse2.pause()\n  ret void"
)
_PAUSE_ARM = "declare void @llvm.aarch64.hint(i32)\n" + function(
    "void", "pause", "", "  call void @llvm.aarch64.hint(i32 1)\n  ret void"
)
_PAUSE_NONE = function("void", "pause", "", "  ret void")

_AVX512 = _VNNI_512 + _LOOKUP_512 + FMA + HALF + _PAUSE_X86
SOURCES = {
    "amx": _AVX512 + BF16 + TILES,
    "avx512vnni": _AVX512 + SOFT_BF16,
    "avxvnni": _VNNI_256 + _LOOKUP_256 + FMA + HALF + SOFT_BF16 + _PAUSE_X86,
    "avx2": _AVX2 + _LOOKUP_256 + FMA + HALF + SOFT_BF16 + _PAUSE_X86,
    "neon": _neon() + _LOOKUP_NEON + FMA + HALF + SOFT_BF16 + _PAUSE_ARM,
    "generic": _generic() + _lookup_generic() + MUL_ADD + SOFT_HALF + SOFT_BF16 + _PAUSE_NONE,
}
