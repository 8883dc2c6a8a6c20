"""One line of the doctor's report, and the exit status that all of them add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from shared.errors import ConfigError, CorruptError, MailboatError, RefusedError, UnavailableError

Level = Literal["OK", "WARN", "FAIL"]

_FIRST_TO_MEND = (ConfigError.exit_code, RefusedError.exit_code, CorruptError.exit_code, UnavailableError.exit_code)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to do."""

    level: Level
    what: str
    message: str
    hint: str = ""
    status: int = 0
    """Exit status that this asks for; 0 unless it failed."""

    def plain(self) -> dict[str, Any]:
        """JSON-able values."""
        return {"level": self.level, "what": self.what, "message": self.message, "hint": self.hint}


def ok(what: str, message: str) -> Finding:
    """All is well."""
    return Finding("OK", what, message)


def warn(what: str, message: str, hint: str = "") -> Finding:
    """It works, but somebody should know."""
    return Finding("WARN", what, message, hint)


def fail(what: str, error: MailboatError) -> Finding:
    """It does not work."""
    return Finding("FAIL", what, error.message, error.hint, error.exit_code)


def status_of(findings: Iterable[Finding]) -> int:
    """Return 0 when nothing failed, else the status of what must be mended first: configuration, data, the rest."""
    found = {finding.status for finding in findings}
    return next((status for status in _FIRST_TO_MEND if status in found), 0)
