"""The schema of a site's folder: which release may read what lies there, and one process at a time.

    layout.json   {"schema": 1}; written at the first start, and missing in folders of releases before there was one

Folders without the file have schema 1. A schema above ours was written by a later release and is refused: that release
may keep updates where this one would not look for them, and would train and offer them twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared import durable
from shared.errors import CorruptError, RefusedError

SCHEMA_VERSION = 1
LAYOUT = "layout.json"
LOCK = "site.lock"
PREFIX = "prefix"
"""Folder of what the frozen blocks made of the notes, see `prefix_store`."""


def check_layout(storage: Path) -> int:
    """Return the schema of a site's folder; RefusedError(rule='newer-schema') when this release cannot read it."""
    path = storage / LAYOUT
    try:
        loaded: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return 1
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
    return schema


def open_layout(storage: Path) -> None:
    """Check the folder's schema and write it down where it is missing; errors as `check_layout`."""
    durable.make_folder(storage)
    check_layout(storage)
    durable.write_once(storage / LAYOUT, [json.dumps({"schema": SCHEMA_VERSION}).encode() + b"\n"])
