"""Prefect settings of a local run. Import before Prefect; what the environment already says wins."""

from __future__ import annotations

import os

_DEFAULTS = {
    # A busy laptop needs more than the 20 s that Prefect grants its own temporary server.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "INFO",
}


def apply() -> None:
    """Sets the defaults that the environment leaves open."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


apply()
