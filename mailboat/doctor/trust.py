"""Whether this machine's kit and certificate serve in a sealed federation, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from broker.provision import load_certificate
from mailboat.doctor.finding import Finding, fail, ok, warn
from mailboat.files import reading
from shared.config import BrokerSection, FederationConfig, LocalTrustSection
from shared.errors import MailboatError
from shared.trust.choose import own_kit

LOW_DAYS = 14
"""Time enough to renew by hand."""
CERTIFICATE_BYTES_MAX = 100_000

_DAY_S = 86_400


def check_trust(
    federation: FederationConfig, local: LocalTrustSection, broker: BrokerSection, site: str | None
) -> Iterator[Finding]:
    """Yield what there is to say of a site's trust, or of the coordinator's (site None); nothing without trust."""
    if federation.trust.mode == "none":
        return
    try:
        kit = own_kit(federation, local, site=site)
        assert kit is not None
        peers = kit.peers()
    except MailboatError as error:
        yield fail("kit", error)
        return
    renewal = f"`mailboat provision rotate {site or 'coordinator'}` at the authority"
    whom = f"; admits {len(peers.members)} sites" if site is None else ""
    yield _dated("kit", f"{kit.folder}: membership", kit.member.not_after, renewal, whom)
    for reason in peers.unreadable.values():
        yield warn("kit", f"left out: {reason}", "copy that file from the authority again")
    if broker.cert_file is not None:
        try:
            yield _dated("certificate", f"{broker.cert_file}: counts", _end_of(broker.cert_file), renewal)
        except MailboatError as error:
            yield fail("certificate", error)


def _end_of(path: Path) -> float:
    """When a certificate ends, in unix seconds."""
    pem = reading(path, CERTIFICATE_BYTES_MAX)
    return load_certificate(pem, where=str(path)).not_valid_after_utc.timestamp()


def _dated(what: str, holder: str, end: float, renewal: str, more: str = "") -> Finding:
    days = int((end - time.time()) // _DAY_S)
    text = f"{holder} until {time.strftime('%Y-%m-%d', time.gmtime(end))}, {days} days{more}"
    return ok(what, text) if days >= LOW_DAYS else warn(what, text, renewal)
