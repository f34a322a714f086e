"""How threads share a program: the kernel that runs all the others.

Every thread walks the whole program. For each instruction it claims units of work until none is
left, does them, and waits until all are done. There is no barrier to arrive at: a thread that
comes late, or not at all, costs speed and nothing else, and one that is descheduled holds the
others up by at most the units it has claimed.

Knows nothing about what an instruction computes.
"""

from typing import Any

from numba import int64

from edgellama.runtimes import abi, simd
from edgellama.runtimes.compiler import inline

WORD = abi.WORD
UNIT_MASK = 0xFFFFFFFF
SPINS = 4000  # waits of a few ns each before the core is given up
SHARES = 4  # pieces that each thread's part of an instruction is cut into


@inline
def units_of(instruction: int, state: int) -> Any:
    units = simd.load_i64(instruction + abi.UNITS * WORD)
    return units * simd.load_i64(state + simd.load_i64(instruction + abi.TIMES * WORD) * WORD)


@inline
def reset(counters: int, n_instructions: int, epoch: int) -> None:
    """Open every instruction for this epoch, and close it to threads of an earlier one."""
    for i in range(n_instructions):
        simd.atomic_store(counters + i * abi.COUNTER_BYTES + abi.DONE, epoch << 32)
    for i in range(n_instructions):
        simd.atomic_store(counters + i * abi.COUNTER_BYTES, epoch << 32)


@inline
def work(instruction: int, claim: int, units: int, epoch: int, state: int, thread: int) -> bool:
    """Claim and do units until none is left; False if the epoch is over."""
    grain = max(int64(1), units // (SHARES * simd.load_i64(state + abi.THREADS * WORD)))
    function = simd.load_i64(instruction + abi.FUNCTION * WORD)
    while True:
        seen = simd.atomic_load(claim)
        if seen >> 32 != epoch:
            return False
        first = seen & UNIT_MASK
        if first >= units:
            return True
        last = min(first + grain, units)
        if simd.atomic_claim(claim, seen, (epoch << 32) | last) != 0:
            simd.call_kernel(function, instruction, state, first, last, thread)
            simd.atomic_add(claim + abi.DONE, last - first)


@inline
def wait(claim: int, units: int, epoch: int, state: int) -> bool:
    """Until all units of an instruction are done; False if the epoch is over."""
    spins = 0
    while True:
        done = simd.atomic_load(claim + abi.DONE)
        if done >> 32 != epoch:
            return False
        if done & UNIT_MASK >= units:
            return True
        spins += 1
        simd.pause()
        if spins > SPINS:
            give_up = simd.load_i64(state + abi.GIVE_UP_CORE * WORD)
            if give_up != 0:
                simd.call_plain(give_up)


@inline
def close(counters: int, first: int, n_instructions: int, epoch: int) -> None:
    """Stop the epoch from instruction `first` on: no new claims, and none left unfinished."""
    for i in range(first, n_instructions):
        claim = counters + i * abi.COUNTER_BYTES
        claimed = simd.atomic_exchange(claim, int64(-1)) & UNIT_MASK
        while simd.atomic_load(claim + abi.DONE) & UNIT_MASK < claimed:
            simd.pause()


def lead(program: int, counters: int, n_instructions: int, state: int) -> None:
    """Run the program as thread 0, which opens and ends the epoch.

    The state's EPOCH must be new. If the cancel cell is set on the way, the rest is left undone.
    """
    epoch = simd.load_i64(state + abi.EPOCH * WORD)
    cancel = simd.load_i64(state + abi.CANCEL * WORD)
    reset(counters, n_instructions, epoch)
    for i in range(n_instructions):
        instruction = program + i * abi.INSTRUCTION_WORDS * WORD
        claim = counters + i * abi.COUNTER_BYTES
        if cancel != 0 and simd.atomic_load(cancel) != 0:
            close(counters, i, n_instructions, epoch)
            return
        units = units_of(instruction, state)
        work(instruction, claim, units, epoch, state, int64(0))
        wait(claim, units, epoch, state)


def follow(
    program: int, counters: int, n_instructions: int, state: int, epoch: int, thread: int
) -> None:
    """Help with one epoch as another thread; return when it is over."""
    for i in range(n_instructions):
        instruction = program + i * abi.INSTRUCTION_WORDS * WORD
        claim = counters + i * abi.COUNTER_BYTES
        units = units_of(instruction, state)
        if not work(instruction, claim, units, epoch, state, thread):
            return
        if not wait(claim, units, epoch, state):
            return
