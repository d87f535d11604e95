"""Secrets in other people's texts: by the names of variables, by their form, and in every log record of a process."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from model.secret_text import hide_secrets_in_logs, is_secret_name, without_secrets
from tasks.children import ChildFailed, run_child

CANARY = "canary-0123456789"


@pytest.fixture(autouse=True)
def in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What a handler of some library's writes while log records are cleaned."""
    before = logging.getLogRecordFactory()
    hide_secrets_in_logs()
    hide_secrets_in_logs()  # a second flow in the same process
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger("some.library")
    logger.addHandler(handler)
    yield text
    logger.removeHandler(handler)
    logging.setLogRecordFactory(before)


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "PREFECT_API_AUTH_STRING", "AWS_SECRET_ACCESS_KEY", "MY_PASSWD", "DB_PASSWORD", "APIKEY", "wandb_key"],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "AUTHOR", "MONKEY", "PATH", "KEYBOARD_LAYOUT", "PASSAGE"])
def test_names_of_others(name: str) -> None:
    assert not is_secret_name(name)


def test_no_log_record_has_one(logged: io.StringIO) -> None:
    log = logging.getLogger("some.library")
    log.warning("key=%s n=%d", CANARY, 3)
    try:
        raise ValueError(f"refused {CANARY}")
    except ValueError:
        log.exception("it failed")
    said = logged.getvalue()
    assert said.startswith("key=[hidden] n=3\nit failed\nTraceback")
    assert "ValueError: refused [hidden]" in said
    assert CANARY not in said


def test_what_has_no_secret_keeps_its_arguments(logged: io.StringIO) -> None:
    record = logging.getLogger("some.library").makeRecord("n", logging.INFO, "f", 1, "n=%d", (3,), None)
    assert (record.msg, record.args) == ("n=%d", (3,))
    broken = logging.getLogger("some.library").makeRecord("n", logging.INFO, "f", 1, "n=%d", ("three",), None)
    assert broken.args == ("three",)
    assert logged.getvalue() == ""


def test_the_last_words_of_a_child_have_none() -> None:
    with pytest.raises(ChildFailed, match=r"'\[hidden\]' is no module|No module named.*\[hidden\]"):
        run_child(CANARY, [], lambda _: None)
    assert without_secrets(CANARY) == "[hidden]"
