"""What a machine has: versions, Mosquitto, room and speed of the disk."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from broker.launcher import find_mosquitto
from mailboat.doctor.finding import Finding, fail, ok, warn
from shared import durable
from shared.config import ComputeSection
from shared.errors import ConfigError, MailboatError, UnavailableError

NEEDED = ("mailboat", "aiomqtt", "blake3", "paho-mqtt", "msgpack", "numpy", "pydantic", "structlog", "zstandard")
TRAINER = ("torch", "transformers", "safetensors")
ROOM_BYTES = 2 * 1024**3
"""Free space under which a person should look: a few versions of a small model, or a part of one of a large model."""
SYNC_SLOW_S = 0.1
"""Each promise costs a few syncs; a disk slower than that is felt in every update."""
SYNC_BYTES = 1 << 20
SYNCS = 5


def check_versions(*, trains: bool) -> Iterator[Finding]:
    """Yield Python, the packages, and Mosquitto; `trains` when this machine must load models."""
    yield ok("python", f"{platform.python_version()} ({sys.executable})")
    yield _packages("packages", NEEDED, "pip install mailboat", needed=True)
    yield _packages("trainer", TRAINER, "pip install 'mailboat[edge]'", needed=trains)
    yield _mosquitto()


def check_disk(folder: Path) -> Iterator[Finding]:
    """Yield free space, and how long a sync takes, where `folder` is or will be."""
    here = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not here.is_dir():
        yield fail("disk", ConfigError(f"{here} is a file", hint="set storage to a folder"))
        return
    free = shutil.disk_usage(here).free
    room = f"{free / 1e9:.1f} GB free at {here}"
    yield (
        ok("disk", room) if free >= ROOM_BYTES else warn("disk", room, "make room: updates and versions are kept there")
    )
    if not os.access(here, os.W_OK):
        error = UnavailableError(f"{here} may not be written by this user", hint="mend its owner or mode")
        yield fail("disk", error)
        return
    try:
        seconds = sync_s(here)
    except MailboatError as error:
        yield fail("disk", error)
        return
    text = f"a synced write of 1 MiB takes {1000 * seconds:.1f} ms (median of {SYNCS})"
    slow = "each update waits for several syncs; a local disk or SSD is faster than a network share"
    yield ok("disk", text) if seconds < SYNC_SLOW_S else warn("disk", text, slow)


def check_device(section: ComputeSection) -> Finding:
    """Where models are computed here, and how precisely; ModuleNotFoundError where PyTorch is missing."""
    from edge_client.device import find_device

    try:
        device = find_device(section)
    except MailboatError as error:
        return fail("device", error)
    return ok("device", f"{device.title}, precision {device.precision}")


def sync_s(folder: Path) -> float:
    """Median seconds to write and sync 1 MiB in `folder`; nothing stays there. UnavailableError when it is full."""
    data = os.urandom(SYNC_BYTES)
    took = []
    with durable.temporary_file(folder) as (_, fd), durable.storage_errors(folder, SYNCS * SYNC_BYTES):
        for number in range(SYNCS):
            began = time.perf_counter()
            durable.write_all(fd, data, number * SYNC_BYTES)
            durable.sync_file(fd)
            took.append(time.perf_counter() - began)
    return sorted(took)[SYNCS // 2]


def _packages(what: str, names: tuple[str, ...], install: str, *, needed: bool) -> Finding:
    there, missing = [], []
    for name in names:
        try:
            there.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if not missing:
        return ok(what, ", ".join(there))
    text = f"not installed: {', '.join(missing)}"
    if needed:
        return fail(what, ConfigError(text, hint=install))
    return warn(what, text, f"fine where nothing is trained; a site needs them: {install}")


def _mosquitto() -> Finding:
    path = find_mosquitto()
    if path is None:
        return warn("mosquitto", "not installed", "fine unless the broker shall run here: apt-get install mosquitto")
    told = subprocess.run([path, "-h"], check=False, capture_output=True, text=True, timeout=10)
    version = re.search(r"mosquitto version (\S+)", told.stdout)
    return ok("mosquitto", f"{version[1] if version else 'of unknown version'} ({path})")
