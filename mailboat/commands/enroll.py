"""`mailboat site enroll` and `mailboat site accept`: how a hospital becomes a member."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from shared.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

REQUEST = "request.json"


def enroll(
    *,
    name: Annotated[str, typer.Option(help="The site's name: lower-case letters, digits, - and _.")],
    out: Annotated[
        Path | None, typer.Option(help="The kit: a new folder, which never leaves this machine; default: NAME-kit.")
    ] = None,
) -> None:
    """Make this site's keys and a request for the federation's authority; print the fingerprint to read out."""
    from pydantic import TypeAdapter, ValidationError

    from broker.provision import make_request as make_csr
    from mailboat.enrolment import make_request
    from shared.config import SiteName
    from shared.trust import kit as kits
    from shared.trust.document import to_json

    try:
        TypeAdapter(SiteName).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"{name!r} cannot be a site's name",
            hint="1 to 64 of: lower-case letters, digits, - and _; and not coordinator",
        ) from None
    out = out or Path(f"{name}-kit")
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
    kit: Annotated[
        Path | None, typer.Option(help="This site's kit, from `mailboat site enroll`; default: NAME-kit.")
    ] = None,
    authority: Annotated[
        str | None,
        typer.Option(help="The authority's fingerprint, as it was read out; else it is shown and asked for."),
    ] = None,
) -> None:
    """Put what the authority granted into this site's kit.

    Renewals come over the federation's own channel while the site runs; one that could not come so is accepted here.
    """
    from mailboat.commands.provision import confirm
    from mailboat.files import reading
    from shared.trust import kit as kits
    from shared.trust.document import MAX_DOCUMENT_BYTES
    from shared.trust.grant import check_grant, install, is_known, parse_grant
    from shared.trust.signing import authority_fingerprint

    kit = kit or Path(f"{grant.stem}-kit")
    kits.check_kit_modes(kit)
    granted = parse_grant(reading(grant, MAX_DOCUMENT_BYTES))
    known = kit / kits.AUTHORITY
    if not known.exists():
        confirm(authority_fingerprint(granted.authority), authority, "authority", "the authority")
    elif not is_known(granted, kits.load_authorities(known)):
        raise RefusedError(
            f"{grant} was signed by another authority than this kit's",
            rule="unknown-authority",
            hint="a site that joins another federation takes a new kit",
        )
    elif granted.authority not in kits.load_authorities(known):
        console.say(f"the authority has another key now, with fingerprint {authority_fingerprint(granted.authority)}")
    check_grant(granted, kits.public_keys(kit), kits.tls_point(kit))
    install(kit, granted)
    console.say(f"{kit} is the kit of {granted.name} in federation {granted.federation}; in site.toml:")
    for line in _settings(kit, granted.name):
        console.result().print(line, markup=False)


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
