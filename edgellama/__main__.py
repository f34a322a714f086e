"""`edgellama` and `python -m edgellama`: the first moments of the command line.

Importing the rest takes a while, and there is nothing to clean up yet: a signal that comes
meanwhile ends the program at once, in silence. Knows nothing about what can be typed.
"""

import os
import signal
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # the exit status


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(INTERRUPTED)


def main() -> NoReturn:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not every platform has them all
        # What is ignored stays so: a shell wants it of what runs in the background.
        if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _leave)
    from edgellama.cli.main import main as begin

    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        begin()  # has handlers of its own for the others
    except KeyboardInterrupt:  # in its first or last moments
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
