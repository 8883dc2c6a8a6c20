"""The few string shapes that identify things on the wire and on disk, validated in one place.

The patterns are anchored with ^ and $, which in pydantic's regular expressions match at the very ends only.
None of them admits a dot, a slash or a space, so an id is always safe as a file name and as one MQTT topic level
(NATS and RabbitMQ give a dot a meaning of their own).
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated

from pydantic import StringConstraints

Ident = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]{1,64}$", strict=True)]
"""Name of a federation or a site; chosen by people."""

TransferId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$", strict=True)]
"""Identity of an update (drawn at birth) or of a state (head of its file's digest): 16 bytes in hex."""

Sha256Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", strict=True)]
DigestHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", strict=True)]
"""BLAKE3, as `shared.digest` says of what."""

_DRAWN = 20
"""Hex digits of an update id that are random; the rest follows from them and the site's name."""

SessionId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$", strict=True)]
"""Drawn anew by each process; tells a restart from a second process under the same name."""


def new_update_id(site: str) -> str:
    """Return a fresh id that no other site can use: 80 random bits, then 48 of a hash over site and these bits.

    Whoever learns another's id cannot offer anything under it in a name of its own, so no site can use up an id that
    is not its own.
    """
    return marked(secrets.token_hex(_DRAWN // 2), site)


def is_update_id_of(update_id: str, site: str) -> bool:
    """Whether this id was drawn for that site."""
    return update_id == marked(update_id[:_DRAWN], site)


def marked(drawn: str, site: str) -> str:
    """Return the update id of a site that drew these 20 hex digits."""
    mark = hashlib.sha256(f"mailboat update id v1/{site}/{drawn}".encode()).hexdigest()
    return drawn + mark[: 32 - _DRAWN]


def new_session_id() -> str:
    """Return a fresh 64-bit random session id."""
    return secrets.token_hex(8)
