"""Errors of a loop that goes on: each is told when it begins, not at every look, with what to do; and when it is over."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DO_NOTHING = "it is tried again; if it lasts look at https://status.cloud.google.com and at the network from here to tpu.googleapis.com"
LOOK = "it is tried again; `gcloud compute tpus queued-resources list --project PROJECT --zone ZONE` shows what is there and costs money"


class Troubles:
    """What goes wrong now, by the thing that it befalls."""

    def __init__(self, log: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._log = log
        self._told: dict[str, str] = {}
        self._met: set[str] = set()

    @contextmanager
    def of(self, thing: str) -> Iterator[None]:
        """An error of the block goes no further. It is told once, until there is none, or one of another kind."""
        self._met.add(thing)
        try:
            yield
        except Exception as error:
            kind = type(error).__name__
            if self._told.get(thing) != kind:
                self._told[thing] = kind
                self._log.warning("%s: %s: %s; %s", thing, kind, error, _remedy(error))
                self._log.debug("%s", thing, exc_info=error)
        else:
            if self._told.pop(thing, None) is not None:
                self._log.info("%s: in order again", thing)

    def forget_the_rest(self) -> None:
        """What was not met since the last call is gone."""
        self._told = {thing: kind for thing, kind in self._told.items() if thing in self._met}
        self._met.clear()


def _remedy(error: Exception) -> str:
    from google.api_core.exceptions import GoogleAPICallError, NotFound

    from deployments.tpu.cloud import Refused, Unavailable

    if isinstance(error, Refused):
        return "then it goes on by itself"
    if isinstance(error, NotFound):
        return (
            "correct `project` and `zones` of the work pool or the deployment's job_variables, and enable the Cloud TPU API in the project"
        )
    if isinstance(error, GoogleAPICallError):
        return LOOK
    if isinstance(error, Unavailable | OSError):
        return DO_NOTHING
    return "it is tried again"
