"""The clock of the Prefect server, by the date of its answers: machines that talk to it may be minutes apart."""

from __future__ import annotations

import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient, SyncPrefectClient


def server_time(client: SyncPrefectClient) -> datetime.datetime:
    """Now, to a second. Raises httpx.HTTPError where the server does not answer."""
    try:
        return _date(client.hello())
    except httpx.HTTPStatusError as error:  # an answer all the same
        return _date(error.response)


async def server_time_async(client: PrefectClient) -> datetime.datetime:
    """Now, to a second. Raises httpx.HTTPError where the server does not answer."""
    try:
        return _date(await client.hello())
    except httpx.HTTPStatusError as error:
        return _date(error.response)


def _date(answer: httpx.Response) -> datetime.datetime:
    """Of an answer that has none, which no server of Prefect gives, this machine's clock has to do."""
    date = answer.headers.get("Date")
    return parsedate_to_datetime(date) if date else datetime.datetime.now(datetime.UTC)
