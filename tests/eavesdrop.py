"""What somebody learns who holds the broker: a subscriber to everything, and a search for all that was secret."""

from __future__ import annotations

import asyncio
import json
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgpack
import numpy as np
import zstandard
from safetensors.numpy import load_file

from coordinator.journal import Journal
from shared.config import BrokerSection, FederationConfig, LinkSection
from shared.configfile import load_config
from shared.link import Connected, Link, LinkOptions, Packet
from shared.store import FrameStore
from shared.trust.witness import HEADS, parse_head

FIELDS = (
    *("loss", "seconds", "examples", "frame_hashes", "frame_lengths", "base_digest", "file_digest", "metrics"),
    *("outcome", "staleness", "weight", "phase", "progress", "reconnects", "config_sha256", "software"),
    *("problem", "treatment"),
)
"""Names in manifests, receipts, status and hello, and the labels of who names none."""
WINDOW = 16
"""Bytes that are looked for in one piece; chance does not repeat as many."""
STRIDE = 997
"""From one window to the next: a thousand for each megabyte, some in every frame."""
LEAST = 6
"""Bytes that are worth looking for: what is sealed holds any three in sixteen megabytes, any four in four gigabytes."""
FLOAT = b"\xcb"
"""What stands before a number of eight bytes in MessagePack."""


class Spy:
    """A subscriber to everything, with the broker's own rights."""

    def __init__(self, broker: BrokerSection) -> None:
        self.packets: list[Packet] = []
        self.link = Link(LinkOptions(broker=broker, link=LinkSection(), client_id="spy", subscriptions=("#",)))
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Listen until cancelled."""
        async with self.link:
            async for event in self.link.events():
                match event:
                    case Connected():
                        self.listening.set()
                    case Packet():
                        self.packets.append(event)
                    case _:
                        pass

    async def until(self, pattern: str) -> Packet:
        """The first packet whose topic fits."""
        while True:
            for packet in self.packets:
                if re.fullmatch(pattern, packet.topic):
                    return packet
            await asyncio.sleep(0.02)

    @property
    def payloads(self) -> list[bytes]:
        """What was said, in order."""
        return [packet.payload for packet in self.packets if packet.payload]


def learnt(root: Path, said: list[bytes]) -> set[str]:
    """Which of the secrets of the run below `root` stand in what was said, as they are or inside a zstd frame."""
    clear = b"\0".join(said)
    found = {name for name in FIELDS if _word(name) in clear}
    found |= {what for what, secret in _secrets(root) if secret in clear}
    for each in said:
        for match in re.finditer(rb"\x28\xb5\x2f\xfd", each):
            grouped = _expanded(each[match.start() :])
            if grouped is not None:
                found.add("zstd frame")
                bytes_of = np.frombuffer(grouped[: len(grouped) // 4 * 4], np.uint8)
                raw = bytes_of.reshape(4, -1).T.tobytes()
                found |= {name for name in ("a.weight", "b.weight", "mailboat") if name.encode() in raw}
                found |= {"tensor value" for secret in _tensors(root) if secret in raw}
    return found


def _word(name: str) -> bytes:
    """What to look for as a name: one that chance spells too stands in MessagePack behind its length.

    The shortest ones are names of numbers, whose mark follows.
    """
    packed: bytes = msgpack.packb(name)
    return name.encode() if len(name) >= LEAST else packed if len(packed) >= LEAST else packed + FLOAT


def _number(name: str, value: float) -> Iterator[bytes]:
    """What to look for as a number: behind its name, and alone where it is more than a byte or two and zeros.

    0.5 is two bytes and six zeros. So is the end of an id, one in 65,536, before the index 0 and the length of a chunk.
    """
    bare = struct.pack(">d", value)
    yield msgpack.packb(name) + FLOAT + bare
    yield from (each for each in (bare, repr(value).encode()) if len(each.rstrip(b"\0")) >= LEAST)


def _secrets(root: Path) -> Iterator[tuple[str, bytes]]:
    """What each secret is, and its bytes: labels, metrics, digests, receipts, history, pieces of all tensors."""
    storage = root / "coordinator"
    for label in load_config(root / "federation.toml", FederationConfig).task.labels:
        yield "label", label.encode()
    for folder in ("updates", "states"):
        for name in FrameStore(storage / folder).ids():
            stored = FrameStore(storage / folder).get(name)
            assert stored is not None
            yield "digest", bytes.fromhex(stored.manifest.file_digest)
            yield "digest", stored.manifest.file_digest.encode()
            yield from (("frame", piece) for piece in _pieces((storage / folder / f"{name}.frames").read_bytes()))
            if folder == "updates":
                for metric, value in stored.manifest.update.metrics.items():
                    yield from (("metric", each) for each in (_word(metric), *_number(metric, value)))
    for path in root.glob("*/receipts/*.json"):
        told = json.loads(path.read_bytes())
        yield "receipt", told["manifest_sha256"].encode()
        yield from (("receipt", each) for each in _number("weight", told["weight"]))
    for path in root.glob(f"*/receipts/{HEADS}"):
        yield from (("head", parse_head(line, path.name).signature) for line in path.read_bytes().splitlines())
    with Journal.open_read(storage / "journal.sqlite") as journal:
        for row in journal.rows():
            yield "history", row.hash
            yield "history", row.hash.hex().encode()
    yield from (("tensor value", piece) for piece in _tensors(root))


def _tensors(root: Path) -> list[bytes]:
    """Pieces of the masters, as floats lie in memory."""
    paths = sorted((root / "coordinator" / "masters").glob("v*.safetensors"))
    return [piece for path in paths for values in load_file(path).values() for piece in _pieces(values.tobytes())]


def _pieces(data: bytes) -> Iterable[bytes]:
    pieces = [data[at : at + WINDOW] for at in range(0, len(data) - WINDOW + 1, STRIDE)]
    return [piece for piece in pieces if len(set(piece)) > WINDOW // 4]


def _expanded(data: bytes) -> bytes | None:
    """What a frame holds that is whole and as long as it says; chance makes the beginning of one of its magic."""
    try:
        declared = zstandard.get_frame_parameters(data).content_size
        held = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except zstandard.ZstdError:
        return None
    return held if held and len(held) == declared else None
