"""Memory that cannot be had is an OutOfMemory with both numbers, and the model still works."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny

CONTEXT = 1_000_000
SCRIPT = """
import resource, sys
from pathlib import Path
import edgellama

MIB = 2**20
model = edgellama.load(sys.argv[1], threads=1, context=int(sys.argv[2]))
session = model.session()
session.forward([5, 6])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 64 * MIB
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
for ask in (model.session, lambda: session.forward([5] * 100_000, all_logits=True)):
    try:
        ask()
    except edgellama.OutOfMemory as error:
        print(error)
print(session.position, session.forward([7]).shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit on a process's memory")
def test_no_room_for_a_session_or_for_logits(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", tiny_config(context_length=CONTEXT), "F32")
    command = [sys.executable, "-c", SCRIPT, str(path), str(CONTEXT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert "no room for a session's keys and values: 244." in first and "MiB; available: " in first
    assert "no room for the logits: 109.9 MiB; available: " in second
    assert last == "2 (288,)"
