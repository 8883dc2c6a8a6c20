"""Which guard a process gets: the federation says whether it is sealed, the machine where its kit lies."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

from shared.config import FederationConfig, LocalTrustSection
from shared.errors import ConfigError
from shared.topics import Role
from shared.trust.guard import CoordinatorsGuard, OpenGuard, SitesGuard
from shared.trust.kit import Kit, load_kit
from shared.trust.sealed import CoordinatorGuard, SiteGuard

FOLDER = "trust"
"""Below an end's storage folder: its counters."""

log = structlog.get_logger("trust")


def coordinator_guard(
    federation: FederationConfig, local: LocalTrustSection, *, fingerprint: str, storage: Path
) -> CoordinatorsGuard:
    """Return the coordinator's guard; ConfigError when the federation is sealed and the kit is missing or unfit."""
    kit = own_kit(federation, local, site=None)
    if kit is None:
        return OpenGuard()
    return CoordinatorGuard(kit, fingerprint=fingerprint, folder=storage / FOLDER, now=time.time())


def site_guard(
    federation: FederationConfig, local: LocalTrustSection, *, site: str, fingerprint: str, storage: Path
) -> SitesGuard:
    """Return a site's guard; ConfigError as `coordinator_guard`, or when the kit is another site's."""
    kit = own_kit(federation, local, site=site)
    if kit is None:
        return OpenGuard()
    return SiteGuard(kit, fingerprint=fingerprint, folder=storage / FOLDER)


def own_kit(federation: FederationConfig, local: LocalTrustSection, *, site: str | None) -> Kit | None:
    """Return the kit of this site, or of the coordinator (site None); None in a federation without trust.

    ConfigError when it is missing or unfit.
    """
    name, role = federation.federation.name, _role(site)
    if federation.trust.mode == "none":
        log.warning("messages are neither signed nor encrypted: the broker can read and forge them", federation=name)
        return None
    if local.kit is None:
        raise ConfigError(
            f"federation {name} is sealed, and this {role} has no kit", hint="name its folder as `kit` under [trust]"
        )
    kit = load_kit(local.kit, role=role, federation=name, now=time.time())
    if site is not None and kit.member.name != site:
        raise ConfigError(
            f"{kit.folder} is the kit of {kit.member.name}, this is {site}", hint="check `name` and [trust] kit"
        )
    return kit


def _role(site: str | None) -> Role:
    return "coordinator" if site is None else "site"
