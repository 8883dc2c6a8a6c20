"""The certificates of a link: read before the first connection, and again before each one when a file has changed.

So a renewed certificate, or a CA bundle that was exchanged, counts from the next connection on without a restart. Files
that cannot be used at that moment change nothing: a connection with those from before is tried.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import structlog

from shared.config import BrokerSection
from shared.errors import ConfigError
from shared.link.endpoints import tls_context

_log = structlog.get_logger("link")


class Certificates:
    """What the [broker] section names; see the module's docstring."""

    def __init__(self, section: BrokerSection) -> None:
        """ConfigError for files that cannot be used."""
        self._section = section
        self._seen = self._stamp()
        self._context = tls_context(section)

    def context(self) -> ssl.SSLContext:
        """The TLS context for a connection that is made now."""
        seen = self._stamp()
        if seen != self._seen:
            self._seen = seen
            try:
                self._context = tls_context(self._section)
            except ConfigError as error:
                _log.warning("kept the certificates as they were", reason=error.message, hint=error.hint)
            else:
                _log.info("read the certificates again")
        return self._context

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Inode, time and size of each file: another value means that something changed."""
        return tuple(
            _stamp_of(path) for path in (self._section.ca_file, self._section.cert_file, self._section.key_file)
        )


def _stamp_of(path: Path | None) -> tuple[int, int, int] | None:
    try:
        seen = None if path is None else path.stat()
    except OSError:
        return None  # reading it says why
    return None if seen is None else (seen.st_ino, seen.st_mtime_ns, seen.st_size)
