"""The few string shapes that identify things on the wire and on disk, validated in one place.

The patterns are anchored with ^ and $, which in pydantic's regular expressions match at the very ends only.
None of them admits a dot, a slash or a space, so an id is always safe as a file name and as one MQTT topic level
(NATS and RabbitMQ give a dot a meaning of their own).
"""

from __future__ import annotations

import secrets
from typing import Annotated

from pydantic import StringConstraints

Ident = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]{1,64}$", strict=True)]
"""Name of a federation or a site; chosen by people."""

TransferId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$", strict=True)]
"""Identity of an update (drawn at birth) or of a state (head of its file's SHA-256): 16 bytes in hex."""

Sha256Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", strict=True)]

SessionId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$", strict=True)]
"""Drawn anew by each process; tells a restart from a second process under the same name."""


def new_update_id() -> str:
    """Return a fresh 128-bit random id; two sites never draw the same one."""
    return secrets.token_hex(16)


def new_session_id() -> str:
    """Return a fresh 64-bit random session id."""
    return secrets.token_hex(8)
