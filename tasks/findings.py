"""What was looked at before a run, one thing a finding: how it is, and what to do if it is not well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing looked at: how it is, and what to do if it is not well."""

    subject: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        """The finding in one sentence."""
        return f"{self.detail}: {self.remedy}" if self.remedy else self.detail


def refuse(findings: Iterable[Finding], tell: Callable[[str], None]) -> None:
    """Tells every warning; raises ValueError with all that would make a run fail."""
    failures: list[str] = []
    for finding in findings:
        if finding.state == "warn":
            tell(str(finding))
        elif finding.state == "fail":
            failures.append(str(finding))
    if failures:
        raise ValueError("; ".join(failures))
