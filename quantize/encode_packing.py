"""How K types lay out a block: where kernels keep its parts, and how codes and scales are packed.

The inverse of `packed.py`, sixteen blocks at once. A word is 4 bytes of each block. Knows nothing
about how scales and codes are found.
"""

from typing import Any

from numba import int32

from edgellama.quantize.encode_lanes import load_int, put_words, store_int
from edgellama.quantize.encode_search import V
from edgellama.quantize.encode_simple import bytes_of
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.simd import shift_left, shift_right, splat_i32

BLOCK = 256
# The room: values (codes later), a sub-block's weights and its search's room, then of each
# sub-block: scale, minimum, inverse scale and minimum of its codes (or zero mask), sum of weights,
# and small integers; bytes of codes.
WEIGHTS = BLOCK * V
AUXILIARY = WEIGHTS + 32 * V
SCALES = AUXILIARY + 32 * V
MINIMA = SCALES + 16 * V
CODE_SCALES = MINIMA + 16 * V
CODE_LEASTS = CODE_SCALES + 16 * V
SUMS = CODE_LEASTS + 16 * V
SMALL = SUMS + 16 * V
SMALL_MINIMA = SMALL + 16 * V
BYTES = SMALL_MINIMA + 16 * V
ROOM = BYTES + BLOCK * 16  # what `encode.ROOM` must hold


@inline
def word(value: int) -> Any:
    return splat_i32(int32(value))


@inline
def pack_codes(room: int) -> None:
    """256 codes to 64 words of four, in place."""
    for i in range(64):
        store_int(room + i * V, bytes_of(room + i * 4 * V))


@inline
def field(room: int, i: int, start: int, mask: int, place: int) -> Any:
    """Bits of the four codes of word i, moved to `place` in their bytes."""
    return shift_left(shift_right(load_int(room + i * V), start) & word(mask), place)


@inline
def put_pairs(room: int, target: int, step: int, start: int) -> None:
    """64 bytes of two bits of the codes: byte l holds codes l, l + 32, l + 64, l + 96."""
    three = 0x03030303
    for i in range(16):
        a = i // 8 * 32 + i % 8
        low = field(room, a, start, three, 0) | field(room, a + 8, start, three, 2)
        high = field(room, a + 16, start, three, 4) | field(room, a + 24, start, three, 6)
        put_words(target + i * 4, step, low | high)


@inline
def put_bits(room: int, target: int, step: int, start: int) -> None:
    """32 bytes of one bit of the codes: byte l holds codes l, l + 32, …, l + 224."""
    for i in range(8):
        packed = word(0)
        for j in range(8):
            packed = packed | shift_left(field(room, j * 8 + i, start, 0x01010101, 0), j)
        put_words(target + i * 4, step, packed)


@inline
def put_nibbles(room: int, target: int, step: int, apart: int) -> None:
    """128 bytes of four bits of the codes: byte l holds codes l and l + apart, run by run."""
    four, run = 0x0F0F0F0F, apart // 4
    for i in range(32):
        a = i // run * run * 2 + i % run
        both = field(room, a, 0, four, 0) | field(room, a + run, 0, four, 4)
        put_words(target + i * 4, step, both)


@inline
def _scales_and_minima(small: int, minima: int, w: int) -> Any:
    """Word w of the 12 bytes of eight scales and eight minima of 6 bits."""
    packed = word(0)
    for i in range(4):
        scale, least = load_int(small + i * V), load_int(minima + i * V)
        last, last_least = load_int(small + (i + 4) * V), load_int(minima + (i + 4) * V)
        if w == 0:
            byte = scale | shift_left(shift_right(last, 4), 6)
        elif w == 1:
            byte = least | shift_left(shift_right(last_least, 4), 6)
        else:
            byte = (last & word(15)) | shift_left(last_least & word(15), 4)
        packed = packed | shift_left(byte & word(255), i * 8)
    return packed


@inline
def put_scales_and_minima(room: int, target: int, step: int) -> None:
    """Store them, and keep what a reader will find in these bytes."""
    for w in range(3):
        packed = _scales_and_minima(room + SMALL, room + SMALL_MINIMA, w)
        put_words(target + w * 4, step, packed)
    for i in range(4):  # a scale beyond 6 bits, which only odd importance gives, spills over
        for at in (SMALL, SMALL_MINIMA):
            first, last = load_int(room + at + i * V), load_int(room + at + (i + 4) * V)
            byte = first | shift_left(shift_right(last, 4), 6)
            store_int(room + at + i * V, byte & word(63))
            top = shift_left(shift_right(byte & word(255), 6), 4)
            store_int(room + at + (i + 4) * V, (last & word(15)) | top)


@inline
def put_small_scales(room: int, target: int, step: int) -> None:
    """Q3_K: 16 scales of 6 bits; 8 bytes hold the low halves, 4 bytes the rest."""
    for half in range(2):
        packed = word(0)
        for i in range(4):
            low = load_int(room + SMALL + (half * 4 + i) * V) & word(15)
            high = load_int(room + SMALL + (half * 4 + i + 8) * V) & word(15)
            packed = packed | shift_left(low | shift_left(high, 4), i * 8)
        put_words(target + half * 4, step, packed)
    packed = word(0)
    for i in range(16):
        top = shift_right(load_int(room + SMALL + i * V), 4)
        packed = packed | shift_left(top, i % 4 * 8 + i // 4 * 2)
    put_words(target + 8, step, packed)
