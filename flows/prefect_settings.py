"""Settings of a process that runs flows: Prefect's, where the environment does not say otherwise, and no secrets in logs.

Import before Prefect.
"""

from __future__ import annotations

import os

from model.secret_text import hide_secrets_in_logs

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
hide_secrets_in_logs()
