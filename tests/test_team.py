"""Threads that share a program: right results whatever they do to each other."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checked import HERE, Array, compiled
from tiny import write_tiny

from edgellama.control import CancelToken
from edgellama.machine import available_memory, usable_cores
from edgellama.runtimes import abi, kernel_cache, levels, memory
from edgellama.runtimes.team import Team, give_up_core

LEVEL = HERE[0]
HANG = 60.0  # seconds; what is bounded by it takes milliseconds


def _mix(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """target[unit] = 3 * source[(unit + shift) % n] + unit: wrong if anything before is undone."""
    source, target = memory.load_i64(instruction + 24), memory.load_i64(instruction + 32)
    n, shift = memory.load_i64(instruction + 40), memory.load_i64(instruction + 48)
    for unit in range(first, last):
        value = memory.load_i64(source + (unit + shift) % n * 8)
        before = memory.atomic_exchange(target + unit * 8, 3 * value + unit)
        if before != 0:  # a unit done twice
            memory.atomic_exchange(target + unit * 8, -1)


def _spin(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Keep a core busy for some microseconds a unit."""
    cell, turns = memory.load_i64(instruction + 24), memory.load_i64(instruction + 32)
    for _ in range((last - first) * turns):
        memory.atomic_add(cell, 1)


def address(function: Callable[..., None]) -> int:
    kernel: Any = compiled(LEVEL, function.__name__, function)
    return ctypes.cast(kernel, ctypes.c_void_p).value or 0


def team(threads: int, nap: Callable[[], float] | None = None) -> Team:
    """A team of real threads; the first helper sleeps `nap()` seconds before each program."""
    found = kernel_cache.addresses(["lead", "follow"], levels.LEVELS[LEVEL])
    lead, follow = (kernel_cache.function(found[k], n) for k, n in (("lead", 4), ("follow", 6)))

    def late(*arguments: int) -> None:
        if nap and arguments[-1] == 1:
            time.sleep(nap())
        follow(*arguments)

    return Team(threads, lead, late if nap else follow)


def counters_for(program: Array) -> Array:
    room = np.zeros(len(program) * abi.COUNTER_BYTES + 64, np.uint8)
    skip = -room.ctypes.data % 64
    return room[skip : skip + len(program) * abi.COUNTER_BYTES]


def state_for(cancel: CancelToken | None = None, tokens: int = 1) -> Array:
    state = np.zeros(abi.STATE_WORDS, np.int64)
    state[abi.ONE], state[abi.N_TOKENS] = 1, tokens
    state[abi.CANCEL] = cancel.address if cancel else 0
    state[abi.GIVE_UP_CORE] = give_up_core()
    return state


class Mixing:
    """A program whose every instruction depends on all of the one before."""

    def __init__(self, sizes: list[int], tokens: int = 1) -> None:
        self.sizes, self.tokens = sizes, tokens
        self.cells = [np.zeros(n * tokens, np.int64) for n in (sizes[0], *sizes)]
        self.cells[0][:] = np.arange(len(self.cells[0]))
        self.program = np.zeros((len(sizes), abi.INSTRUCTION_WORDS), np.int64)
        for i, words in enumerate(self.program):
            source, target = self.cells[i], self.cells[i + 1]
            words[:3] = address(_mix), sizes[i], abi.N_TOKENS if tokens > 1 else abi.ONE
            words[abi.ARGS : abi.ARGS + 4] = source.ctypes.data, target.ctypes.data, len(source), i
        self.counters = counters_for(self.program)

    def run(self, team: Team, cancel: CancelToken | None = None) -> None:
        for cells in self.cells[1:]:
            cells[:] = 0
        team.run(self.program, self.counters, state_for(cancel, self.tokens))

    def right(self) -> bool:
        value = self.cells[0]
        for i, cells in enumerate(self.cells[1:]):
            unit = np.arange(len(cells))
            value = 3 * value[(unit + i) % len(value)] + unit
            if not np.array_equal(cells, value):
                return False
        return True


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_unit_is_done_once_and_in_order(threads: int) -> None:
    program = Mixing([1, 2, 100, 3, 1000, 1, 17])
    helpers = team(threads)
    for _ in range(200):
        program.run(helpers)
        assert program.right()
    helpers.close()


def test_units_of_many_tokens() -> None:
    program, helpers = Mixing([5, 3, 40], tokens=7), team(3)
    program.run(helpers)
    assert program.right() and len(program.cells[-1]) == 280
    helpers.close()


def test_many_short_programs() -> None:
    """A second of programs so short that helpers arrive during, between and after."""
    rng = np.random.default_rng(1)
    helpers = team(5)
    programs = [Mixing([int(n) for n in rng.integers(1, 30, 6)]) for _ in range(20)]
    stop = time.monotonic() + 1
    runs = 0
    while time.monotonic() < stop:
        program = programs[runs % len(programs)]
        program.run(helpers)
        assert program.right(), runs
        runs += 1
    assert runs > 100
    helpers.close()


def test_late_helpers_do_no_harm() -> None:
    """One helper sleeps before it looks: its program may be over, and another one under way."""
    rng = np.random.default_rng(2)
    helpers = team(3, lambda: float(rng.choice([0, 0, 1e-5, 1e-4, 1e-3, 5e-3])))
    for i in range(300):
        program = Mixing([20, 1, 50, 7])  # a new one each time: memory is freed and used again
        program.run(helpers)
        assert program.right(), i
    helpers.close()


def test_a_set_token_leaves_everything_undone() -> None:
    cancel = CancelToken()
    cancel.cancel()
    program, helpers = Mixing([20, 30]), team(3)
    program.run(helpers, cancel)
    assert not np.any(program.cells[1])
    program.run(helpers)
    assert program.right()
    helpers.close()


def test_cancelling_a_run_that_is_under_way() -> None:
    cell = np.zeros(1, np.int64)
    long = np.zeros((20_000, abi.INSTRUCTION_WORDS), np.int64)
    long[:, :5] = address(_spin), 64, abi.ONE, cell.ctypes.data, 1000
    counters, after, helpers = counters_for(long), Mixing([20, 1, 50, 7]), team(3)
    for wait in (0.0, 0.001, 0.02, 0.05):
        cancel = CancelToken()
        timer = threading.Timer(wait, cancel.cancel)
        timer.start()
        began, cell[0] = time.monotonic(), 0
        helpers.run(long, counters, state_for(cancel))
        assert time.monotonic() - began < 5.0  # it was cancelled, or it would take far longer
        assert cell[0] < 20_000 * 64 * 1000
        stopped_at = cell[0]
        after.run(helpers)
        assert after.right()
        assert cell[0] == stopped_at  # nobody works on
        timer.join()
    helpers.close()


def interrupted_lead(helpers: Team, at: int) -> None:
    """Let the `at`th slice end in an exception, as a signal's between two of them does."""
    lead, calls = helpers._lead, iter(range(at, -1, -1))

    def slices(*arguments: int) -> None:
        lead(*arguments)
        if next(calls, 1) == 0:
            raise KeyboardInterrupt

    helpers._lead = slices


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_exception_between_slices_leaves_nobody_at_work(at: int) -> None:
    cell = np.zeros(1, np.int64)
    long = np.zeros((600, abi.INSTRUCTION_WORDS), np.int64)
    long[:, :5] = address(_spin), 64, abi.ONE, cell.ctypes.data, 100
    counters, after = counters_for(long), Mixing([20, 1, 50, 7])
    for threads in (1, 3):
        helpers = team(threads)
        interrupted_lead(helpers, at)
        cell[0] = 0
        with pytest.raises(KeyboardInterrupt):
            helpers.run(long, counters, state_for())
        stopped_at = cell[0]
        assert stopped_at < 600 * 64 * 100
        after.run(helpers)
        assert after.right() and cell[0] == stopped_at
        helpers.run(long, counters, state_for())
        assert cell[0] == stopped_at + 600 * 64 * 100
        helpers.close()


def test_an_exception_before_the_start_or_after_a_cancellation() -> None:
    """Neither what was never opened nor what is closed already is waited for."""
    program, helpers, token = Mixing([20, 30, 4]), team(3), CancelToken()
    program.run(helpers)
    for opened in (False, True):
        state = state_for()
        helpers._under_way = program.program, program.counters, state
        if opened:  # as far as the first half of opening
            state[abi.EPOCH] = helpers._epoch + 1
            words = program.counters.view(np.int64).reshape(-1, abi.COUNTER_BYTES // 8)
            words[:, abi.DONE // 8] = state[abi.EPOCH] << 32
        helpers.settle()
        program.run(helpers)
        assert program.right()
    token.cancel()
    interrupted_lead(helpers, 0)
    with pytest.raises(KeyboardInterrupt):
        program.run(helpers, token)
    program.run(helpers)
    assert program.right()
    helpers.close()


def test_long_programs_come_back_to_the_interpreter() -> None:
    cell, calls = np.zeros(1, np.int64), []
    long = np.zeros((400, abi.INSTRUCTION_WORDS), np.int64)
    long[:, :5] = address(_spin), 64, abi.ONE, cell.ctypes.data, 1000
    counters, helpers = counters_for(long), team(2)
    lead = helpers._lead
    helpers._lead = lambda *arguments: calls.append(arguments[2]) or lead(*arguments)
    for _ in range(2):
        calls.clear()
        helpers.run(long, counters, state_for())
        assert sum(calls) == 400 and len(calls) > 1
    assert cell[0] == 2 * 400 * 64 * 1000
    helpers.close()


def test_closing_twice_and_running_alone_afterwards() -> None:
    helpers, before = team(4), threading.active_count()
    helpers.close()
    assert threading.active_count() == before - 3
    helpers.close()
    program = Mixing([10, 20])
    program.run(helpers)
    assert program.right()


def test_a_team_sleeps_when_there_is_nothing_to_do() -> None:
    helpers = team(4)
    Mixing([100, 100]).run(helpers)
    time.sleep(0.05)
    began = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - began < 0.1
    helpers.close()


# --- the machine ---------------------------------------------------------------------------------


def test_usable_cores_and_memory() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    memory = available_memory()
    assert memory is None or 0 <= memory < 2**50


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_usable_cores_are_those_of_the_affinity() -> None:
    code = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from edgellama.machine import usable_cores
print(usable_cores())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


FORK = """
import asyncio, os, sys
import numpy as np
import edgellama
model = edgellama.load(sys.argv[1], threads=3)
session = model.session()
before = session.forward([1, 2, 3])

def refused(call):
    try:
        call()
    except edgellama.ForkedProcess:
        return True
    return False

hi = [{"role": "user", "content": "hi"}]

async def answer():
    async for _ in model.agenerate("a"):
        pass

child = os.fork()
if child == 0:
    calls = [
        model.session,
        lambda: session.forward([4]),
        lambda: session.truncate(0),
        lambda: model.generate("a"),
        lambda: model.chat(hi, template="alpaca"),
        lambda: asyncio.run(answer()),
    ]
    right = all(map(refused, calls))
    session.close()
    model.close()
    with edgellama.load(sys.argv[1], threads=3) as own:  # which the child may have
        right = right and np.array_equal(own.session().forward([1, 2, 3]), before)
    sys.exit(0 if right else 9)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
session.truncate(0)
assert np.array_equal(session.forward([1, 2, 3]), before)
model.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forking is POSIX's")
def test_a_forked_child_is_refused_and_does_not_hang(tmp_path: Any) -> None:
    path = write_tiny(tmp_path / "tiny.gguf")
    command = [sys.executable, "-c", FORK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


SIGNALS = """
import os, signal, sys, threading, time
import numpy as np
import edgellama
with edgellama.load(sys.argv[1], threads=3) as model:
    session, ids = model.session(), list(range(1, 100))
    before = session.forward(ids)
    session.truncate(5)
    for i in range(20):
        timer = threading.Timer(0.003 * i, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:  # each call from the same position, whatever the one before came to
                session.truncate(5)
                session.forward(ids[5:])
        except KeyboardInterrupt:
            pass
        timer.join()
        assert session.position in (5, 99), session.position
        session.truncate(5)
        assert np.array_equal(session.forward(ids[5:]), before)
        session.truncate(5)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a process are POSIX's")
def test_a_signal_in_the_caller_leaves_the_model_usable(tmp_path: Any) -> None:
    path = write_tiny(tmp_path / "tiny.gguf")
    command = [sys.executable, "-c", SIGNALS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
