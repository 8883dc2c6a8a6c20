"""Grants for tests: what an authority would hand to a site of `tests.kits`, and whatever else one could hold."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker import provision
from shared.trust.document import to_json
from shared.trust.grant import Grant, make_grant
from shared.trust.kit import MEMBER, TLS_KEY, authority_pem, load_authority, private_pem, read_private, write_private
from shared.trust.membership import Membership, public_bytes, sign_membership, stated_membership
from shared.trust.succession import Introduction, introduce
from tests.kits import Kits

ISSUED = 1_800_000_000
"""Unix seconds at which these grants are made; the kits' own memberships are dated 0."""
DAYS = 45


class GrantBench:
    """Grants of the authority of these kits, under a CA that is made here."""

    def __init__(self, kits: Kits, *, issued: int = ISSUED) -> None:
        self.kits = kits
        self.issued = issued
        self.ca = self.make_ca("ward")
        self.other_ca = self.make_ca("another")
        self.introductions: tuple[Introduction, ...] = ()

    def roll_over(self) -> Ed25519PrivateKey:
        """Another key of the authority signs from now on; returns the one before. The sites' kits stay as they are."""
        before, member = self.kits.authority, self.kits.coordinator / MEMBER
        key = Ed25519PrivateKey.generate()
        self.introductions += (introduce(before, public_bytes(key), self.kits.federation),)
        self.kits.authority = key
        write_private(member, sign_membership(key, stated_membership(member.read_bytes())))
        return before

    def make_ca(self, name: str) -> tuple[ec.EllipticCurvePrivateKey, Any]:
        """A key and its own certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        return key, provision.make_ca(key, name=name, serial=1, now=self.issued, days=3650)

    def member(self, site: str, /, **changes: Any) -> Membership:
        """The membership that a renewal would bring to this site."""
        dates = {"serial": 4711, "not_before": self.issued - 300, "not_after": self.issued + DAYS * 86_400}
        return self.kits.membership(site, "site").model_copy(update={**dates, **changes})

    def certificate(self, name: str, *, serial: int = 4711, key: Path | None = None, ca: Any = None) -> str:
        """The certificate that goes with it."""
        pem = read_private(key or self.kits.folder(name) / TLS_KEY)
        public = provision.load_p256(pem, where="the test").public_key()
        issuer = ca or self.ca
        made = provision.issue_client(issuer, public, name=name, serial=serial, now=self.issued, days=DAYS)
        return provision.certificate_pem(made).decode()

    def fields(
        self, name: str, *, member: Membership | None = None, signer: Ed25519PrivateKey | None = None, **changes: Any
    ) -> dict[str, Any]:
        """All that is signed; the membership by `signer`, else by the authority."""
        return {
            "name": name,
            "federation": self.kits.federation,
            "member": sign_membership(signer or self.kits.authority, member or self.member(name)),
            "coordinator": (self.kits.coordinator / MEMBER).read_bytes(),
            "certificate": self.certificate(name),
            "ca": provision.certificate_pem(self.ca[1]).decode(),
            "authorities": authority_pem([public_bytes(self.kits.authority)]).decode(),
            "introductions": self.introductions,
            **changes,
        }

    def made(self, name: str, *, key: Ed25519PrivateKey | None = None, **changes: Any) -> Grant:
        """A grant for this site, signed by the authority, or by `key`."""
        return make_grant(key or self.kits.authority, **self.fields(name, **changes))

    def grant(self, name: str, **changes: Any) -> bytes:
        """The same as it travels."""
        return to_json(self.made(name, **changes))


def other_authority(root: Path) -> Ed25519PrivateKey:
    """A key that no kit knows."""
    path = root / "other-authority.key"
    write_private(path, private_pem(Ed25519PrivateKey.generate()))
    return load_authority(path)


def of_strange_version(pem: str) -> str:
    """The same certificate, said to be of version 7: the library knows three, and raises no ValueError for others."""
    der = ssl.PEM_cert_to_DER_cert(pem)
    assert der.count(b"\xa0\x03\x02\x01\x02") == 1
    return ssl.DER_cert_to_PEM_cert(der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x06"))
