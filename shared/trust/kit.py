"""The kit: one machine's folder of keys and memberships, and the modes that keep others out.

    sign.key  box.key  tls.key    private: Ed25519, X25519, P-256 (PKCS8 PEM); made here, never leave
    tls.crt   ca.crt              the broker's business (one CA, or two during a roll-over)
    member                        our own membership
    authority.pub                 the authority's Ed25519 public key, PEM; two during a roll-over
    coordinator.member            at a site: whom to believe
    roster/<site>.member          at the coordinator: whom to admit
    grants/<site>.grant           at the coordinator: what to hand to that site when it has an older one
    revocations                   which serials no longer count; may be absent as long as none was revoked
    endorsements                  at the coordinator, for auditors: what earlier keys of the authority have signed

The folder is 0700 and every file 0600; anything wider is refused, because a key that others could read is no key.
The authority's keys, the others' memberships and the list are read again when they change (`Kit.peers`); what is our
own, keys and membership, only at the start.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from shared import durable
from shared.errors import ConfigError, RefusedError
from shared.topics import Role
from shared.trust.membership import Membership, Revocations, verify_membership, verify_revocations

SIGN_KEY = "sign.key"
BOX_KEY = "box.key"
TLS_KEY = "tls.key"
TLS_CERT = "tls.crt"
CA_CERT = "ca.crt"
MEMBER = "member"
AUTHORITY = "authority.pub"
COORDINATOR = "coordinator.member"
ROSTER = "roster"
GRANTS = "grants"
REVOCATIONS = "revocations"
ENDORSEMENTS = "endorsements"
MEMBER_SUFFIX = ".member"

FILE_MODE = 0o600
FOLDER_MODE = 0o700
AUTHORITIES_MAX = 3
"""Two during a roll-over; a third where the next one finds it interrupted."""
_RESTORE = "restore it from the kit's backup"
_PEM_END = "-----END PUBLIC KEY-----"

PrivateKey = Ed25519PrivateKey | X25519PrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """The public halves that a membership names: 32 raw bytes each."""

    sign: bytes
    box: bytes


@dataclass(frozen=True, slots=True)
class Peers:
    """Whom this machine believes: by site name at the coordinator, the coordinator alone at a site.

    `unreadable` are files that were left out, by the name of their member, each with its reason; the others count all
    the same, so that one broken file does not stop a federation.
    """

    members: dict[str, Membership]
    revocations: Revocations
    unreadable: dict[str, str] = field(default_factory=dict)
    documents: dict[str, bytes] = field(default_factory=dict)
    """The memberships as the authority signed them."""

    def keeping(self, before: Peers) -> Peers:
        """The same with the memberships from before for files that are there and cannot be read now.

        A file that is being copied is torn for a moment, and nobody loses a membership by that.
        """
        kept = [name for name in self.unreadable if name in before.members]
        members = {name: before.members[name] for name in kept}
        documents = {name: before.documents[name] for name in kept}
        return replace(self, members=self.members | members, documents=self.documents | documents)

    def revoked(self, membership: Membership) -> bool:
        """Whether the list names this membership's serial."""
        return membership.serial in self.revocations.revoked


@dataclass(frozen=True, slots=True)
class Kit:
    """A loaded kit. The private keys are the library's objects, whose repr shows nothing."""

    folder: Path
    role: Role
    sign_key: Ed25519PrivateKey
    box_key: X25519PrivateKey
    member: Membership
    document: bytes
    """The membership as the authority signed it."""

    @property
    def federation(self) -> str:
        """Name of the federation that this kit is for."""
        return self.member.federation

    def peers(self) -> Peers:
        """Read the memberships of the others and the revocation list.

        ConfigError when the authority's keys cannot be read, when there is no readable coordinator.member (at a site),
        or when the list is there and not what the authority signed: who believes a broken list believes those whom it
        names.
        """
        return read_peers(self.folder, self.role, self.federation)

    def stamp(self) -> tuple[tuple[str, int, int, int], ...]:
        """Name, inode, time and size of all that `peers` reads: another value means that something changed."""
        found = []
        shared = (self.folder / AUTHORITY, self.folder / REVOCATIONS)
        for path in [*shared, *_member_files(self.folder, self.role)]:
            try:
                seen = path.stat()
            except FileNotFoundError:
                continue  # there a moment ago, or not yet
            found.append((path.name, seen.st_ino, seen.st_mtime_ns, seen.st_size))
        return tuple(found)


# -- making ---


def generate_keys(folder: Path) -> PublicKeys:
    """Make sign.key, box.key and tls.key in `folder` (created 0700) and return the public halves of the first two.

    Keys that are there are never replaced: ConfigError.
    """
    make_private_folder(folder)
    keys: dict[str, PrivateKey] = {
        SIGN_KEY: Ed25519PrivateKey.generate(),
        BOX_KEY: X25519PrivateKey.generate(),
        TLS_KEY: ec.generate_private_key(ec.SECP256R1()),
    }
    for name in keys:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} is there already", hint="a kit's keys are made once; take a new folder")
    for name, key in keys.items():
        write_private(folder / name, private_pem(key))
    return public_keys(folder)


def generate_authority(path: Path) -> Ed25519PrivateKey:
    """Make the authority's key and write it to `path` (0600, PKCS8 PEM); ConfigError when a file is there."""
    if path.exists():
        raise ConfigError(f"{path} is there already", hint="an authority is never replaced; roll over to a new file")
    key = Ed25519PrivateKey.generate()
    write_private(path, private_pem(key))
    return key


def make_private_folder(folder: Path) -> None:
    """Create a folder of mode 0700, or check that the one that is there has no wider mode; ConfigError if it has."""
    if not folder.exists():
        durable.make_folder(folder)
        folder.chmod(FOLDER_MODE)
    check_private(folder)


def write_private(path: Path, data: bytes) -> None:
    """Write a file durably and whole, mode 0600, in the place of any that is there."""
    durable.replace_atomic(path, data)  # its temporary files are made 0600


def private_pem(key: PrivateKey) -> bytes:
    """PKCS8 PEM without a passphrase: the file's mode protects it, because a service starts without a person."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def authority_pem(publics: Iterable[bytes]) -> bytes:
    """What `authority.pub` holds: the public keys (32 raw bytes each), one PEM block after the other."""
    keys = (Ed25519PublicKey.from_public_bytes(public) for public in publics)
    return b"".join(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in keys)


# -- reading ---


def load_kit(folder: Path, *, role: Role, federation: str, now: float) -> Kit:
    """Read a kit and check that it is whole and ours: modes, keys, authority, own membership and its dates.

    `now` is unix seconds. ConfigError names the file and what is wrong with it. The peers are read by `Kit.peers`.
    """
    check_kit_modes(folder)
    publics, authorities = public_keys(folder), load_authorities(folder / AUTHORITY)
    path = folder / MEMBER
    try:
        document = read_private(path)
        member = verify_membership(document, authorities, federation=federation)
    except RefusedError as error:
        raise ConfigError(
            f"{path}: {error.message}", hint="ask the federation's authority for this kit's file"
        ) from None
    if (member.sign_key, member.box_key) != (publics.sign, publics.box):
        raise ConfigError(f"{path} names other keys than the ones beside it", hint="each kit has its own member file")
    if member.role != role:
        raise ConfigError(f"{path} is the membership of a {member.role}, this is a {role}", hint="check [trust] kit")
    if not member.valid_at(now):
        raise ConfigError(
            f"{path} is valid from {member.not_before} to {member.not_after} (unix seconds), it is {now:.0f} now",
            hint="renew the membership, or set this machine's clock",
        )
    sign_key, box_key = _load_sign_key(folder / SIGN_KEY), _load_box_key(folder / BOX_KEY)
    return Kit(folder, role, sign_key, box_key, member, document)


def read_peers(folder: Path, role: Role, federation: str) -> Peers:
    """See `Kit.peers`; for whoever has no kit loaded."""
    authorities = load_authorities(folder / AUTHORITY)
    revocations = _load_revocations(folder / REVOCATIONS, authorities, federation)
    wanted: Role = "site" if role == "coordinator" else "coordinator"
    members: dict[str, Membership] = {}
    documents: dict[str, bytes] = {}
    unreadable: dict[str, str] = {}
    for path in _member_files(folder, role):
        try:
            document = read_private(path)
            member = verify_membership(document, authorities, federation=federation)
            if member.role != wanted:
                raise RefusedError(f"the membership of a {member.role}", rule="other-role")
            if role == "coordinator" and f"{member.name}{MEMBER_SUFFIX}" != path.name:
                raise RefusedError(f"the membership of {member.name}", rule="other-name")
        except RefusedError as error:
            unreadable[path.stem] = f"{path}: {error.message} (rule {error.rule})"
        except ConfigError as error:
            unreadable[path.stem] = error.message
        else:
            members[member.name], documents[member.name] = member, document
    if role == "site" and not members:
        raise ConfigError(
            next(iter(unreadable.values()), f"{folder / COORDINATOR}: no such file"),
            hint="the authority's kit for this site holds it",
        )
    return Peers(members, revocations, unreadable, documents)


def load_authority(path: Path) -> Ed25519PrivateKey:
    """Read the authority's private key; ConfigError for another kind of file or too wide a mode."""
    return _load_sign_key(path)


def load_authorities(path: Path) -> tuple[bytes, ...]:
    """The keys of a kit's `authority.pub`; ConfigError as `parse_authorities`, and for too wide a mode."""
    return parse_authorities(read_private(path), path)


def parse_authorities(data: bytes, path: Path) -> tuple[bytes, ...]:
    """The public keys (32 raw bytes each) in PEM; ConfigError, naming `path`, for anything else."""
    hint = "it holds the authority's Ed25519 public key as PEM, or two during a roll-over"
    try:
        text = data.decode("ascii")
        blocks = [block + _PEM_END for block in text.split(_PEM_END) if block.strip()]
        keys = [load_pem_public_key(block.strip().encode()) for block in blocks]
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is not a file of public keys", hint=hint) from None
    raw = tuple(key.public_bytes_raw() for key in keys if isinstance(key, Ed25519PublicKey))
    if len(raw) != len(keys) or not 1 <= len(raw) <= AUTHORITIES_MAX:
        raise ConfigError(f"{path} does not hold one to {AUTHORITIES_MAX} Ed25519 keys", hint=hint)
    return raw


def public_keys(folder: Path) -> PublicKeys:
    """The public halves of the kit's signing and box keys; ConfigError when they cannot be read."""
    sign_key = _load_sign_key(folder / SIGN_KEY)
    box_key = _load_box_key(folder / BOX_KEY)
    return PublicKeys(sign_key.public_key().public_bytes_raw(), box_key.public_key().public_bytes_raw())


def tls_point(folder: Path) -> bytes:
    """The public half of the kit's TLS key, as `point`; ConfigError when it cannot be read or is of another kind."""
    key = _load_private(folder / TLS_KEY)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{folder / TLS_KEY} holds no P-256 key", hint=_RESTORE)
    return point(key.public_key())


def point(key: ec.EllipticCurvePublicKey) -> bytes:
    """A P-256 public key as 65 raw bytes (uncompressed point)."""
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def check_kit_modes(folder: Path) -> None:
    """ConfigError unless the folder is 0700 and everything in it 0600 (folders 0700), or narrower."""
    check_private(folder)
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            check_private(Path(parent) / name)


def check_private(path: Path) -> None:
    """ConfigError when a file or folder is missing, a link, or open to group or others."""
    try:
        seen = path.lstat()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file or folder", hint="`[trust] kit` names the kit's folder") from None
    if stat.S_ISLNK(seen.st_mode):
        raise ConfigError(f"{path} is a link", hint="a kit holds its files itself, so that their modes are its own")
    mode, right = stat.S_IMODE(seen.st_mode), FOLDER_MODE if stat.S_ISDIR(seen.st_mode) else FILE_MODE
    if mode & ~right:
        raise ConfigError(
            f"{path} has mode {mode:04o}, others than its owner may use it", hint=f"chmod {right:04o} {path}"
        )


def read_private(path: Path) -> bytes:
    """Read a file after `check_private`; ConfigError when it cannot be read by this user."""
    check_private(path)
    try:
        return path.read_bytes()
    except (PermissionError, IsADirectoryError):
        raise ConfigError(f"{path} cannot be read by this user", hint="check the file's owner") from None


def _load_sign_key(path: Path) -> Ed25519PrivateKey:
    key = _load_private(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds no Ed25519 key", hint=_RESTORE)
    return key


def _load_box_key(path: Path) -> X25519PrivateKey:
    key = _load_private(path)
    if not isinstance(key, X25519PrivateKey):
        raise ConfigError(f"{path} holds no X25519 key", hint=_RESTORE)
    return key


def _load_private(path: Path) -> PrivateKeyTypes:
    try:
        return load_pem_private_key(read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is not a private key in PEM", hint=_RESTORE) from None


def _load_revocations(path: Path, authorities: tuple[bytes, ...], federation: str) -> Revocations:
    if not path.exists():
        return Revocations(federation=federation, number=0)
    try:
        return verify_revocations(read_private(path), authorities, federation=federation)
    except RefusedError as error:
        raise ConfigError(f"{path}: {error.message}", hint="copy the authority's list again") from None


def _member_files(folder: Path, role: Role) -> list[Path]:
    if role == "site":
        path = folder / COORDINATOR
        return [path] if path.exists() else []
    return sorted((folder / ROSTER).glob(f"*{MEMBER_SUFFIX}"))
