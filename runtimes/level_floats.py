"""Conversions of sixteen floats, and `fma`, by what an instruction set has for them.

Knows nothing about levels: `level_sources.py` puts their functions together.
"""

from edgellama.runtimes.level_text import V, constant, function, mask

# --- half precision -----------------------------------------------------------------------------

HALF = function(
    "<16 x float>",
    "from_f16",
    "<16 x i16> %x",
    "  %h = bitcast <16 x i16> %x to <16 x half>\n"
    "  %f = fpext <16 x half> %h to <16 x float>\n"
    "  ret <16 x float> %f",
) + function(
    "<16 x i16>",
    "to_f16",
    "<16 x float> %x",
    "  %h = fptrunc <16 x float> %x to <16 x half>\n"
    "  %i = bitcast <16 x half> %h to <16 x i16>\n"
    "  ret <16 x i16> %i",
)

# Half precision in integer arithmetic: a baseline CPU has no conversion, and the compiler would
# call a library function that a Python process does not hold.
SOFT_HALF = function(
    "<16 x float>",
    "from_f16",
    "<16 x i16> %x",
    f"""  %w = zext <16 x i16> %x to {V}
  %m = and {V} %w, {constant("i32", 0x7FFF)}
  %sign0 = and {V} %w, {constant("i32", 0x8000)}
  %sign = shl {V} %sign0, {constant("i32", 16)}
  %up = shl {V} %m, {constant("i32", 13)}
  %norm = add {V} %up, {constant("i32", 112 << 23)}
  %isbig = icmp uge {V} %m, {constant("i32", 0x7C00)}
  %big = add {V} %norm, {constant("i32", 112 << 23)}
  %n1 = select <16 x i1> %isbig, {V} %big, {V} %norm
  %issub = icmp ult {V} %m, {constant("i32", 0x400)}
  %mf = uitofp {V} %m to <16 x float>
  %sf = fmul <16 x float> %mf, splat (float 0x3E70000000000000)
  %si = bitcast <16 x float> %sf to {V}
  %n2 = select <16 x i1> %issub, {V} %si, {V} %n1
  %r = or {V} %n2, %sign
  %f = bitcast {V} %r to <16 x float>
  ret <16 x float> %f""",
) + function(
    "<16 x i16>",
    "to_f16",
    "<16 x float> %x",
    f"""  %b = bitcast <16 x float> %x to {V}
  %a = and {V} %b, {constant("i32", 0x7FFFFFFF)}
  %sign = lshr {V} %b, {constant("i32", 16)}
  %s = and {V} %sign, {constant("i32", 0x8000)}
  %odd0 = lshr {V} %a, {constant("i32", 13)}
  %odd = and {V} %odd0, {constant("i32", 1)}
  %rebias = sub {V} %a, {constant("i32", 112 << 23)}
  %half = add {V} %rebias, {constant("i32", 0xFFF)}
  %round = add {V} %half, %odd
  %norm = lshr {V} %round, {constant("i32", 13)}
  %af = bitcast {V} %a to <16 x float>
  %magic = fadd <16 x float> %af, splat (float 5.000000e-01)
  %mi = bitcast <16 x float> %magic to {V}
  %sub = sub {V} %mi, {constant("i32", 0x3F000000)}
  %issub = icmp ult {V} %a, {constant("i32", 113 << 23)}
  %n1 = select <16 x i1> %issub, {V} %sub, {V} %norm
  %isbig = icmp uge {V} %a, {constant("i32", 0x477FF000)}
  %n2 = select <16 x i1> %isbig, {V} {constant("i32", 0x7C00)}, {V} %n1
  %isnan = icmp ugt {V} %a, {constant("i32", 0x7F800000)}
  %n3 = select <16 x i1> %isnan, {V} {constant("i32", 0x7E00)}, {V} %n2
  %r = or {V} %n3, %s
  %h = trunc {V} %r to <16 x i16>
  ret <16 x i16> %h""",
)

# --- bfloat16 -----------------------------------------------------------------------------------

# bfloat16 in integer arithmetic: rounded to nearest even, and a NaN stays one.
_F32X32, _I32X32 = "<32 x float>", "<32 x i32>"
_JOIN = f"  %v = shufflevector <16 x float> %x, <16 x float> %y, {mask(range(32))}\n"
_BF16_ARGS = "<16 x float> %x, <16 x float> %y"
SOFT_BF16 = function(
    "<32 x i16>",
    "to_bf16",
    _BF16_ARGS,
    _JOIN
    + f"""  %i = bitcast {_F32X32} %v to {_I32X32}
  %s = lshr {_I32X32} %i, {constant("i32", 16)}
  %odd = and {_I32X32} %s, {constant("i32", 1)}
  %half = add {_I32X32} %odd, {constant("i32", 0x7FFF)}
  %sum = add {_I32X32} %i, %half
  %up = lshr {_I32X32} %sum, {constant("i32", 16)}
  %isnan = fcmp uno {_F32X32} %v, %v
  %r = select <32 x i1> %isnan, {_I32X32} {constant("i32", 0x7FC0)}, {_I32X32} %up
  %t = trunc {_I32X32} %r to <32 x i16>
  ret <32 x i16> %t""",
)
BF16 = function(
    "<32 x i16>",
    "to_bf16",
    _BF16_ARGS,
    _JOIN
    + f"""  %h = fptrunc {_F32X32} %v to <32 x bfloat>
  %t = bitcast <32 x bfloat> %h to <32 x i16>
  ret <32 x i16> %t""",
)

# --- multiplying and adding ---------------------------------------------------------------------

FMA = (
    "declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)\n"
    + function(
        "<16 x float>",
        "fma",
        "<16 x float> %x, <16 x float> %y, <16 x float> %z",
        "  %r = call <16 x float> @llvm.fma.v16f32"
        "(<16 x float> %x, <16 x float> %y, <16 x float> %z)\n"
        "  ret <16 x float> %r",
    )
)
MUL_ADD = function(
    "<16 x float>",
    "fma",
    "<16 x float> %x, <16 x float> %y, <16 x float> %z",
    "  %m = fmul <16 x float> %x, %y\n  %r = fadd <16 x float> %m, %z\n  ret <16 x float> %r",
)
