"""Handing sites their newer grants: what lies in the kit's `grants/` is offered until its site says what it made of it.

    coordinator-kit/grants/<site>.grant    put there by the authority, or copied; looked at again every second

`Offers` decides: a grant goes to a site that is here, once for each of its processes and again after AGAIN_S as long as
there is no answer. A site that has it says so again, which costs one message for each start of either side. `Renewals`
reads the folder, sends, and tells the log. A grant is no secret and is checked by its site; the coordinator looks at it
only so that what it sends is what the authority signed.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from coordinator.sites import Sites
from shared.config import CoordinatorConfig, FederationConfig
from shared.errors import ConfigError, RefusedError
from shared.messages import Message, Renewal, Renewed
from shared.threads import in_thread
from shared.topics import Channel
from shared.trust.grant import GRANT_SUFFIX, parse_grant
from shared.trust.kit import AUTHORITY, GRANTS, load_authorities, read_peers, read_private

LOOK_S = 1.0
AGAIN_S = 60.0
"""An offer that nobody answered is repeated after this long; a site of an older release never answers."""

REMIND_S = 86_400.0
"""How often it is told whose membership ends soon."""

log = structlog.get_logger("coordinator")

Post = Callable[[Message, Channel, str | None], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Offered:
    session: str
    sha256: str
    at: float
    """Monotonic seconds."""


class Offers:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._grants: dict[str, tuple[str, bytes]] = {}
        self._offered: dict[str, _Offered] = {}
        self._answered: dict[str, tuple[str, str]] = {}
        self._taken: dict[str, str] = {}

    def hold(self, grants: Mapping[str, bytes]) -> None:
        """From now on these are the grants that there are, by site."""
        self._grants = {site: (hashlib.sha256(grant).hexdigest(), grant) for site, grant in grants.items()}

    @property
    def waiting(self) -> tuple[str, ...]:
        """Sites, by name, that have not said since this process started that they hold their newest grant."""
        return tuple(sorted(site for site, (sha256, _) in self._grants.items() if self._taken.get(site) != sha256))

    def due(self, sessions: Mapping[str, str], now: float) -> list[tuple[str, Renewal]]:
        """What is to be sent to whom of the sites that are here, by session; `now` is monotonic seconds."""
        out = []
        for site, session in sorted(sessions.items()):
            if site not in self._grants:
                continue
            sha256, grant = self._grants[site]
            before = self._offered.get(site)
            patient = (
                before is not None
                and (before.session, before.sha256) == (session, sha256)
                and now - before.at < AGAIN_S
            )
            if patient or self._answered.get(site) == (session, sha256):
                continue
            self._offered[site] = _Offered(session, sha256, now)
            out.append((site, Renewal(grant=grant)))
        return out

    def answered(self, site: str, said: Renewed) -> bool:
        """Take a site's word; whether it is the first one about the grant that counts, in that session."""
        now = (said.session, said.grant_sha256)
        if self._grants.get(site, ("", b""))[0] != said.grant_sha256 or self._answered.get(site) == now:
            return False
        self._answered[site] = now
        if said.rule is None:
            self._taken[site] = said.grant_sha256
        return True


class Renewals:
    """The shell around `Offers`; without a kit there is nothing to offer."""

    def __init__(self, config: CoordinatorConfig, federation: FederationConfig, sites: Sites, post: Post) -> None:
        self._kit = None if federation.trust.mode == "none" else config.trust.kit
        self._federation = federation.federation.name
        self._sites = sites
        self._post = post
        self._seen: tuple[tuple[str, int, int, int], ...] = ()
        self._reminded = -math.inf
        self.offers = Offers()

    async def run(self) -> None:
        """Look and offer until cancelled."""
        while self._kit is not None:
            try:
                await in_thread(self._look, self._kit)
            except ConfigError as error:
                log.warning("kept the grants as they were", reason=error.message, hint=error.hint)
            here = {name: site.session for name, site in self._sites.items() if site.session is not None}
            for site, renewal in self.offers.due(here, time.monotonic()):
                log.info("offers a grant", site=site)
                await self._post(renewal, Channel.DOWN_CTL, site)
            await asyncio.sleep(LOOK_S)

    def takes(self, site: str, message: Message) -> bool:
        """Whether a message is an answer, which ends here."""
        if not isinstance(message, Renewed):
            return False
        if self.offers.answered(site, message):
            if message.rule is None:
                log.info("a site has its newest grant", site=site)
            else:
                log.warning("a site refused a grant", site=site, rule=message.rule, reason=message.detail)
        return True

    def _look(self, kit: Path) -> None:
        if time.monotonic() - self._reminded >= REMIND_S:
            self._reminded = time.monotonic()
            if ending := ending_members(kit, self._federation, time.time()):
                log.warning("memberships end soon", sites=ending, hint="`mailboat provision renew` at the authority")
        found = _stamp(kit / GRANTS)
        if found == self._seen:
            return
        self._seen = found
        grants, unfit = read_grants(kit)
        self.offers.hold(grants)
        for reason in unfit:
            log.warning("left out a grant", reason=reason)


def read_grants(kit: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the kit's grants by site, and why others were left out; none when there is no such folder.

    ConfigError when the authority's keys cannot be read.
    """
    authorities, grants, unfit = load_authorities(kit / AUTHORITY), {}, []
    for path in sorted((kit / GRANTS).glob(f"*{GRANT_SUFFIX}")):
        try:
            data = read_private(path)
            grant = parse_grant(data)
            if grant.authority not in authorities:
                raise RefusedError("signed by another authority", rule="unknown-authority")
            if f"{grant.name}{GRANT_SUFFIX}" != path.name:
                raise RefusedError(f"the grant for {grant.name}", rule="other-site")
        except RefusedError as error:
            unfit.append(f"{path}: {error.message} (rule {error.rule})")
        except ConfigError as error:
            unfit.append(error.message)
        else:
            grants[grant.name] = data
    return grants, tuple(unfit)


def ending_members(kit: Path, federation: str, now: float) -> list[str]:
    """Names on the roster that have less than a third of their time left; ConfigError as `read_peers`."""
    peers = read_peers(kit, "coordinator", federation)
    return sorted(name for name, member in peers.members.items() if member.ends_soon(now) and not peers.revoked(member))


def _stamp(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    found = []
    for path in sorted(folder.glob(f"*{GRANT_SUFFIX}")):
        try:
            seen = path.stat()
        except FileNotFoundError:
            continue  # there a moment ago
        found.append((path.name, seen.st_ino, seen.st_mtime_ns, seen.st_size))
    return tuple(found)
