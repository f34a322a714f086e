"""What differs between instruction-set levels, in LLVM's own language.

Every level defines the same functions on sixteen lanes: `dot4` and `dot4_small` (sums of four
products of bytes), `lookup` (a table of sixteen bytes), `fma`, `from_f16`, `to_f16`, `to_bf16` and
`pause`. `simd.py` and `memory.py` call them by name. Integer results are bit-equal at all levels,
and so are float results but for `generic`, which does without fused multiply-add. Level `amx` has
three more, `tile_begin`, `tile_block` and `tile_end`: products of bfloat16 matrices.

Knows nothing about machines: `levels.py` chooses.
"""

_HEAD = "define {result} @edgellama.{name}({arguments}) alwaysinline {{\n{body}\n}}\n"
_V = "<16 x i32>"
_B = "<64 x i8>"


def _function(result: str, name: str, arguments: str, body: str) -> str:
    return _HEAD.format(result=result, name=name, arguments=arguments, body=body)


def _mask(indices: range) -> str:
    return f"<{len(indices)} x i32> <" + ", ".join(f"i32 {i}" for i in indices) + ">"


def _constant(kind: str, value: int) -> str:
    """A vector's value, all lanes alike; its type stands before it or with the other operand."""
    return f"splat ({kind} {value})"


_DOT_ARGS = f"{_V} %t, {_B} %u, {_B} %s"

_HALF = _function(
    "<16 x float>",
    "from_f16",
    "<16 x i16> %x",
    "  %h = bitcast <16 x i16> %x to <16 x half>\n"
    "  %f = fpext <16 x half> %h to <16 x float>\n"
    "  ret <16 x float> %f",
) + _function(
    "<16 x i16>",
    "to_f16",
    "<16 x float> %x",
    "  %h = fptrunc <16 x float> %x to <16 x half>\n"
    "  %i = bitcast <16 x half> %h to <16 x i16>\n"
    "  ret <16 x i16> %i",
)

_FMA = (
    "declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)\n"
    + _function(
        "<16 x float>",
        "fma",
        "<16 x float> %x, <16 x float> %y, <16 x float> %z",
        "  %r = call <16 x float> @llvm.fma.v16f32"
        "(<16 x float> %x, <16 x float> %y, <16 x float> %z)\n"
        "  ret <16 x float> %r",
    )
)

_PAUSE_X86 = "declare void @llvm.x86.sse2.pause()\n" + _function(
    "void", "pause", "", "  call void @llvm.x86.sse2.pause()\n  ret void"
)
_PAUSE_ARM = "declare void @llvm.aarch64.hint(i32)\n" + _function(
    "void", "pause", "", "  call void @llvm.aarch64.hint(i32 1)\n  ret void"
)
_PAUSE_NONE = _function("void", "pause", "", "  ret void")


def _both(body: str) -> str:
    """`dot4` and `dot4_small` alike."""
    return _function(_V, "dot4", _DOT_ARGS, body) + _function(_V, "dot4_small", _DOT_ARGS, body)


# `lookup`: each byte of %x (0..15) replaced by that entry of %t.
_T = "<16 x i8>"
_LOOKUP_ARGS = f"{_T} %t, {_B} %x"


def _wide_table(copies: int) -> str:
    """%w: the table, so many times."""
    lanes = (
        f"<{16 * copies} x i32> <" + ", ".join(f"i32 {i % 16}" for i in range(16 * copies)) + ">"
    )
    return f"  %w = shufflevector {_T} %t, {_T} poison, {lanes}"


_LOOKUP_512 = f"declare {_B} @llvm.x86.avx512.pshuf.b.512({_B}, {_B})\n" + _function(
    _B,
    "lookup",
    _LOOKUP_ARGS,
    f"{_wide_table(4)}\n"
    f"  %r = call {_B} @llvm.x86.avx512.pshuf.b.512({_B} %w, {_B} %x)\n"
    f"  ret {_B} %r",
)


def _lookup_in_parts(parts: int, declare: str, step: str, table: str) -> str:
    """`lookup` on so many parts of %x: `step` turns %x# into %r#."""
    size = 64 // parts
    lines = [table] if table else []
    for i in range(parts):
        bytes_ = _mask(range(size * i, size * (i + 1)))
        lines += [
            f"  %x{i} = shufflevector {_B} %x, {_B} poison, {bytes_}",
            step.replace("#", str(i)),
        ]
    joined = [f"%r{i}" for i in range(parts)]
    while len(joined) > 1:
        wide = size * parts // len(joined)
        kind, lanes = f"<{wide} x i8>", _mask(range(2 * wide))
        pairs = list(zip(joined[::2], joined[1::2], strict=True))
        joined = [f"{a}{b[1:]}" for a, b in pairs]
        lines += [
            f"  {name} = shufflevector {kind} {a}, {kind} {b}, {lanes}"
            for name, (a, b) in zip(joined, pairs, strict=True)
        ]
    lines.append(f"  ret {_B} {joined[0]}")
    return declare + _function(_B, "lookup", _LOOKUP_ARGS, "\n".join(lines))


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
            f"  %c{i} = icmp eq {_B} %x, {_constant('i8', i)}",
            f"  %r{i} = select <64 x i1> %c{i}, {_B} %e{i}, {_B} {result}",
        ]
        result = f"%r{i}"
    return _function(_B, "lookup", _LOOKUP_ARGS, "\n".join([*lines, f"  ret {_B} {result}"]))


# AVX-512-VNNI: one instruction for all 64 products.
_VNNI_512 = f"declare {_V} @llvm.x86.avx512.vpdpbusd.512({_V}, {_B}, {_B})\n" + _both(
    f"  %r = call {_V} @llvm.x86.avx512.vpdpbusd.512({_DOT_ARGS})\n  ret {_V} %r"
)


def _halves(step: str, declare: str = "") -> str:
    """A dot product on 256-bit halves: `step` turns %t#, %u#, %s# (# is 0 or 1) into %r#."""
    lines = []
    for i in (0, 1):
        lanes, bytes_ = _mask(range(8 * i, 8 * i + 8)), _mask(range(32 * i, 32 * i + 32))
        lines += [
            f"  %t{i} = shufflevector {_V} %t, {_V} poison, {lanes}",
            f"  %u{i} = shufflevector {_B} %u, {_B} poison, {bytes_}",
            f"  %s{i} = shufflevector {_B} %s, {_B} poison, {bytes_}",
            step.replace("#", str(i)),
        ]
    joined = f"  %r = shufflevector <8 x i32> %r0, <8 x i32> %r1, {_mask(range(16))}"
    return "\n".join([*lines, joined, f"  ret {_V} %r"])


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
_W8 = _constant("i16", 8)
_AVX2 = (
    "declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)\n"
    "declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)\n"
    + _function(
        _V,
        "dot4",
        _DOT_ARGS,
        _halves(
            "  %v# = bitcast <32 x i8> %u# to <16 x i16>\n"
            "  %w# = bitcast <32 x i8> %s# to <16 x i16>\n"
            f"  %ve# = and <16 x i16> %v#, {_constant('i16', 255)}\n"
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
    + _function(
        _V,
        "dot4_small",
        _DOT_ARGS,
        _halves(
            "  %v# = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %u#, <32 x i8> %s#)\n"
            f"  %p# = {_MADD_WD.format('%v#', _constant('i16', 1))}\n"
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
            lanes, bytes_ = _mask(range(4 * i, 4 * i + 4)), _mask(range(16 * i, 16 * i + 16))
            lines += [
                f"  %t{i} = shufflevector {_V} %t, {_V} poison, {lanes}",
                f"  %u{i} = shufflevector {_B} %u, {_B} poison, {bytes_}",
                f"  %s{i} = shufflevector {_B} %s, {_B} poison, {bytes_}",
            ]
            if not exact:
                lines.append(f"  %r{i} = call " + sdot.format(f"%t{i}", f"%u{i}", f"%s{i}"))
                continue
            ones = _constant("i8", 64)  # 2 * 64 * s, since 128 is no signed byte
            lines += [
                f"  %v{i} = xor <16 x i8> %u{i}, {_constant('i8', -128)}",
                f"  %a{i} = call " + sdot.format(f"%t{i}", f"%v{i}", f"%s{i}"),
                f"  %b{i} = call " + sdot.format(f"%a{i}", ones, f"%s{i}"),
                f"  %r{i} = call " + sdot.format(f"%b{i}", ones, f"%s{i}"),
            ]
        eight = _mask(range(8))
        lines += [
            f"  %lo = shufflevector <4 x i32> %r0, <4 x i32> %r1, {eight}",
            f"  %hi = shufflevector <4 x i32> %r2, <4 x i32> %r3, {eight}",
            f"  %r = shufflevector <8 x i32> %lo, <8 x i32> %hi, {_mask(range(16))}",
            f"  ret {_V} %r",
        ]
        return "\n".join(lines)

    return (
        declare
        + _function(_V, "dot4", _DOT_ARGS, body(True))
        + _function(_V, "dot4_small", _DOT_ARGS, body(False))
    )


def _generic() -> str:
    """Plain vector arithmetic that every LLVM target can compile."""
    lines = [
        f"  %uw = zext {_B} %u to <64 x i32>",
        f"  %sw = sext {_B} %s to <64 x i32>",
        "  %p = mul <64 x i32> %uw, %sw",
    ]
    total = "%t"
    for i in range(4):
        lines += [
            f"  %p{i} = shufflevector <64 x i32> %p, <64 x i32> poison, {_mask(range(i, 64, 4))}",
            f"  %r{i} = add {_V} {total}, %p{i}",
        ]
        total = f"%r{i}"
    return _both("\n".join([*lines, f"  ret {_V} {total}"]))


# Half precision in integer arithmetic: a baseline CPU has no conversion, and the compiler would
# call a library function that a Python process does not hold.
_SOFT_HALF = _function(
    "<16 x float>",
    "from_f16",
    "<16 x i16> %x",
    f"""  %w = zext <16 x i16> %x to {_V}
  %m = and {_V} %w, {_constant("i32", 0x7FFF)}
  %sign0 = and {_V} %w, {_constant("i32", 0x8000)}
  %sign = shl {_V} %sign0, {_constant("i32", 16)}
  %up = shl {_V} %m, {_constant("i32", 13)}
  %norm = add {_V} %up, {_constant("i32", 112 << 23)}
  %isbig = icmp uge {_V} %m, {_constant("i32", 0x7C00)}
  %big = add {_V} %norm, {_constant("i32", 112 << 23)}
  %n1 = select <16 x i1> %isbig, {_V} %big, {_V} %norm
  %issub = icmp ult {_V} %m, {_constant("i32", 0x400)}
  %mf = uitofp {_V} %m to <16 x float>
  %sf = fmul <16 x float> %mf, splat (float 0x3E70000000000000)
  %si = bitcast <16 x float> %sf to {_V}
  %n2 = select <16 x i1> %issub, {_V} %si, {_V} %n1
  %r = or {_V} %n2, %sign
  %f = bitcast {_V} %r to <16 x float>
  ret <16 x float> %f""",
) + _function(
    "<16 x i16>",
    "to_f16",
    "<16 x float> %x",
    f"""  %b = bitcast <16 x float> %x to {_V}
  %a = and {_V} %b, {_constant("i32", 0x7FFFFFFF)}
  %sign = lshr {_V} %b, {_constant("i32", 16)}
  %s = and {_V} %sign, {_constant("i32", 0x8000)}
  %odd0 = lshr {_V} %a, {_constant("i32", 13)}
  %odd = and {_V} %odd0, {_constant("i32", 1)}
  %rebias = sub {_V} %a, {_constant("i32", 112 << 23)}
  %half = add {_V} %rebias, {_constant("i32", 0xFFF)}
  %round = add {_V} %half, %odd
  %norm = lshr {_V} %round, {_constant("i32", 13)}
  %af = bitcast {_V} %a to <16 x float>
  %magic = fadd <16 x float> %af, splat (float 5.000000e-01)
  %mi = bitcast <16 x float> %magic to {_V}
  %sub = sub {_V} %mi, {_constant("i32", 0x3F000000)}
  %issub = icmp ult {_V} %a, {_constant("i32", 113 << 23)}
  %n1 = select <16 x i1> %issub, {_V} %sub, {_V} %norm
  %isbig = icmp uge {_V} %a, {_constant("i32", 0x477FF000)}
  %n2 = select <16 x i1> %isbig, {_V} {_constant("i32", 0x7C00)}, {_V} %n1
  %isnan = icmp ugt {_V} %a, {_constant("i32", 0x7F800000)}
  %n3 = select <16 x i1> %isnan, {_V} {_constant("i32", 0x7E00)}, {_V} %n2
  %r = or {_V} %n3, %s
  %h = trunc {_V} %r to <16 x i16>
  ret <16 x i16> %h""",
)
_MUL_ADD = _function(
    "<16 x float>",
    "fma",
    "<16 x float> %x, <16 x float> %y, <16 x float> %z",
    "  %m = fmul <16 x float> %x, %y\n  %r = fadd <16 x float> %m, %z\n  ret <16 x float> %r",
)

# bfloat16 in integer arithmetic: rounded to nearest even, and a NaN stays one.
_F32X32, _I32X32 = "<32 x float>", "<32 x i32>"
_JOIN = f"  %v = shufflevector <16 x float> %x, <16 x float> %y, {_mask(range(32))}\n"
_BF16_ARGS = "<16 x float> %x, <16 x float> %y"
_SOFT_BF16 = _function(
    "<32 x i16>",
    "to_bf16",
    _BF16_ARGS,
    _JOIN
    + f"""  %i = bitcast {_F32X32} %v to {_I32X32}
  %s = lshr {_I32X32} %i, {_constant("i32", 16)}
  %odd = and {_I32X32} %s, {_constant("i32", 1)}
  %half = add {_I32X32} %odd, {_constant("i32", 0x7FFF)}
  %sum = add {_I32X32} %i, %half
  %up = lshr {_I32X32} %sum, {_constant("i32", 16)}
  %isnan = fcmp uno {_F32X32} %v, %v
  %r = select <32 x i1> %isnan, {_I32X32} {_constant("i32", 0x7FC0)}, {_I32X32} %up
  %t = trunc {_I32X32} %r to <32 x i16>
  ret <32 x i16> %t""",
)
_BF16 = _function(
    "<32 x i16>",
    "to_bf16",
    _BF16_ARGS,
    _JOIN
    + f"""  %h = fptrunc {_F32X32} %v to <32 x bfloat>
  %t = bitcast <32 x bfloat> %h to <32 x i16>
  ret <32 x i16> %t""",
)


def _amx() -> str:
    """32 tokens by 32 rows in tile registers 0..3; 4 and 5 bring tokens, 6 and 7 rows.

    All tiles are 16 rows of 64 bytes: palette 1, eight widths, eight heights.
    """
    config = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
    cells = ", ".join(f"i8 {n}" for n in config)
    declare = (
        f"@edgellama.tile_config = internal constant [64 x i8] [{cells}], align 64\n"
        "declare void @llvm.x86.ldtilecfg(ptr)\n"
        "declare void @llvm.x86.tilerelease()\n"
        "declare void @llvm.x86.tilezero(i8)\n"
        "declare void @llvm.x86.tileloadd64(i8, ptr, i64)\n"
        "declare void @llvm.x86.tilestored64(i8, ptr, i64)\n"
        "declare void @llvm.x86.tdpbf16ps(i8, i8, i8)\n"
    )
    begin = "  call void @llvm.x86.ldtilecfg(ptr @edgellama.tile_config)\n  ret void"
    end = "  call void @llvm.x86.tilerelease()\n  ret void"
    lines = ["entry:"]
    lines += [f"  call void @llvm.x86.tilezero(i8 {i})" for i in range(4)]
    lines += [
        "  br label %step",
        "step:",
        "  %i = phi i64 [ 0, %entry ], [ %j, %step ]",
        "  %p = phi i64 [ %panel, %entry ], [ %q, %step ]",
        "  %a = phi i64 [ %x, %entry ], [ %b, %step ]",
    ]
    for tile, address in ((4, "%a"), (5, "%a"), (6, "%p"), (7, "%p")):
        lines += [
            f"  %n{tile} = add i64 {address}, {tile % 2 * 1024}",
            f"  %t{tile} = inttoptr i64 %n{tile} to ptr",
            f"  call void @llvm.x86.tileloadd64(i8 {tile}, ptr %t{tile}, i64 64)",
        ]
    for total, tokens, rows in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
        lines.append(f"  call void @llvm.x86.tdpbf16ps(i8 {total}, i8 {tokens}, i8 {rows})")
    lines += [
        "  %j = add i64 %i, 1",
        "  %q = add i64 %p, 2048",
        "  %b = add i64 %a, %x_step",
        "  %more = icmp ult i64 %j, %steps",
        "  br i1 %more, label %step, label %done",
        "done:",
    ]
    for tile, at in ((0, 0), (1, 64), (2, 2048), (3, 2112)):
        lines += [
            f"  %o{tile} = add i64 %c, {at}",
            f"  %w{tile} = inttoptr i64 %o{tile} to ptr",
            f"  call void @llvm.x86.tilestored64(i8 {tile}, ptr %w{tile}, i64 128)",
        ]
    block = "\n".join([*lines, "  ret void"])
    arguments = "i64 %panel, i64 %x, i64 %x_step, i64 %c, i64 %steps"
    return (
        declare
        + _function("void", "tile_begin", "", begin)
        + _function("void", "tile_block", arguments, block)
        + _function("void", "tile_end", "", end)
    )


_AVX512 = _VNNI_512 + _LOOKUP_512 + _FMA + _HALF + _PAUSE_X86
SOURCES = {
    "amx": _AVX512 + _BF16 + _amx(),
    "avx512vnni": _AVX512 + _SOFT_BF16,
    "avxvnni": _VNNI_256 + _LOOKUP_256 + _FMA + _HALF + _SOFT_BF16 + _PAUSE_X86,
    "avx2": _AVX2 + _LOOKUP_256 + _FMA + _HALF + _SOFT_BF16 + _PAUSE_X86,
    "neon": _neon() + _LOOKUP_NEON + _FMA + _HALF + _SOFT_BF16 + _PAUSE_ARM,
    "generic": _generic() + _lookup_generic() + _MUL_ADD + _SOFT_HALF + _SOFT_BF16 + _PAUSE_NONE,
}
