"""`mailboat site enroll` and `mailboat site accept`: how a hospital becomes a member."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from shared.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from mailboat.enrolment import Grant

REQUEST = "request.json"


def enroll(
    *,
    name: Annotated[str, typer.Option(help="The site's name: lower-case letters, digits, - and _.")],
    out: Annotated[Path, typer.Option(help="The kit: a new folder, which never leaves this machine.")],
) -> None:
    """Make this site's keys and a request for the federation's authority; print the fingerprint to read out."""
    from pydantic import TypeAdapter, ValidationError

    from broker.provision import make_request as make_csr
    from mailboat.enrolment import make_request, to_json
    from shared.config import SiteName
    from shared.trust import kit as kits

    try:
        TypeAdapter(SiteName).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"{name!r} cannot be a site's name",
            hint="1 to 64 of: lower-case letters, digits, - and _; and not coordinator",
        ) from None
    publics = kits.generate_keys(out)
    request = make_request(
        name, kits.load_authority(out / kits.SIGN_KEY), publics.box, make_csr(_tls_key(out), name=name)
    )
    kits.write_private(out / REQUEST, to_json(request))
    console.say(f"send {out / REQUEST} to the federation's authority; it holds no secret")
    console.say("and read this to them over the telephone:")
    console.result().print(request.fingerprint, markup=False)


def accept(
    grant: Annotated[Path, typer.Argument(help="The file NAME.grant from the authority.")],
    *,
    kit: Annotated[Path, typer.Option(help="This site's kit, from `mailboat site enroll`.")],
    authority: Annotated[
        str | None,
        typer.Option(help="The authority's fingerprint, as it was read out; else it is shown and asked for."),
    ] = None,
) -> None:
    """Put what the authority granted into this site's kit; run it again with each renewal."""
    from mailboat.commands.provision import confirm
    from mailboat.enrolment import MAX_DOCUMENT_BYTES, authority_fingerprint, parse_grant
    from mailboat.files import reading
    from shared.trust import kit as kits

    kits.check_kit_modes(kit)
    granted = parse_grant(reading(grant, MAX_DOCUMENT_BYTES))
    known = kit / kits.AUTHORITY
    if not known.exists():
        confirm(authority_fingerprint(granted.authority), authority, "authority", "the authority")
    elif granted.authority not in kits.load_authorities(known):
        raise RefusedError(
            f"{grant} was signed by another authority than this kit's",
            rule="unknown-authority",
            hint="a site that joins another federation takes a new kit",
        )
    _check(granted, kit)
    files = {
        kits.CA_CERT: granted.ca.encode(),
        kits.TLS_CERT: granted.certificate.encode(),
        kits.COORDINATOR: granted.coordinator,
        kits.MEMBER: granted.member,
        kits.AUTHORITY: granted.authorities.encode(),  # last: a kit without it is asked about again
    }
    for name, data in files.items():
        kits.write_private(kit / name, data)
    console.say(f"{kit} is the kit of {granted.name} in federation {granted.federation}; in site.toml:")
    for line in _settings(kit, granted.name):
        console.result().print(line, markup=False)


def _check(granted: Grant, kit: Path) -> None:
    """RefusedError unless everything granted is for the keys of this kit."""
    from broker.provision import load_certificate, same_key
    from mailboat.enrolment import trusted_by
    from shared.trust import kit as kits

    keys, by = kits.public_keys(kit), trusted_by(granted)
    member, coordinator = by.member, by.coordinator
    certificate = load_certificate(granted.certificate.encode(), where="the granted certificate")
    ours = (member.sign_key, member.box_key) == (keys.sign, keys.box)
    if not ours or not same_key(certificate.public_key(), _tls_key(kit).public_key()):
        raise RefusedError(
            f"the grant for {granted.name} is for other keys than those in {kit}",
            rule="other-keys",
            hint="check which kit it is for",
        )
    if (member.role, coordinator.role, member.name) != ("site", "coordinator", granted.name):
        raise RefusedError(f"the grant for {granted.name} mixes up roles or names", rule="bad-document")


def _tls_key(kit: Path) -> ec.EllipticCurvePrivateKey:
    from broker.provision import load_p256
    from shared.trust import kit as kits

    return load_p256(kits.read_private(kit / kits.TLS_KEY), where=str(kit / kits.TLS_KEY))


def _settings(kit: Path, name: str) -> list[str]:
    return [
        f'name = "{name}"',
        "[trust]",
        f'kit = "{kit}"',
        "[broker]",
        f'ca_file = "{kit}/ca.crt"',
        f'cert_file = "{kit}/tls.crt"',
        f'key_file = "{kit}/tls.key"',
    ]
