"""Whether a broker keeps its promises, seen by trying to break them with the certificates of real members.

Two sites (and the coordinator, where its certificate is here) connect as themselves and try what must not work:

    read         what is on the other's topics, by name and through `#`
    write        on the other's topics, and on those that the coordinator alone writes
    client id    take over the other's connection by dialling in under its client id
    certificate  speak without one, or with one that was revoked

Silence proves nothing on a link that is dead, so each trial ends with a message that must arrive on that very link. Who
listens: the coordinator for what sites write, and each site for what is said to it. Without the coordinator's
certificate a site cannot be spoken to, and silence is waited for instead, which the finding says.

While it runs, the members' own processes lose their connections: the broker allows one for each name.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from mailboat.doctor.finding import Finding, fail, ok, warn
from mailboat.doctor.network import Party
from shared.config import BrokerSection, LinkSection
from shared.errors import MailboatError, RefusedError
from shared.link import Connected, Disconnected, Link, LinkOptions, Packet
from shared.topics import Channel, topic

PATIENCE_S = 30.0
SILENCE_S = 2.0
"""How long nothing must come where no last message can be sent."""

_ACCESS_HINT = "give the broker the rules of `mailboat provision` (acl_file) and let it read them again"
_PATIENT = LinkSection(stall_s=5.0)


@dataclass(slots=True)
class Member:
    """One who is connected as itself: what came in since, and whether its connection was cut."""

    party: Party
    link: Link
    protocol: str = ""
    heard: list[bytes] = field(default_factory=list)
    cut: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)
    up: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        """How the broker knows it."""
        return self.party.site or "coordinator"

    async def listen(self) -> None:
        """Take down what comes in; raises what ends the link."""
        async for event in self.link.events():
            match event:
                case Connected():
                    self.protocol = event.protocol
                    self.up.set()
                case Disconnected():
                    self.cut = True
                    self.up.clear()
                case Packet():
                    self.heard.append(event.payload)
            self.news.set()

    async def until(self, payload: bytes) -> None:
        """Return when this has come in; TimeoutError when it does not."""
        async with asyncio.timeout(PATIENCE_S):
            while payload not in self.heard:
                self.news.clear()
                await self.news.wait()


async def check(parties: Sequence[Party], revoked: BrokerSection | None) -> list[Finding]:
    """Try everything between these parties, two sites at least, and return what came of it."""
    findings: list[Finding] = []
    sites = [party for party in parties if party.site is not None]
    assert len(sites) > 1, "the command asks for two sites"
    findings += await _without(sites[0], revoked)
    try:
        async with contextlib.AsyncExitStack() as stack:
            members = [await stack.enter_async_context(_connected(party)) for party in parties]
            coordinator = next((member for member in members if member.party.site is None), None)
            present = [member for member in members if member.party.site is not None]
            findings += [ok("broker", f"{member.name} is let in with its certificate") for member in members]
            for intruder, victim in zip(present, [*present[1:], present[0]], strict=True):
                findings += await _between(intruder, victim, coordinator)
    except MailboatError as error:
        findings.append(fail("broker", error))
    except TimeoutError:
        text = "a message that is allowed did not arrive: nothing can be said about those that are not"
        findings.append(fail("broker", RefusedError(text, rule="no-answer", hint=_ACCESS_HINT)))
    return findings


async def _between(intruder: Member, victim: Member, coordinator: Member | None) -> list[Finding]:
    findings = [await _read(intruder, victim, coordinator)]
    findings += await _write(intruder, victim, coordinator)
    findings.append(await _take_over(intruder, victim))
    return findings


async def _read(intruder: Member, victim: Member, coordinator: Member | None) -> Finding:
    """What the victim and the coordinator say on the victim's topics does not reach the intruder, who asked for it."""
    secret, last = _marker(), _marker()
    what = f"{intruder.name} cannot read what is {victim.name}'s"
    federation = victim.party.federation
    await victim.link.publish(topic(federation, Channel.UP_CTL, victim.party.site), secret)
    if coordinator is None:
        await asyncio.sleep(SILENCE_S)
    else:
        for channel in (Channel.DOWN_CTL, Channel.DOWN_DATA):
            await coordinator.link.publish(topic(federation, channel, victim.party.site), secret)
        await coordinator.link.publish(topic(federation, Channel.DOWN_CTL, intruder.party.site), last)
        await intruder.until(last)
    if secret in intruder.heard:
        return _broken("read", f"{intruder.name} reads what is {victim.name}'s")
    if coordinator is None:
        return ok("read", f"{what}: it heard nothing for {SILENCE_S:g} s, and nobody is here who could speak to it")
    return ok("read", what)


async def _write(intruder: Member, victim: Member, coordinator: Member | None) -> list[Finding]:
    """Publishing under the victim's or the coordinator's name is refused, or at least reaches nobody."""
    federation, findings = victim.party.federation, []
    forged, last = _marker(), _marker()
    targets = [topic(federation, channel, victim.party.site) for channel in Channel if channel.per_site]
    targets += [topic(federation, channel) for channel in (Channel.ANNOUNCE, Channel.BULK)]
    unanswered = []
    for target in targets:
        try:
            await intruder.link.publish(target, forged)
        except RefusedError:
            findings.append(ok("write", f"{intruder.name} is refused on {target}"))
        else:
            unanswered.append(target)
    if coordinator is not None:
        await intruder.link.publish(topic(federation, Channel.UP_CTL, intruder.party.site), last)
        await coordinator.until(last)
        arrived = forged in (*coordinator.heard, *victim.heard)
        if arrived:
            findings.append(_broken("write", f"{intruder.name} can write in the name of {victim.name} or coordinator"))
        elif unanswered:
            text = f"{intruder.name} gets no refusal on {len(unanswered)} topics, and reaches nobody there"
            findings.append(ok("write", text))
    elif unanswered and intruder.protocol == "5":
        findings.append(_broken("write", f"{intruder.name} may write on {unanswered[0]}"))
    elif unanswered:
        text = f"MQTT 3.1.1 has no refusals, and the coordinator's certificate is not here to listen for {victim.name}"
        findings.append(warn("write", text, "name coordinator.toml as well"))
    return findings


async def _take_over(intruder: Member, victim: Member) -> Finding:
    """Dialling in under the victim's client id cuts off nobody but the intruder's own connection."""
    victim.cut = False
    async with Link(LinkOptions(intruder.party.broker, _PATIENT, victim.name, give_up_s=PATIENCE_S)) as thief:
        event = await anext(thief.events())
        assert isinstance(event, Connected)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SILENCE_S):
                while not victim.cut:
                    victim.news.clear()
                    await victim.news.wait()
    async with asyncio.timeout(PATIENCE_S):  # whoever was cut off comes back by itself
        await asyncio.gather(intruder.up.wait(), victim.up.wait())
    if victim.cut:
        return _broken("client id", f"{intruder.name} takes over the connection of {victim.name} by its client id")
    return ok("client id", f"{intruder.name} cannot use the client id of {victim.name}")


async def _without(party: Party, revoked: BrokerSection | None) -> list[Finding]:
    """No certificate, and a revoked one, end at the handshake."""
    bare = party.broker.model_copy(update={"cert_file": None, "key_file": None, "username": None})
    trials = [("without a certificate", bare)]
    if revoked is not None:
        trials.append(("with the revoked certificate", revoked))
    findings = []
    for how, section in trials:
        try:
            async with asyncio.timeout(PATIENCE_S), Link(LinkOptions(section, _PATIENT, "mailboat-check")) as link:
                await anext(link.events())
        except RefusedError as error:
            findings.append(ok("certificate", f"nobody enters {how}: {error.message}"))
        except (MailboatError, TimeoutError) as error:
            text = f"whether anybody enters {how} could not be tried: {str(error) or 'no answer'}"
            findings.append(warn("certificate", text, "look at the broker's log"))
        else:
            findings.append(_broken("certificate", f"the broker lets in who comes {how}"))
    if revoked is None:
        hint = "name the kit of a revoked site, or one made to be revoked: --revoked KIT"
        findings.append(warn("certificate", "a revoked certificate was not tried", hint))
    return findings


@contextlib.asynccontextmanager
async def _connected(party: Party) -> AsyncIterator[Member]:
    """One member, connected as itself and listening to all that it may and may not hear."""
    options = LinkOptions(party.broker, _PATIENT, party.site or "coordinator", ("#",), give_up_s=PATIENCE_S)
    async with Link(options) as link:
        member = Member(party, link)
        listening = asyncio.create_task(member.listen())
        try:
            standing = asyncio.create_task(member.up.wait())
            await asyncio.wait({listening, standing}, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
            standing.cancel()
            if listening.done():
                listening.result()
            if not member.up.is_set():
                raise TimeoutError
            yield member
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, MailboatError):
                await listening


def _broken(what: str, text: str) -> Finding:
    return fail(what, RefusedError(text, rule="broker-open", hint=_ACCESS_HINT))


def _marker() -> bytes:
    """Bytes that nobody else sends, and that no receiver takes for a message."""
    return b"mailboat broker check " + secrets.token_hex(8).encode()
