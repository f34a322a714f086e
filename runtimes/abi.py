"""Where compiled kernels and Python find each other's numbers: the layout of their shared memory.

Everything is 8-byte words. An instruction says which kernel runs and on what; the state says what
is particular to this call. Knows nothing about how either is made or executed.
"""

WORD = 8
LANES = 16  # rows interleaved in a repacked matrix, lanes of a vector
BLOCK = 32  # columns of a quantized block; every row is padded to a multiple of it

# Instruction: the kernel's address, how many units of work it has, then its own arguments.
INSTRUCTION_WORDS = 24
FUNCTION = 0
UNITS = 1  # units of work, or units per token or per row of logits
TIMES = 2  # state word that multiplies UNITS
ARGS = 3

# State of one call.
STATE_WORDS = 32
ONE = 0  # always 1: the TIMES of an instruction whose units do not depend on the tokens
N_TOKENS = 1
N_ROWS = 2  # rows of logits asked for
START = 3  # position of the first token
TOKENS = 4  # address of int64 ids, (n_tokens,)
ROWS = 5  # address of int64 indices into the tokens, (n_rows,)
CACHE = 6  # address of the session's key/value cache
SPLITS = 7  # of the cache, up to the last token
ANGLES = 8  # address of float32 cos and sin, (context, rope pairs, 2)
CANCEL = 9  # address of the call's cancel cell, or 0
GIVE_UP_CORE = 10  # address of a C function that lets another thread run, or 0
SCRATCH = 11  # address of the threads' private memory
SCRATCH_BYTES = 12  # of one thread
THREADS = 13
PARALLEL = 15  # splits that are units of their own: 1, or SPLITS where there is one token
ATTENTION_UNITS = 16  # N_TOKENS / ATTENTION_TOKENS, rounded up, * PARALLEL
CLOSING = 17  # address of the session's, set when it is to be closed, or 0
EPOCH = 14  # number of this call: guards against a thread that is late from an earlier one

# Per instruction, in cache lines of their own: (epoch << 32 | next unit) and units finished.
COUNTER_BYTES = 128
DONE = 64

# A token's activations, packed for a matrix product into records that lie [columns][token].
#
# For integer products 32 columns each, as two halves of 16 with a scale of their own (half the
# error of one scale for 32). An activation is scale * (high + low / 128), two signed bytes; plain
# products take the high ones alone, fine products both. 32 high bytes, 32 low bytes; then f32: both
# scales; sums of scale * high, of each half; sums of scale * (high + low / 128), of each half; the
# former and the latter of all 32.
#
# For float products 8 columns each. For tiles 32 columns each, rounded to bfloat16, with room for a
# multiple of TILE tokens.
Q8_RECORD = 96
Q8_LOW, Q8_SCALES, Q8_SUMS, Q8_FINE_SUMS = 32, 64, 72, 80
Q8_SUM, Q8_FINE_SUM = 88, 92
F32_RECORD, F32_COLUMNS = 32, 8
BF16_RECORD = 64

KV_F32, KV_F16, KV_Q8_0 = 0, 1, 2  # how keys and values are kept
KV_TYPES = {"f32": KV_F32, "f16": KV_F16, "q8_0": KV_Q8_0}
ATTENTION_BLOCK = 64  # cache positions that lie together, and that a softmax step takes at once
ATTENTION_SPLIT = 1024  # cache positions summed by themselves
ATTENTION_TOKENS = 4  # that share one reading of keys and values
QUERIES = 4  # that attention takes at once
ROW_BYTES = 4 * WORD  # of what attention notes of a query
TILE = 32  # tokens that share one reading of 16 weight rows
PANEL = 2048  # bytes of 32 columns of 32 weight rows as bfloat16: two tiles


def key_bytes(kind: int, head_dim: int) -> int:
    """Of 16 positions of one head's keys: columns of 16, for Q8_0 with 16 f16 a 32 columns."""
    if kind == KV_Q8_0:
        return (head_dim + BLOCK - 1) // BLOCK * (BLOCK * LANES + 2 * LANES)
    return head_dim * LANES * (4 - 2 * kind)


def value_bytes(kind: int, head_dim: int) -> int:
    """Of one position of one head's values, for Q8_0 with an f16 a 32 columns."""
    if kind == KV_Q8_0:
        return (head_dim + BLOCK - 1) // BLOCK * (BLOCK + 2)
    return (head_dim + LANES - 1) // LANES * LANES * (4 - 2 * kind)
