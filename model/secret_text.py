"""Texts of other people's errors, without the secrets that they may quote."""

from __future__ import annotations

import logging
import os
import re
import traceback
from typing import Any

HIDDEN = "[hidden]"
# By whole words between underscores, so that TOKENIZERS_PARALLELISM is none.
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:(?:API|ACCESS|PRIVATE)?KEYS?|TOKENS?|SECRETS?|PASS(?:WORD|WD|PHRASE)?|CREDENTIALS?|AUTH|WEBHOOK)(?:_|$)"
)
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


def hide_secrets_in_logs() -> None:
    """From now on no log record of this process, of any logger or library, holds what `without_secrets` leaves out."""
    make = logging.getLogRecordFactory()
    if getattr(make, "hides_secrets", False):
        return

    def record(*arguments: Any, **named: Any) -> logging.LogRecord:
        made = make(*arguments, **named)
        try:
            said = made.getMessage()
        except (TypeError, ValueError):  # a message that its arguments do not fit: the handler tells of that
            return made
        hidden = without_secrets(said)
        if hidden != said:  # else they stay as they are: some formatters read the arguments
            made.msg, made.args = hidden, None
        if isinstance(made.exc_info, tuple) and made.exc_info[0] is not None:
            trace = "".join(traceback.format_exception(*made.exc_info)).rstrip("\n")
            made.exc_text = without_secrets(trace) if without_secrets(trace) != trace else made.exc_text
        return made

    record.hides_secrets = True  # pyright: ignore[reportFunctionMemberAccess]
    logging.setLogRecordFactory(record)
