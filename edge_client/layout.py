"""The schema of a site's folder: which release may read what lies there, and one process at a time.

    layout.json   {"schema": 2}; written at the first start, and missing in folders of releases before there was one

Folders without the file have schema 1. A schema above ours was written by a later release and is refused: that release
may keep updates where this one would not look for them, and would train and offer them twice. In schema 1 transfers had
SHA-256 where they have BLAKE3 now, so what lies there of a run can only be ended by the earlier release. All else is
read as it is, above all `privacy.jsonl`, which remembers across runs what was spent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared import durable
from shared.errors import CorruptError, RefusedError

SCHEMA_VERSION = 2
LAYOUT = "layout.json"
LOCK = "site.lock"
PREFIX = "prefix"
"""Folder of what the frozen blocks made of the notes, see `prefix_store`."""
_OF_A_RUN = ("outbox", "receipts", "residual", "states")


def check_layout(storage: Path) -> int:
    """Return the schema of a site's folder.

    RefusedError with rule 'newer-schema' or 'older-schema' when this release cannot read what lies there.
    """
    path = storage / LAYOUT
    try:
        loaded: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        loaded = {"schema": 1}
    except ValueError:
        loaded = None
    match loaded:
        case {"schema": int(schema)} if schema >= 1:
            pass
        case _:
            raise CorruptError(f"{path} is not what was written", hint="look for disk errors, then restore the folder")
    if schema > SCHEMA_VERSION:
        raise RefusedError(
            f"{path}: schema version {schema}, this release knows {SCHEMA_VERSION}",
            rule="newer-schema",
            hint="run the release that wrote the folder, or a later one; its updates wait",
        )
    if schema < SCHEMA_VERSION and any(any(storage.glob(f"{folder}/*")) for folder in _OF_A_RUN):
        raise RefusedError(
            f"{storage}: an earlier release began to take part in a run here",
            rule="older-schema",
            hint="let that release end the run; for another run name another folder, and copy privacy.jsonl there",
        )
    return schema


def open_layout(storage: Path) -> None:
    """Check the folder's schema and write it down where it is missing; errors as `check_layout`."""
    durable.make_folder(storage)
    check_layout(storage)
    written = json.dumps({"schema": SCHEMA_VERSION}).encode() + b"\n"
    if not (storage / LAYOUT).exists() or (storage / LAYOUT).read_bytes() != written:
        durable.replace_atomic(storage / LAYOUT, written)
