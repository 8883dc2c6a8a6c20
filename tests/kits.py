"""Kits for tests: an authority, a coordinator and sites, written to folders as provisioning would."""

from __future__ import annotations

from pathlib import Path

from shared.topics import Role
from shared.trust.kit import (
    AUTHORITY,
    COORDINATOR,
    MEMBER,
    MEMBER_SUFFIX,
    REVOCATIONS,
    ROSTER,
    authority_pem,
    generate_authority,
    generate_keys,
    load_authority,
    make_private_folder,
    public_keys,
    write_private,
)
from shared.trust.membership import (
    Membership,
    Revocations,
    public_bytes,
    sign_membership,
    sign_revocations,
    verify_membership,
)

ALWAYS = 2**40


class Kits:
    """An authority's work bench below `root`: `root/coordinator-kit`, `root/<site>-kit`."""

    def __init__(self, root: Path, federation: str = "ward") -> None:
        self.root = root
        self.federation = federation
        self.authority = generate_authority(root / "authority.key")
        self.serials: dict[str, int] = {}
        self.number = 0
        self._revoked: set[int] = set()
        self.coordinator = self._make("coordinator", "coordinator")
        make_private_folder(self.coordinator / ROSTER)

    @classmethod
    def reopen(cls, root: Path, federation: str, *sites: str) -> Kits:
        """The bench as an earlier `Kits` left it, before anything was revoked."""
        bench = cls.__new__(cls)
        bench.root, bench.federation, bench.coordinator = root, federation, root / "coordinator-kit"
        bench.authority = load_authority(root / "authority.key")
        bench.number, bench._revoked = 0, set()
        publics = [public_bytes(bench.authority)]
        bench.serials = {
            name: verify_membership((bench.folder(name) / MEMBER).read_bytes(), publics, federation=federation).serial
            for name in sites
        }
        return bench

    def site(self, name: str, *, not_after: int = ALWAYS) -> Path:
        """Enrol a site; returns its kit."""
        kit = self._make(name, "site", not_after=not_after)
        write_private(kit / COORDINATOR, (self.coordinator / MEMBER).read_bytes())
        self.admit(name)
        return kit

    def admit(self, name: str) -> None:
        """Put a site's membership into the roster."""
        member = (self.folder(name) / MEMBER).read_bytes()
        write_private(self.coordinator / ROSTER / f"{name}{MEMBER_SUFFIX}", member)

    def revoke(self, *names: str) -> None:
        """Sign and place the next revocation list; without names it only rises."""
        self._revoked |= {self.serials[name] for name in names}
        self.number += 1
        listed = Revocations(federation=self.federation, number=self.number, serials=tuple(self._revoked))
        write_private(self.coordinator / REVOCATIONS, sign_revocations(self.authority, listed))

    def membership(self, name: str, role: Role, *, not_after: int = ALWAYS) -> Membership:
        """The membership that the keys of `name` would get now."""
        keys = public_keys(self.folder(name))
        self.serials[name] = len(self.serials) + 1
        return Membership(
            role=role,
            name=name,
            federation=self.federation,
            sign_key=keys.sign,
            box_key=keys.box,
            serial=self.serials[name],
            not_before=0,
            not_after=not_after,
        )

    def folder(self, name: str) -> Path:
        """Where the kit of `name` lies."""
        return self.root / f"{name}-kit"

    def _make(self, name: str, role: Role, *, not_after: int = ALWAYS) -> Path:
        kit = self.folder(name)
        generate_keys(kit)
        write_private(kit / AUTHORITY, authority_pem([public_bytes(self.authority)]))
        member = self.membership(name, role, not_after=not_after)
        write_private(kit / MEMBER, sign_membership(self.authority, member))
        return kit
