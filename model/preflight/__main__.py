"""`python -m model.preflight`: see `model.preflight.command_line`."""

from __future__ import annotations

import sys

from model.preflight.command_line import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
