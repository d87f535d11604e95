"""`python -m model.preflight`: see `model.preflight.command_line`."""

from __future__ import annotations

import signal
import sys

_BY_SIGNAL = 128  # a shell's exit status of a program that a signal ended, plus the signal's number


def main() -> int:
    """The exit status of the command. A signal unwinds it, so that its child ends and its files are removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_BY_SIGNAL + number))
    try:
        from model.preflight.command_line import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:
        return _BY_SIGNAL + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
