"""Check a bundle of Mailboat's evidence with Python 3.11, msgpack, zstandard and blake3, and with nothing of Mailboat.

A sealed run is signed; to check that, the package cryptography is needed as well.

    python verify.py [FOLDER]      FOLDER is where the bundle was unpacked; by default where this script lies

It prints what it looked at and each thing that is wrong, and ends with status 0 or 3. What it checks:

1. each file has the SHA-256 that SHA256SUMS lists, and no file is unlisted
2. the rows of journal.jsonl are chained: hash = SHA-256(previous hash | seq, 8 bytes big-endian | kind | 0x00 | body)
3. plan.json, federation.json and version 0 have the digests that row 1 names
4. each update was decided once and counted at most once, and versions follow each other without a gap
5. where versions travel as steps, each step starts from the state that the step before it made, by its BLAKE3
6. each update starts from the state that was published as the version which it names, by its BLAKE3
7. each update has the manifest that was accepted, and each of its frames the length and the BLAKE3 in that manifest;
   unpacked and put together, the frames are the file whose BLAKE3 was accepted; where a row says that the bytes of
   updates were given up, the manifest is looked at
8. each signature of the coordinator over a row's hash, and of a site over its update and the last such hash that it had
   seen, fits a key whose membership is signed by a key in authority.pub, or is listed in endorsements, which such a key
   has signed, and that row has that hash now

A sound chain shows that no row was changed by itself. That all rows were not written anew is shown by the signatures of
the sites, if authority.pub has the fingerprint that you know, and else by comparing a hash with one that somebody else
kept: the receipts that the sites hold, or the last row's hash, noted earlier.

A frame is one zstd frame of one slice of the file. In a slice the bytes stand grouped: first byte 0 of each element of
`group` bytes, then byte 1, and so on; bytes that fill no element come last.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import zstandard
from blake3 import blake3

GENESIS = bytes(32)
FRAME_BYTES_MAX = 900_000
SLICE_BYTES_MAX = 768 * 1024
UNREADABLE = (
    ImportError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    msgpack.UnpackException,
    zstandard.ZstdError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What reading a spoilt bundle raises."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sums(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the files as such."""
    listed = {}
    for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    yield from (f"{name}: not listed in SHA256SUMS" for name in sorted(there - listed.keys()))
    for name, digest in sorted(listed.items()):
        if name not in there:
            yield f"{name}: gone"
        elif file_sha256(folder / name) != digest:
            yield f"{name}: not the bytes that SHA256SUMS lists"


def check_chain(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what is wrong with the order and the hashes of the rows."""
    seq, previous = 0, GENESIS.hex()
    for line in lines:
        body = base64.b64decode(line["body"], validate=True)
        parts = (bytes.fromhex(line["prev"]), line["seq"].to_bytes(8, "big"), line["kind"].encode(), b"\0", body)
        if line["seq"] != seq + 1 or line["prev"] != previous:
            yield f"journal.jsonl: row {line['seq']} does not follow the row before it"
        if hashlib.sha256(b"".join(parts)).hexdigest() != line["hash"]:
            yield f"journal.jsonl: row {line['seq']} was changed after it was written"
        if record_of(line)["t"] != line["kind"]:
            yield f"journal.jsonl: row {line['seq']} names another kind than its body"
        seq, previous = line["seq"], line["hash"]


def record_of(line: dict[str, Any]) -> dict[str, Any]:
    """What a row says: its fields, with `t` for its kind."""
    record: dict[str, Any] = msgpack.unpackb(base64.b64decode(line["body"]), raw=False)
    return record


def check_opened(folder: Path, opened: dict[str, Any]) -> Iterator[str]:
    """Yield which of the files that row 1 names are others."""
    master = "masters/v00000000.safetensors"
    found = {
        "plan.json": (file_sha256(folder / "plan.json"), opened["fingerprint"]),
        "federation.json": (file_sha256(folder / "federation.json"), opened["config_sha256"]),
        master: (blake3().update_mmap(folder / master).hexdigest(), opened["master_digest"]),
    }
    for name, (here, named) in found.items():
        if here != named:
            yield f"{name}: not the file that row 1 names"


def check_counting(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield each update that counts other than once, and each gap between versions."""
    decided, waiting, version = set[str](), set[str](), 0
    for row, record in enumerate(records, start=1):
        place = f"journal.jsonl: row {row}"
        if (record["t"] == "opened") != (row == 1):
            yield f"{place}: the run is opened by row 1, and by no other"
        if record["t"] in {"accepted", "rejected"}:
            if record["update_id"] in decided:
                yield f"{place}: update {record['update_id']} was decided before"
            decided.add(record["update_id"])
        if record["t"] == "accepted":
            waiting.add(record["update_id"])
        used = [part["update_id"] for part in record.get("contributions", ())]
        used += [record["update_id"]] if record["t"] == "dropped" else []
        for update_id in used:
            if update_id not in waiting:
                yield f"{place}: update {update_id} was never accepted, or has counted already"
            waiting.discard(update_id)
        if record["t"] == "committed":
            if record["version"] != version + 1:
                yield f"{place}: version {record['version']} follows version {version}"
            version = record["version"]


def check_states(records: list[dict[str, Any]], states: list[str]) -> Iterator[str]:
    """Yield each version that is no step from the one before; `states` takes the BLAKE3 of the states, by version."""
    for row, record in enumerate(records, start=1):
        if record["t"] not in {"opened", "committed", "anchored"}:
            continue
        manifest = msgpack.unpackb(record["state"], raw=False)
        facts, place = manifest["facts"], f"journal.jsonl: row {row}"
        made = facts.get("state_digest", manifest["file_digest"])
        if record["t"] == "anchored":
            if made != states[record["version"]]:
                yield f"{place}: another state than was published as version {record['version']}"
            continue
        if "base_digest" in facts and facts["base_digest"] != states[-1]:
            yield f"{place}: its step does not start from the state of the version before"
        states.append(made)


def given_up(records: list[dict[str, Any]], rule: str) -> set[str]:
    """Updates whose bytes are not kept: all merged up to a version that a row names; by ca2fl not each site's last."""
    upto = max((record["version"] for record in records if record["t"] == "pruned"), default=0)
    merged = [
        (part["site"], record["version"], -part["staleness"], part["update_id"])
        for record in records
        if record["t"] == "committed" and record["version"] <= upto
        for part in record["contributions"]
    ]
    last = {site: update_id for site, _version, _staleness, update_id in sorted(merged)}
    return {update_id for *_, update_id in merged} - set(last.values() if rule == "ca2fl" else ())


def check_update(folder: Path, record: dict[str, Any], states: list[str], gone: set[str]) -> Iterator[str]:
    """Yield what is wrong with one accepted update and its bytes; of one that is `gone`, with its manifest.

    `states` are the BLAKE3 of the states, by version.
    """
    name = f"updates/{record['update_id']}"
    raw = (folder / f"{name}.manifest").read_bytes()
    if hashlib.sha256(raw).hexdigest() != record["manifest_sha256"]:
        yield f"{name}.manifest: not the manifest that was accepted"
        return
    manifest = msgpack.unpackb(raw, raw=False)
    facts = manifest["facts"]
    said = (manifest["transfer_id"], facts["site"], facts["base_version"], facts["examples"], manifest["file_digest"])
    if said != tuple(record[key] for key in ("update_id", "site", "base_version", "examples", "file_digest")):
        yield f"{name}.manifest: it says otherwise than the row that accepted it"
    if facts["base_digest"] != dict(enumerate(states)).get(facts["base_version"]):
        yield f"{name}.manifest: it starts from a state that was never published"
    if record["update_id"] in gone and not (folder / f"{name}.frames").exists():
        return
    damaged, whole = False, blake3()
    with (folder / f"{name}.frames").open("rb") as frames:
        for index, length in enumerate(manifest["frame_lengths"]):
            frame = frames.read(min(length, FRAME_BYTES_MAX))
            if blake3(frame).digest() != manifest["frame_hashes"][32 * index : 32 * index + 32]:
                yield f"{name}.frames: frame {index} is not what the site sent"
                damaged = True
            elif not damaged:
                left = manifest["file_size"] - index * manifest["slice_size"]
                whole.update(expand(frame, min(manifest["slice_size"], left), manifest["group"]))
        if frames.read(1):
            yield f"{name}.frames: more bytes than the manifest names"
    if not damaged and whole.hexdigest() != record["file_digest"]:
        yield f"{name}.frames: the file in it is not the one that was accepted"


def expand(frame: bytes, size: int, group: int) -> bytes:
    """The slice of `size` bytes in a frame; ValueError or ZstdError when it holds no such slice."""
    if not 0 < size <= SLICE_BYTES_MAX or group not in {1, 2, 4}:
        raise ValueError("a slice of a size or grouping that there is none of")
    if zstandard.get_frame_parameters(frame).content_size != size:
        raise ValueError("a frame does not declare the size that its slice has")
    grouped = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    count = size // group
    out = bytearray(grouped)
    for plane in range(group):
        out[plane : count * group : group] = grouped[plane * count : (plane + 1) * count]
    return bytes(out)


def framed(domain: str, *parts: bytes) -> bytes:
    """What a signature is taken over: each part behind its length."""
    return b"".join(struct.pack(">I", len(part)) + part for part in (domain.encode(), *parts))


def fits(public: bytes, signature: bytes, *parts: bytes) -> bool:
    """Whether the holder of this key (32 bytes) signed these parts, of which the first is the domain."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - sealed runs alone need it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415 - the same

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, framed(parts[0].decode(), *parts[1:]))
    except InvalidSignature:
        return False
    return True


def authority_keys(folder: Path) -> list[bytes]:
    """The keys in authority.pub, 32 bytes each; ValueError for another kind of key."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - sealed runs alone need it
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415 - the same

    blocks = (folder / "authority.pub").read_text(encoding="ascii").split("-----BEGIN")[1:]
    try:
        keys: list[Any] = [load_pem_public_key(f"-----BEGIN{block}".encode()) for block in blocks]
    except UnsupportedAlgorithm as error:
        raise ValueError("authority.pub holds a key of another kind") from error
    return [key.public_bytes_raw() for key in keys]


def issued(document: bytes, domain: bytes, authorities: list[bytes]) -> bool:
    """Whether one of the authority's keys has signed a document."""
    outer = msgpack.unpackb(document)
    named = [key for key in authorities if hashlib.sha256(key).hexdigest()[:16] == outer["a"]]
    return bool(named) and fits(named[0], outer["s"], domain, outer["d"])


def endorsed_by(folder: Path, authorities: list[bytes]) -> set[bytes]:
    """The SHA-256 of each membership that an earlier key signed, as the authority lists them now; ValueError."""
    path = folder / "endorsements"
    if not path.exists():
        return set()
    document = path.read_bytes()
    if not issued(document, b"mailboat endorsements v1", authorities):
        raise ValueError("the endorsements are not signed by a key in authority.pub")
    return set(msgpack.unpackb(msgpack.unpackb(document)["d"])["sha256"])


def check_signatures(folder: Path, lines: list[dict[str, Any]], records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield each signature that does not fit, and each row that has another hash than the one that was signed."""
    authorities = authority_keys(folder)
    endorsed = endorsed_by(folder, authorities)
    hashes = {line["seq"]: line["hash"] for line in lines}
    plan = bytes.fromhex(records[0]["fingerprint"])
    signed: set[str] = set()
    for row, record in enumerate(records, start=1):
        if record["t"] not in {"signed", "witnessed"}:
            continue
        of_site, document = record["t"] == "witnessed", record["member"]
        member = msgpack.unpackb(msgpack.unpackb(document)["d"])
        seen = (struct.pack(">Q", record["seq"]), bytes.fromhex(record["head"]))
        said: tuple[bytes, ...]
        if of_site:
            said = (b"mailboat witness v1", bytes.fromhex(record["bare_sha256"]), *seen)
        else:
            version = struct.pack(">Q", record["version"])
            said = (b"mailboat head v1", member["federation"].encode(), plan, version, *seen)
        place = f"journal.jsonl: row {row}"
        known = hashlib.sha256(document).digest() in endorsed
        if not (known or issued(document, b"mailboat membership v1", authorities)) or not fits(
            member["sign_key"], record["signature"], *said
        ):
            yield f"{place}: its signature, or the membership whose key it names, does not fit"
            continue
        name = record["site"] if of_site else "coordinator"
        if member["role"] != ("site" if of_site else "coordinator") or (of_site and member["name"] != name):
            yield f"{place}: signed by {member['role']} {member['name']}"
        if record["seq"] and hashes.get(record["seq"]) != record["head"]:
            yield f"{place}: row {record['seq']} had another hash for {name}: history was changed after that was signed"
        signed |= {record["update_id"]} if of_site else set()
    for record in records:
        if record["t"] == "accepted" and record["update_id"] not in signed:
            yield f"journal.jsonl: update {record['update_id']} is not signed by its site"
    told = ", ".join(hashlib.sha256(framed("mailboat authority v1", key)).hexdigest()[:32] for key in authorities)
    count = sum(record["t"] in {"signed", "witnessed"} for record in records)
    sys.stdout.write(f"{count} signatures looked at; fingerprint of the authority, for you to compare: {told}\n")


def check(folder: Path) -> Iterator[str]:
    """Yield all that is wrong with the bundle in `folder`."""
    yield from check_sums(folder)
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]
    yield from check_chain(lines)
    records = [record_of(line) for line in lines]
    yield from check_opened(folder, records[0])
    yield from check_counting(records)
    states: list[str] = []
    yield from check_states(records, states)
    federation = json.loads((folder / "federation.json").read_bytes())
    if federation["trust"]["mode"] == "sealed":
        yield from check_signatures(folder, lines, records)
    merged = {part["update_id"] for record in records for part in record.get("contributions", ())}
    gone = given_up(records, federation["aggregation"].get("rule", "mean"))
    for record in records:
        there = (folder / f"updates/{record.get('update_id')}.manifest").exists()
        # A bundle up to a version leaves out the updates that were not merged by then.
        if record["t"] == "accepted" and (there or record["update_id"] in merged):
            yield from check_update(folder, record, states, gone)
    sys.stdout.write(f"{len(lines)} rows, the last one has hash {lines[-1]['hash']}; {len(merged)} updates merged\n")


def main(folder: Path) -> int:
    """Print all findings; return 0 when there are none, else 3."""
    wrong = 0
    try:
        for finding in check(folder):
            wrong += 1
            sys.stdout.write(f"WRONG  {finding}\n")
    except UNREADABLE as error:
        wrong += 1
        sys.stdout.write(f"WRONG  the bundle cannot be read any further: {type(error).__name__}: {error}\n")
    sys.stdout.write(f"{wrong} things are wrong\n" if wrong else "nothing is wrong\n")
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent))
