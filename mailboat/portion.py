"""Dividing the notes of one place among several folders by patient, to try a federation on them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from edge_client.data import TextNote
from shared.errors import ConfigError, RefusedError

HELDOUT = "heldout"


@dataclass(frozen=True, slots=True)
class Portion:
    """What was written: notes by folder, and how many were left out as bad."""

    notes: dict[str, int]
    skipped: int


def place_of(patient: str, *, sites: int, heldout: float, seed: int) -> str:
    """Return the folder of a patient, `site-1` to `site-{sites}` or `heldout`; the same for the same arguments.

    The first half of SHA-256 over seed and patient, as a number from 0 to 1, falls below the share `heldout` or into
    one of equal parts above it.
    """
    digest = hashlib.sha256(f"{seed}\n{patient}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    if point < heldout:
        return HELDOUT
    return f"site-{1 + min(sites - 1, int((point - heldout) / (1 - heldout) * sites))}"


def divide(
    found: Iterator[TextNote | RefusedError],
    out: Path,
    *,
    one_label: bool,
    sites: int,
    heldout: float,
    seed: int,
    skip_bad: bool,
) -> Portion:
    """Write each note as a JSON line into the folder of its patient under `out`, readable by this user alone.

    `one_label` tells which key the label or labels go under, as the reader of such files wants it. Raises the first
    refusal unless `skip_bad`, and ConfigError when `out` holds something; what was written until then stays.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", hint="name a new folder, or remove the old one first")
    names = [*(f"site-{number}" for number in range(1, sites + 1)), HELDOUT]
    counts, skipped = dict.fromkeys(names, 0), 0
    with ExitStack() as stack:
        files = {}
        for name in names:
            (out / name).mkdir(parents=True, mode=0o700)
            file = os.open(out / name / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            files[name] = stack.enter_context(os.fdopen(file, "w", encoding="utf-8"))
        for note in found:
            if isinstance(note, RefusedError):
                if not skip_bad:
                    raise note
                skipped += 1
                continue
            place = place_of(note.patient, sites=sites, heldout=heldout, seed=seed)
            said = {"label": note.labels[0]} if one_label else {"labels": note.labels}
            row = {"id": note.id, "patient": note.patient, "text": note.text, **said}
            files[place].write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[place] += 1
    return Portion(counts, skipped)
