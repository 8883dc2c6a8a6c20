"""The register of an authority: every membership and certificate that it ever issued, and which still count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from shared.ids import Ident
from shared.manifest import WireModel
from shared.trust.document import Base64, Key
from shared.trust.membership import UnixSeconds
from shared.trust.succession import Introduction

State = Literal["admitted", "revoked", "superseded"]


@dataclass(frozen=True, slots=True)
class Generations:
    """Which of an authority's CAs, or of its own keys, counts: the first, the second, ..."""

    current: int
    """The one that issues."""
    beside: int | None
    """During a roll-over the one that is trusted beside it: the next, that does not issue yet, or the one before."""

    @property
    def trusted(self) -> tuple[int, ...]:
        """Both, the one that issues first."""
        return (self.current,) if self.beside is None else (self.current, self.beside)

    @property
    def next(self) -> int | None:
        """The one that waits to issue."""
        return self.beside if self.beside is not None and self.beside > self.current else None

    @property
    def before(self) -> int | None:
        """The one that issues no more and is trusted yet."""
        return self.beside if self.beside is not None and self.beside < self.current else None


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
    """Which of the authority's CAs issued the certificate."""
    key: int = Field(default=1, ge=1)
    """Which of the authority's keys signed the membership."""


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
    ca_beside: int | None = Field(default=None, ge=1)
    key: int = Field(default=1, ge=1)
    key_beside: int | None = Field(default=None, ge=1)
    introductions: tuple[Introduction, ...] = ()
    """How each of the authority's keys came after the one before."""
    entries: tuple[Entry, ...] = ()

    @property
    def cas(self) -> Generations:
        """The TLS CAs that are trusted."""
        return Generations(self.ca, self.ca_beside)

    @property
    def keys(self) -> Generations:
        """The authority's own keys that are believed."""
        return Generations(self.key, self.key_beside)

    def current(self, name: str) -> Entry | None:
        """The entry that counts for this name."""
        return next((entry for entry in self.entries if entry.name == name and entry.state == "admitted"), None)
