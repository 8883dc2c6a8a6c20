"""The guards of a sealed federation: every message signed, every body and chunk encrypted, nothing else accepted.

A message is looked at in this order, and the first thing that is wrong names the rule:

    shape        bad-envelope, unsigned
    sender       unknown-key (no member of this name, or with other keys), bad-signature
    standing     revoked, membership-expired
    clock        expired, from-the-future
    order        replayed, repeated
    encryption   unencrypted (not as the channel demands), undecipherable, unknown-federation-key
    content      bad-message, unknown-message, ...
    plan         other-fingerprint (but hello and refused pass: they are how such a difference is told)

Nothing is answered to what does not carry a member's signature, and what is answered to the rest says nothing about
ciphertexts. Presence is signed and not encrypted, and its order is not checked: the broker holds the last will of a
session from its start, and only ever has the power over presence that it has over the connection.
"""

from __future__ import annotations

import time
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from shared import durable
from shared.errors import ConfigError, RefusedError
from shared.manifest import Manifest
from shared.messages import Chunk, Head, Hello, Message, Offer, Presence, Refused, Welcome, decode_body, encode_body
from shared.topics import Channel, topic
from shared.trust import payload
from shared.trust.envelope import (
    CLEAR,
    PAIR,
    Content,
    FederationKey,
    Header,
    decrypt_own,
    encrypt_for,
    pack,
    parse,
    parse_content,
)
from shared.trust.guard import Changes, StaleKeyError, TurnedAwayError
from shared.trust.kit import Kit, Peers
from shared.trust.membership import Membership
from shared.trust.payload import STATE_DOMAIN, UPDATE_DOMAIN, Recent, cipher
from shared.trust.replay import Counter, Heard
from shared.trust.witness import bare_sha256, head_fits, signed_head, witness_fits, witnessed

CONTROL_S = 600
ANNOUNCE_S = 30 * 86_400
PRESENCE_S = 400 * 86_400
"""A last will is signed when a process starts and must still count when it ends."""
SKEW_S = 300
"""How far two clocks may be apart."""
KEPT_FEDERATION_KEYS = 2
"""At a site: the newest, and the one before for chunks that were on their way when it changed."""
KEPT_TRANSFERS = 16
"""Ciphers of transfers under way: for each site at the coordinator, in all at a site. One is in use at a time."""

ANSWERED = {"revoked", "membership-expired", "from-the-future"}
"""Why a hello is turned away with a word. A hello that is late is not: the broker could make one so by holding it back,
and the word ends the site's process."""

_LIFETIME_S = {Channel.ANNOUNCE: ANNOUNCE_S, Channel.PRESENCE: PRESENCE_S}
_LIST_TOPIC = "revocations"

log = structlog.get_logger("trust")


class SealedGuard:
    """What both ends have in common: own keys, the peers' memberships, counters."""

    def __init__(self, kit: Kit, *, fingerprint: str, folder: Path) -> None:
        """`folder` is this end's own, for the counters. ConfigError when the peers' files are not fit for use."""
        durable.make_folder(folder)
        self.kit = kit
        self._fingerprint = bytes.fromhex(fingerprint)
        self._counter = Counter(folder / "counter")
        self._heard = Heard(folder / "heard")
        self._stamp = kit.stamp()
        self.peers = self._fresh_peers()
        self._parting: dict[str, Membership] = {}

    # -- out ---

    def seal(self, message: Message, channel: Channel, site: str | None, now: float) -> bytes:
        """See Guard."""
        assert channel is not Channel.PRESENCE or isinstance(message, Presence)
        lifetime = _LIFETIME_S.get(channel, CONTROL_S)
        header = Header(
            topic=topic(self.kit.federation, channel, site),
            key_id=self.kit.member.key_id,
            counter=self._counter.next(now),
            expiry=int(now) + lifetime,
            fingerprint=self._fingerprint,
            encryption=self._encryption(channel),
        )
        content = Content(encode_body(message), self._grant(message)).to_bytes()
        return pack(header, self._encrypt(header, content, message, site), self.kit.sign_key)

    def _encrypt(self, header: Header, content: bytes, message: Message, site: str | None) -> bytes:
        if header.encryption == PAIR:
            return encrypt_for(self._receiver(message, site).box_key, header, content)
        return content

    def _encryption(self, channel: Channel) -> str:
        return CLEAR if channel is Channel.PRESENCE else PAIR

    def _grant(self, message: Message) -> bytes:
        raise NotImplementedError

    def _receiver(self, message: Message, site: str | None) -> Membership:
        raise NotImplementedError

    # -- in ---

    def open(self, data: bytes, channel: Channel, site: str | None, now: float) -> Message:
        """See Guard."""
        envelope = parse(data, topic(self.kit.federation, channel, site))
        header, sender = envelope.header, self._sender(site)
        if sender is None:
            raise RefusedError(f"the kit holds no membership of {site}: is its roster the newest?", rule="unknown-key")
        if sender.key_id != header.key_id:
            raise RefusedError(f"signed by key {header.key_id!a}, which is not the member's", rule="unknown-key")
        if not envelope.signed_by(sender.sign_key):
            raise RefusedError("a message whose signature does not fit", rule="bad-signature")
        objection = self.objection(sender, now) or _clock_objection(header, channel, sender, now)
        if objection is not None and channel is not Channel.UP_CTL:
            raise objection
        if channel is not Channel.PRESENCE:
            self._heard.check(header.topic, header.key_id, header.counter, retained=channel.retained)
        content = parse_content(self._decrypt(header, envelope.body, channel))
        if objection is None and channel is not Channel.PRESENCE:
            self._heard.take(header.topic, header.key_id, header.counter)
        message = decode_body(content.body)
        if objection is not None:
            if isinstance(message, Hello) and objection.rule in ANSWERED:
                raise TurnedAwayError(objection, message.session)
            raise objection
        if channel is Channel.PRESENCE and not isinstance(message, Presence):
            raise RefusedError(f"a {message.kind} in clear", rule="unencrypted")
        if header.fingerprint != self._fingerprint and not isinstance(message, Hello | Refused):
            raise RefusedError("a message about another plan of this federation", rule="other-fingerprint")
        self._take_grant(message, content.grant, site)
        return message

    def _decrypt(self, header: Header, body: bytes, channel: Channel) -> bytes:
        wanted = CLEAR if channel is Channel.PRESENCE else PAIR
        if header.encryption != wanted:
            raise RefusedError("a message that is not encrypted as its channel demands", rule="unencrypted")
        return body if wanted == CLEAR else decrypt_own(self.kit.box_key, header, body)

    def _sender(self, site: str | None) -> Membership | None:
        raise NotImplementedError

    def _take_grant(self, message: Message, grant: bytes, site: str | None) -> None:
        raise NotImplementedError

    # -- standing ---

    def objection(self, member: Membership, now: float) -> RefusedError | None:
        """Why a member may not speak now; None when it may."""
        if self.peers.revoked(member):
            return RefusedError(f"the membership of {member.name} was revoked", rule="revoked")
        if not member.valid_at(now):
            return RefusedError(
                f"the membership of {member.name} counts from {_utc(member.not_before)} to {_utc(member.not_after)}",
                rule="membership-expired",
            )
        return None

    def refresh(self, now: float) -> Changes:
        """See Guard; a list or file that cannot be used changes nothing, and is told in the log."""
        stamp = self.kit.stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self.peers = self._fresh_peers().keeping(self.peers)
            except ConfigError as error:
                log.warning("kept the memberships as they were", reason=error.message, hint=error.hint)
        return Changes()

    def save(self) -> None:
        """See Guard."""
        self._heard.save()

    def _fresh_peers(self) -> Peers:
        peers = self.kit.peers()
        number = peers.revocations.number
        if number < (known := self._heard.highest(_LIST_TOPIC, "")):
            raise ConfigError(
                f"{self.kit.folder / 'revocations'} is list {number}, list {known} was in force before",
                hint="copy the authority's newest list here; an older one would admit who was revoked",
            )
        self._heard.take(_LIST_TOPIC, "", number)
        for reason in peers.unreadable.values():
            log.warning("left out a membership", reason=reason)
        return peers


class CoordinatorGuard(SealedGuard):
    """Hears all sites; holds the federation key, which is drawn anew by each process and at each revocation."""

    def __init__(self, kit: Kit, *, fingerprint: str, folder: Path, now: float) -> None:
        super().__init__(kit, fingerprint=fingerprint, folder=folder)
        self._states = _States(FederationKey.new())
        self._updates: dict[str, Recent[ChaCha20Poly1305]] = {}
        self._standing = self._in_good_standing(now)

    def _encryption(self, channel: Channel) -> str:
        return self._states.key.encryption if channel is Channel.ANNOUNCE else super()._encryption(channel)

    def _encrypt(self, header: Header, content: bytes, message: Message, site: str | None) -> bytes:
        if header.encryption == self._states.key.encryption:
            return self._states.key.encrypt(header, content)
        return super()._encrypt(header, content, message, site)

    def _grant(self, message: Message) -> bytes:
        return self._states.key.key if isinstance(message, Welcome) else b""

    def _receiver(self, message: Message, site: str | None) -> Membership:
        name = site or ""
        member = self.peers.members.get(name)
        if member is not None and not self.peers.revoked(member):
            return member
        last_known = member or self._parting.get(name)
        if last_known is None or not isinstance(message, Refused):
            raise RefusedError(f"{name} is not a member, nothing but a refusal is said to it", rule="unknown-key")
        return last_known

    def _sender(self, site: str | None) -> Membership | None:
        return self.peers.members.get(site or "")

    def _take_grant(self, message: Message, grant: bytes, site: str | None) -> None:
        if isinstance(message, Offer):
            if not grant:
                raise RefusedError("an offer without its key", rule="bad-message")
            transfer_id = message.manifest.transfer_id
            kept = self._updates.setdefault(site or "", Recent(KEPT_TRANSFERS))
            kept.put(transfer_id, cipher(grant, UPDATE_DOMAIN, transfer_id))

    def members(self) -> frozenset[str]:
        """See Guard."""
        return frozenset(self.peers.members)

    def sign_head(self, version: int, seq: int, head: str) -> tuple[Head, bytes]:
        """See Guard."""
        at = (version, seq, head)
        return signed_head(self.kit.sign_key, self.kit.federation, self._fingerprint.hex(), at), self.kit.document

    def attest(self, manifest: Manifest) -> bytes:
        """See Guard."""
        site = manifest.update.site
        if manifest.witness is None:
            raise RefusedError("an update that its site has not signed", rule="no-witness")
        member = self.peers.members.get(site)
        if member is None or not witness_fits(member.sign_key, bare_sha256(manifest), manifest.witness):
            raise RefusedError(
                f"an update that {site} has not signed with the keys that it has now", rule="bad-witness"
            )
        return self.peers.documents[site]

    def seal_chunk(self, manifest: Manifest, index: int, frame: bytes) -> bytes:
        """See Guard; chunks of states."""
        return payload.seal_chunk(self._states.cipher(manifest), manifest, index, frame)

    def open_chunk(self, manifest: Manifest, chunk: Chunk) -> bytes:
        """See Guard; chunks of updates."""
        kept = self._updates.get(manifest.update.site)
        by = kept.get(manifest.transfer_id) if kept else None
        frame = payload.open_chunk(by, manifest, chunk) if by else None
        if frame is None:
            raise _bad_seal()
        return frame

    def refresh(self, now: float) -> Changes:
        """See Guard."""
        number, before = self.peers.revocations.number, self.peers.members
        super().refresh(now)
        standing = self._in_good_standing(now)
        lost = tuple((name, self._why_lost(name, before[name], now)) for name in sorted(self._standing - standing))
        self._parting |= {name: before[name] for name, _why in lost}
        self._standing = standing
        rekeyed = bool(lost) or self.peers.revocations.number > number
        if rekeyed:
            self._states = _States(FederationKey.new())
        return Changes(lost, rekeyed)

    def _in_good_standing(self, now: float) -> frozenset[str]:
        return frozenset(name for name, member in self.peers.members.items() if self.objection(member, now) is None)

    def _why_lost(self, name: str, last_known: Membership, now: float) -> RefusedError:
        why = self.objection(self.peers.members.get(name, last_known), now)
        return why or RefusedError(f"the membership of {name} was taken off the roster", rule="revoked")


class SiteGuard(SealedGuard):
    """Hears the coordinator alone; draws a key for each of its updates."""

    def __init__(self, kit: Kit, *, fingerprint: str, folder: Path) -> None:
        super().__init__(kit, fingerprint=fingerprint, folder=folder)
        self._states: tuple[_States, ...] = ()
        self._updates: Recent[bytes] = Recent(KEPT_TRANSFERS)

    def _grant(self, message: Message) -> bytes:
        return self._update_key(message.manifest.transfer_id) if isinstance(message, Offer) else b""

    def _update_key(self, transfer_id: str) -> bytes:
        return self._updates.get_or_make(transfer_id, lambda: FederationKey.new().key)

    def _receiver(self, message: Message, site: str | None) -> Membership:
        return self._coordinator

    def _sender(self, site: str | None) -> Membership | None:
        return self._coordinator

    @property
    def _coordinator(self) -> Membership:
        (member,) = self.peers.members.values()
        return member

    def _decrypt(self, header: Header, body: bytes, channel: Channel) -> bytes:
        if channel is not Channel.ANNOUNCE:
            return super()._decrypt(header, body, channel)
        if not header.encryption.startswith("fed:"):
            raise RefusedError("an announcement that is not encrypted for the federation", rule="unencrypted")
        for states in self._states:
            if states.key.encryption == header.encryption:
                return states.key.decrypt(header, body)
        raise StaleKeyError(
            "an announcement under a federation key that is not here yet", rule="unknown-federation-key"
        )

    def _take_grant(self, message: Message, grant: bytes, site: str | None) -> None:
        if not isinstance(message, Welcome):
            return
        if not grant:
            raise RefusedError("a welcome without the federation key", rule="bad-message")
        if not self._states or self._states[0].key.key != grant:
            self._states = (_States(FederationKey(grant)), *self._states)[:KEPT_FEDERATION_KEYS]

    def check_head(self, head: Head) -> None:
        """See Guard."""
        if not head_fits(self._coordinator.sign_key, self.kit.federation, self._fingerprint.hex(), head):
            raise RefusedError("a head of the audit chain that the coordinator has not signed", rule="bad-head")

    def witnessed(self, manifest: Manifest, head: Head | None) -> Manifest:
        """See Guard."""
        return witnessed(self.kit.sign_key, manifest, head)

    def seal_chunk(self, manifest: Manifest, index: int, frame: bytes) -> bytes:
        """See Guard; chunks of updates."""
        by = cipher(self._update_key(manifest.transfer_id), UPDATE_DOMAIN, manifest.transfer_id)
        return payload.seal_chunk(by, manifest, index, frame)

    def open_chunk(self, manifest: Manifest, chunk: Chunk) -> bytes:
        """See Guard; chunks of states."""
        for states in self._states:
            frame = payload.open_chunk(states.cipher(manifest), manifest, chunk)
            if frame is not None:
                return frame
        raise _bad_seal()


class _States:
    """A federation key and the ciphers of the states under it."""

    def __init__(self, key: FederationKey) -> None:
        self.key = key
        self._ciphers: Recent[ChaCha20Poly1305] = Recent(KEPT_TRANSFERS)

    def cipher(self, manifest: Manifest) -> ChaCha20Poly1305:
        """The cipher of one state's chunks."""
        name = manifest.transfer_id
        return self._ciphers.get_or_make(name, lambda: cipher(self.key.key, STATE_DOMAIN, name))


def _clock_objection(header: Header, channel: Channel, sender: Membership, now: float) -> RefusedError | None:
    lifetime = _LIFETIME_S.get(channel, CONTROL_S)
    clocks = f"{sender.name}'s clock said {_utc(header.expiry - lifetime)}, this one says {_utc(now)}"
    if header.expiry < now - SKEW_S:
        return RefusedError(f"a message past its time: {clocks}", rule="expired")
    if header.expiry > now + lifetime + SKEW_S:
        return RefusedError(f"a message from the future: {clocks}", rule="from-the-future")
    return None


def _bad_seal() -> RefusedError:
    return RefusedError("a chunk that was not sealed for this transfer and place", rule="bad-seal")


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(min(max(at, 0), 253_402_300_799))) + " UTC"
