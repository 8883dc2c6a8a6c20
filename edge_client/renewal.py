"""Taking a newer grant that the coordinator hands over: checked against this site's own kit, installed, answered.

Whoever brings it, the authority's signature is what counts. A renewal has to be for the keys that are here and later
than what is here; keys are neither sent nor asked for. What is refused changes nothing, and both logs tell the rule.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from shared.config import FederationConfig, SiteConfig
from shared.errors import ConfigError, RefusedError, UnavailableError
from shared.messages import MAX_TEXT, Renewal, Renewed
from shared.threads import in_thread
from shared.trust import kit as kits
from shared.trust.grant import check_renewal, holder_of, install, is_here
from shared.trust.signing import authority_fingerprint

log = structlog.get_logger("site")


class Renewals:
    """One site's; in a federation without trust nothing is taken and nothing answered."""

    def __init__(self, config: SiteConfig, federation: FederationConfig, session: str) -> None:
        self._kit = None if federation.trust.mode == "none" else config.trust.kit
        self._federation = federation.federation.name
        self._session = session
        self._shown = config.broker.cert_file

    async def take(self, renewal: Renewal, say: Callable[[Renewed], Awaitable[None]]) -> None:
        """Install what may be installed, and answer; what cannot be written now is offered again."""
        if self._kit is None:
            return
        try:
            answer = await in_thread(self._answer, self._kit, renewal.grant)
        except (UnavailableError, ConfigError) as error:
            log.warning("did not take a renewal", reason=error.message, hint=error.hint)
            return
        await say(answer)

    def _answer(self, kit: Path, data: bytes) -> Renewed:
        sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._take(kit, data)
        except RefusedError as error:
            log.warning("refused a renewal", rule=error.rule, reason=error.message)
            detail = error.message[:MAX_TEXT]
            return Renewed(session=self._session, grant_sha256=sha256, rule=error.rule, detail=detail)
        return Renewed(session=self._session, grant_sha256=sha256)

    def _take(self, kit: Path, data: bytes) -> None:
        holder = holder_of(kit, self._federation)
        grant = check_renewal(data, holder, time.time())
        if is_here(kit, grant):
            return
        try:
            install(kit, grant)
        except OSError as error:
            reason = (error.strerror or "unknown reason").lower()
            raise RefusedError(f"the site's kit cannot be written: {reason}", rule="kit-not-writable") from None
        until = holder_of(kit, self._federation).member.not_after
        log.info("renewed", until=time.strftime("%Y-%m-%d", time.gmtime(until)))
        if grant.authority not in holder.authorities:
            # Somebody at the site should know, and may ask by telephone whether it is so.
            log.warning("the authority has another key now", fingerprint=authority_fingerprint(grant.authority))
        if self._shown is not None and self._shown.resolve() != (kit / kits.TLS_CERT).resolve():
            log.warning(
                "the renewed certificate is not the one that the broker is shown",
                renewed=str(kit / kits.TLS_CERT),
                shown=str(self._shown),
            )
