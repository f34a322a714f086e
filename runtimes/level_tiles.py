"""Products of bfloat16 matrices in tile registers, for level `amx`; in LLVM's own language.

All tiles are 16 rows of 64 bytes. `tile_block` computes 32 tokens by 32 rows of a matrix: totals
in tiles 0 to 3, tokens in 4 and 5, rows in 6 and 7. Knows nothing about how matrices are laid out
in panels: see `kernels_tiles.py`. Source: Intel's instruction set reference, AMX-TILE, AMX-BF16.
"""

from edgellama.runtimes.level_text import function

# Palette 1, then each tile's width in bytes (16 bits wide) and its height in rows.
_CONFIG = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
_CELLS = ", ".join(f"i8 {n}" for n in _CONFIG)
_DECLARED = f"""@edgellama.tile_config = internal constant [64 x i8] [{_CELLS}], align 64
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
"""
_BEGIN = "  call void @llvm.x86.ldtilecfg(ptr @edgellama.tile_config)\n  ret void"
_END = "  call void @llvm.x86.tilerelease()\n  ret void"

_BLOCK_ARGS = "i64 %panel, i64 %x, i64 %x_step, i64 %c, i64 %steps"
_LOADED = ((4, "%a"), (5, "%a"), (6, "%p"), (7, "%p"))
_PRODUCTS = ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))  # total, tokens, rows
_STORED = ((0, 0), (1, 64), (2, 2048), (3, 2112))  # total, bytes from the start of %c


def _block() -> str:
    lines = ["entry:"]
    lines += [f"  call void @llvm.x86.tilezero(i8 {total})" for total, *_ in _PRODUCTS]
    lines += [
        "  br label %step",
        "step:",
        "  %i = phi i64 [ 0, %entry ], [ %j, %step ]",
        "  %p = phi i64 [ %panel, %entry ], [ %q, %step ]",
        "  %a = phi i64 [ %x, %entry ], [ %b, %step ]",
    ]
    for tile, address in _LOADED:
        lines += [
            f"  %n{tile} = add i64 {address}, {tile % 2 * 1024}",
            f"  %t{tile} = inttoptr i64 %n{tile} to ptr",
            f"  call void @llvm.x86.tileloadd64(i8 {tile}, ptr %t{tile}, i64 64)",
        ]
    for total, tokens, rows in _PRODUCTS:
        lines.append(f"  call void @llvm.x86.tdpbf16ps(i8 {total}, i8 {tokens}, i8 {rows})")
    lines += [
        "  %j = add i64 %i, 1",
        "  %q = add i64 %p, 2048",
        "  %b = add i64 %a, %x_step",
        "  %more = icmp ult i64 %j, %steps",
        "  br i1 %more, label %step, label %done",
        "done:",
    ]
    for total, at in _STORED:
        lines += [
            f"  %o{total} = add i64 %c, {at}",
            f"  %w{total} = inttoptr i64 %o{total} to ptr",
            f"  call void @llvm.x86.tilestored64(i8 {total}, ptr %w{total}, i64 128)",
        ]
    return "\n".join([*lines, "  ret void"])


TILES = (
    _DECLARED
    + function("void", "tile_begin", "", _BEGIN)
    + function("void", "tile_block", _BLOCK_ARGS, _block())
    + function("void", "tile_end", "", _END)
)
