"""What a person decides about updates in quarantine, handed to the coordinator as files that it takes within a second.

    quarantine/<update id>.release      the update waits to be merged
    quarantine/<update id>.drop         it never will be

A coordinator that is not running finds them at its start. A file goes once the decision is in the journal; killed
between the two, the coordinator finds an update that is not in quarantine any more, and does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from coordinator.decisions import Ruled
from shared import durable

FOLDER = "quarantine"
Verdict = Literal["release", "drop"]
_NAME = re.compile(r"([0-9a-f]{32})\.(release|drop)")


def rule_on(storage: Path, update_id: str, verdict: Verdict) -> None:
    """Leave a decision for the coordinator; UnavailableError when the folder cannot be written."""
    folder = storage / FOLDER
    durable.make_folder(folder)
    durable.replace_atomic(folder / f"{update_id}.{verdict}", b"")


def rulings(storage: Path) -> Iterator[Ruled]:
    """Yield the decisions that wait; files of other names are left alone."""
    folder = storage / FOLDER
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if found := _NAME.fullmatch(path.name):
                yield Ruled(found[1], release=found[2] == "release")


def forget_ruling(storage: Path, ruled: Ruled) -> None:
    """Remove a decision that was carried out."""
    durable.remove(storage / FOLDER / f"{ruled.update_id}.{'release' if ruled.release else 'drop'}")
