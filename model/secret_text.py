"""Texts of other people's errors, without the secrets that they may quote."""

from __future__ import annotations

import os
import re

HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)|(?<=token=)[^&\s'\")]+|(?<=key=)[^&\s'\")]+")
_SHORTEST = 8  # what is shorter is no secret, and its letters stand in other words


def without_secrets(text: str) -> str:
    """`text` without the values of secret-looking environment variables, and without credentials inside addresses."""
    secrets = [value for name, value in os.environ.items() if len(value) >= _SHORTEST and _SECRET_NAME.search(name.upper())]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _IN_ADDRESS.sub(HIDDEN, text)
