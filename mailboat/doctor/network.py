"""What the broker lets us do: reach it, both MQTT versions, our topics alone; and what the coordinator says."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeVar

import msgpack

from mailboat.doctor.finding import Finding, fail, ok, warn
from mailboat.reach import reachable
from shared.config import BrokerSection, LinkSection
from shared.errors import MailboatError, RefusedError, UnavailableError
from shared.ids import new_session_id
from shared.link import LinkOptions, Packet
from shared.link.client import Connection, Shared
from shared.link.counters import Counters
from shared.link.dial import dial
from shared.link.endpoints import Endpoint, parse_endpoints, read_password, tls_context
from shared.link.link import PROTOCOL_NAMES
from shared.link.model import ConnectRefusedError, HungUpError, LinkDownError, NotGrantedError, Publication
from shared.link.refusals import connect_refusal, subscribe_refusal, tls_refusal
from shared.messages import (
    SCHEMA_VERSION,
    Announce,
    Hello,
    Message,
    Presence,
    Refused,
    Welcome,
    decode,
    encode,
)
from shared.plan import SealedPlan
from shared.topics import Channel, Role, subscriptions, topic

M = TypeVar("M")

PATIENCE_S = 5.0
RETAINED_S = 1.0
"""A retained message comes at once after the subscription; longer means that there is none."""
ANSWER_S = 8.0
"""A coordinator answers at once, but asks a site of the same name first whether it lives."""


@dataclass(frozen=True, slots=True)
class Party:
    """Who asks: the coordinator (site None) or a site of a federation, with its own way to the broker."""

    federation: str
    site: str | None
    broker: BrokerSection

    @property
    def role(self) -> Role:
        """The party's column in the table of topics."""
        return "coordinator" if self.site is None else "site"


async def check_broker(party: Party) -> tuple[list[Finding], str | None]:
    """Each endpoint: reached or not, MQTT 5 and 3.1.1 tried, access rules tried; and the best protocol that works."""
    findings: list[Finding] = []
    best: str | None = None
    try:
        endpoints = parse_endpoints(party.broker.url)
        read_password(party.broker)
        if any(endpoint.tls for endpoint in endpoints):
            tls_context(party.broker)
    except MailboatError as error:
        return [fail("broker", error)], None
    for endpoint in endpoints:
        if not await reachable((endpoint,)):
            hint = "check that it runs, that broker.url names it, and that a firewall lets this machine out"
            findings.append(fail("broker", UnavailableError(f"not reachable at {endpoint}", hint=hint)))
            continue
        findings.append(ok("broker", f"reached at {endpoint}{' with TLS' if endpoint.tls else ''}"))
        spoken = []
        for name in ("5", "3.1.1"):
            finding = await _try_protocol(party, endpoint, name)
            findings.append(finding)
            spoken += [name] if finding.level == "OK" else []
        if spoken:
            best = best or spoken[0]
            findings += await _try_access(party, endpoint, spoken[0])
    return findings, best


async def _try_protocol(party: Party, endpoint: Endpoint, name: str) -> Finding:
    what = f"MQTT {name}"
    try:
        async with _connected(party, endpoint, name, lambda _packet: False):
            return ok(what, f"{endpoint} accepts it")
    except MailboatError as error:
        if name == "5" and getattr(error, "rule", "") == "unsupported-protocol":
            return warn(what, f"{endpoint} does not speak it", "3.1.1 is enough; MQTT 5 gives clearer errors")
        return fail(what, error)


async def _try_access(party: Party, endpoint: Endpoint, name: str) -> list[Finding]:
    """Subscribe to all that we read, publish where we write, and try what we must not."""
    findings = []
    own = tuple(subscriptions(party.federation, party.role, party.site))
    mine, foreign = _probes(party)
    try:
        async with _connected(party, endpoint, name, lambda _packet: False) as connection:
            await _subscribe(connection, endpoint, own)
            findings.append(ok("access", f"{len(own)} topics may be read"))
            await connection.post(Publication(mine, _unknown_message()))
            if name == "5":
                findings.append(ok("access", f"{mine} may be written"))
                findings.append(await _try_foreign(connection, foreign))
            else:
                text = "whether topics may be written cannot be seen over MQTT 3.1.1, which has no way to refuse"
                findings.append(
                    warn("access", text, "if updates never arrive, look at the broker's access rules first")
                )
    except MailboatError as error:
        findings.append(fail("access", error))
    return findings


async def _subscribe(connection: Connection, endpoint: Endpoint, topics: tuple[str, ...]) -> None:
    try:
        await connection.follow(topics)
    except NotGrantedError as refused:
        raise subscribe_refusal(refused.topic, str(refused), str(endpoint)) from None


async def _try_foreign(connection: Connection, foreign: str) -> Finding:
    try:
        await connection.post(Publication(foreign, _unknown_message()))
    except RefusedError:
        return ok("access", f"{foreign} is refused, as it must be")
    hint = "right for a try on one machine alone; elsewhere give the broker the rules of `mailboat broker acl`"
    return warn("access", f"the broker has no access rules: even {foreign} may be written", hint)


def _probes(party: Party) -> tuple[str, str]:
    """A topic that we must be able to write and nobody minds, and one that we must not."""
    stranger = f"doctor-{secrets.token_hex(4)}"
    if party.site is None:
        mine = topic(party.federation, Channel.DOWN_CTL, stranger)
        return mine, topic(party.federation, Channel.UP_DATA, stranger)
    mine = topic(party.federation, Channel.UP_CTL, party.site)
    return mine, topic(party.federation, Channel.DOWN_DATA, stranger)


def _unknown_message() -> bytes:
    """A message of a type that nobody knows, which receivers skip."""
    body = msgpack.packb({"v": SCHEMA_VERSION, "t": "doctor"})
    packed: bytes = msgpack.packb({"b": body, "k": "", "s": b""}, use_bin_type=True)
    return packed


async def read_announcement(party: Party, protocol: str) -> Announce | None:
    """Return what the coordinator announced last; None when the broker holds no announcement."""
    async with _listening(party, protocol, (topic(party.federation, Channel.ANNOUNCE),)) as (_, inbox):
        return await _first(inbox, lambda message: message if isinstance(message, Announce) else None, RETAINED_S)


async def ask_clock(party: Party, protocol: str, plan: SealedPlan) -> Welcome | Refused | None:
    """Say hello in the site's name for a moment, and return the coordinator's answer; None when there is none.

    The answer carries the coordinator's clock. While the site itself runs, it keeps its name and we are refused.
    """
    assert party.site is not None
    session = new_session_id()
    hello = Hello(
        site=party.site,
        session=session,
        fingerprint=plan.fingerprint,
        config_sha256=plan.config_sha256,
        frozen_sha256=plan.frozen_sha256,
        software="mailboat doctor",
        clock=time.time(),
    )
    leaving = Presence(site=party.site, session=session, online=False)
    up = topic(party.federation, Channel.UP_CTL, party.site)
    away = topic(party.federation, Channel.PRESENCE, party.site)
    down = topic(party.federation, Channel.DOWN_CTL, party.site)
    async with _listening(party, protocol, (down,)) as (connection, inbox):
        await connection.post(Publication(up, encode(hello)))
        try:
            return await _first(inbox, lambda message: _answer(message, session), ANSWER_S)
        finally:
            await connection.post(Publication(away, encode(leaving)))


def _answer(message: Message, session: str) -> Welcome | Refused | None:
    return message if isinstance(message, Welcome | Refused) and message.session == session else None


@contextlib.asynccontextmanager
async def _listening(
    party: Party, protocol: str, topics: tuple[str, ...]
) -> AsyncIterator[tuple[Connection, asyncio.Queue[Message]]]:
    """A connection to the first endpoint that answers, and the messages that come in on `topics`."""
    inbox: asyncio.Queue[Message] = asyncio.Queue()

    def take(packet: Packet) -> bool:
        if packet.payload:
            with contextlib.suppress(RefusedError):
                inbox.put_nowait(decode(packet.payload))
        return False

    endpoints = parse_endpoints(party.broker.url)
    reached = [endpoint for endpoint in endpoints if await reachable((endpoint,))]
    endpoint = (reached or endpoints)[0]
    async with _connected(party, endpoint, protocol, take) as connection:
        await _subscribe(connection, endpoint, topics)
        yield connection, inbox


async def _first(inbox: asyncio.Queue[Message], wanted: Callable[[Message], M | None], patience_s: float) -> M | None:
    """The first message that `wanted` takes; None after `patience_s` seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            while True:
                if (found := wanted(await inbox.get())) is not None:
                    return found
    return None


@contextlib.asynccontextmanager
async def _connected(
    party: Party, endpoint: Endpoint, protocol: str, sink: Callable[[Packet], bool]
) -> AsyncIterator[Connection]:
    """One connection with exactly this protocol; MailboatError that says why there is none."""
    client_id = f"{party.federation}-{party.site or 'coordinator'}-{secrets.token_hex(4)}"
    options = LinkOptions(broker=party.broker, link=LinkSection(), client_id=client_id)
    shared = Shared(options, read_password(party.broker), Counters(), sink)
    version = next(version for version, name in PROTOCOL_NAMES.items() if name == protocol)
    try:
        async with asyncio.timeout(PATIENCE_S):
            tls = tls_context(party.broker) if endpoint.tls else None
            sock = await dial(endpoint, tls, dead_after_s=PATIENCE_S)
            connection = Connection(shared, sock, broker=str(endpoint), protocol=version)
            await connection.open()
    except ConnectRefusedError as refused:
        fatal = connect_refusal(refused.code, str(endpoint), client_id)
        raise fatal or RefusedError(f"{endpoint} refuses: {refused}", rule="unsupported-protocol") from None
    except ssl.SSLError as error:
        raise tls_refusal(error, str(endpoint)) or _silent(endpoint, protocol) from None
    except (HungUpError, LinkDownError, OSError) as error:
        raise _silent(endpoint, protocol) from error
    try:
        yield connection
    finally:
        await connection.close()


def _silent(endpoint: Endpoint, protocol: str) -> UnavailableError:
    return UnavailableError(f"{endpoint} does not answer over MQTT {protocol}", hint="is it an MQTT broker?")
