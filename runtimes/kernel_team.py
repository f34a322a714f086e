"""How threads share a program: the kernel that runs all the others.

Every thread walks the whole program. For each instruction it claims units of work until none is
left, does them, and waits until all are done. There is no barrier to arrive at: a thread that
comes late, or not at all, costs speed and nothing else, and one that is descheduled holds the
others up by at most the units it has claimed.

Knows nothing about what an instruction computes.
"""

from typing import Any

from numba import int64

from edgellama.runtimes import abi, memory
from edgellama.runtimes.compiler import inline

WORD = abi.WORD
UNIT_MASK = 0xFFFFFFFF
SPINS = 4000  # waits of a few ns each before the core is given up
SHARES = 4  # pieces that each thread's part of an instruction is cut into


@inline
def units_of(instruction: int, state: int) -> Any:
    units = memory.load_i64(instruction + abi.UNITS * WORD)
    return units * memory.load_i64(state + memory.load_i64(instruction + abi.TIMES * WORD) * WORD)


@inline
def is_set(state: int, word: int) -> Any:
    """Whether there is such a cell and it is set."""
    cell = memory.load_i64(state + word * WORD)
    return cell != 0 and memory.atomic_load(cell) != 0


@inline
def cancelled(state: int) -> Any:
    return is_set(state, abi.CANCEL) or is_set(state, abi.CLOSING)


@inline
def work(instruction: int, claim: int, units: int, epoch: int, state: int, thread: int) -> bool:
    """Claim and do units until none is left; False if the epoch is over or cancelled."""
    grain = max(int64(1), units // (SHARES * memory.load_i64(state + abi.THREADS * WORD)))
    function = memory.load_i64(instruction + abi.FUNCTION * WORD)
    while True:
        seen = memory.atomic_load(claim)
        if seen >> 32 != epoch or cancelled(state):
            return False
        first = seen & UNIT_MASK
        if first >= units:
            return True
        last = min(first + grain, units)
        if memory.atomic_claim(claim, seen, (epoch << 32) | last) != 0:
            memory.call_kernel(function, instruction, state, first, last, thread)
            memory.atomic_add(claim + abi.DONE, last - first)


@inline
def wait(claim: int, units: int, epoch: int, state: int) -> bool:
    """Until all units of an instruction are done; False if the epoch is over."""
    spins = 0
    while True:
        done = memory.atomic_load(claim + abi.DONE)
        if done >> 32 != epoch:
            return False
        if done & UNIT_MASK >= units:
            return True
        spins += 1
        memory.pause()
        if spins > SPINS:
            give_up = memory.load_i64(state + abi.GIVE_UP_CORE * WORD)
            if give_up != 0:
                memory.call_plain(give_up)


@inline
def close(counters: int, first: int, n_instructions: int, epoch: int) -> None:
    """Stop the epoch from instruction `first` on: no new claims, and none left unfinished.

    Once closed, or never opened in this epoch, an instruction stays as it is.
    """
    for i in range(first, n_instructions):
        claim = counters + i * abi.COUNTER_BYTES
        before = memory.atomic_exchange(claim, int64(-1))
        claimed = before & UNIT_MASK if before >> 32 == epoch else int64(0)
        while memory.atomic_load(claim + abi.DONE) & UNIT_MASK < claimed:
            memory.pause()


def lead(program: int, counters: int, n_instructions: int, state: int) -> None:
    """Run the program, or a slice of it, as thread 0, which ends the epoch that `team.py` opened.

    If the cancel cell is set on the way, the rest is left undone and closed.
    """
    epoch = memory.load_i64(state + abi.EPOCH * WORD)
    for i in range(n_instructions):
        instruction = program + i * abi.INSTRUCTION_WORDS * WORD
        claim = counters + i * abi.COUNTER_BYTES
        units = units_of(instruction, state)
        if not work(instruction, claim, units, epoch, state, int64(0)):
            close(counters, i, n_instructions, epoch)
            return
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
