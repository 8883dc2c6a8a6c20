"""The register of an authority: every membership and certificate that it ever issued, and which still count."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.ids import Ident
from shared.manifest import WireModel
from shared.trust.document import Base64, Key
from shared.trust.membership import UnixSeconds

State = Literal["admitted", "revoked", "superseded"]


class Entry(WireModel):
    """One membership or certificate that was issued."""

    name: Ident
    role: Literal["site", "coordinator", "broker"]
    serial: int = Field(ge=1, lt=2**63)
    state: State
    not_after: UnixSeconds
    """Of the certificate, and at a site of the membership as well."""
    revoked_at: UnixSeconds = 0
    sign_key: Key | None = None
    box_key: Key | None = None
    tls_key: Base64
    """65 bytes, uncompressed point."""
    member: Base64 = b""
    """The signed membership; empty for a certificate without one."""
    ca: int = Field(default=1, ge=1)
    """Which of the authority's CAs issued the certificate: the first, the second, ..."""


class Register(WireModel):
    """`register.json`."""

    v: Literal[1] = 1
    federation: Ident
    hosts: tuple[str, ...]
    port: int
    number: int = 0
    """Of the newest revocation list."""
    listed_at: UnixSeconds
    """Date of the newest revocation list; rises with each."""
    ca: int = Field(default=1, ge=1)
    """Which CA issues."""
    ca_beside: int | None = Field(default=None, ge=1)
    """Which one is trusted beside it, during a roll-over: the next one, that does not issue yet, or the one before."""
    entries: tuple[Entry, ...] = ()

    @property
    def generations(self) -> tuple[int, ...]:
        """The CAs that are trusted, the one that issues first."""
        return (self.ca,) if self.ca_beside is None else (self.ca, self.ca_beside)

    @property
    def next_ca(self) -> int | None:
        """The CA that waits to issue."""
        return self.ca_beside if self.ca_beside is not None and self.ca_beside > self.ca else None

    @property
    def ca_before(self) -> int | None:
        """The CA that issues no more and is trusted yet."""
        return self.ca_beside if self.ca_beside is not None and self.ca_beside < self.ca else None

    def current(self, name: str) -> Entry | None:
        """The entry that counts for this name."""
        return next((entry for entry in self.entries if entry.name == name and entry.state == "admitted"), None)
