"""Texts of other people's errors, without the secrets that they may quote."""

from __future__ import annotations

import os
import re

HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)|(?<=token=)[^&\s'\")]+|(?<=key=)[^&\s'\")]+")
# What services themselves mark as secret by its form: Hugging Face, GitHub, Google, AWS, OpenAI and others like it, private keys.
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AIza[\w-]{30,}|(?:AKIA|ASIA)[A-Z0-9]{16}|sk-[\w-]{20,}"
    r"|pnu_\w{20,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_SHORTEST = 8  # what is shorter is no secret, and its letters stand in other words


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name is taken to hold a secret."""
    return _SECRET_NAME.search(name.upper()) is not None


def without_secrets(text: str) -> str:
    """`text` without the values of secret-looking environment variables, credentials inside addresses, and what has a token's form."""
    secrets = [value for name, value in os.environ.items() if len(value) >= _SHORTEST and is_secret_name(name)]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _FORMS.sub(HIDDEN, _IN_ADDRESS.sub(HIDDEN, text))
